"""How users spell our flags. Standard library only."""

import re

UNITS = {"MB": 2**20, "GB": 2**30}
SPELLED: dict[str, str] = {}  # how the command line that was parsed last spells its flags, by name


def as_written(message: str) -> str:
    """The message with its flags as the user wrote them: `--train_data_dir` for `--data`."""

    def spelled(match: re.Match) -> str:
        return f"--{match[1]}{SPELLED[match[2]]}" if match[2] in SPELLED else match[0]

    return re.sub(r"(?<![\w-])--(no-|)(\w+)(?:/--\w+)*", spelled, message)


def bytes_in(amount: str) -> float:
    """The bytes in an amount such as 8GB or 800 MB; 0 if it is none."""
    found = re.fullmatch(r"(\d+\.?\d*) *(MB|GB)", amount.upper())
    return float(found[1]) * UNITS[found[2]] if found else 0.0


# What A1111, kohya's scripts and CompVis's call our flags, where no flag of ours is spelled so.
ELSEWHERE = {
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "scale": "guidance_scale",
    "sampler": "scheduler", "sampler_name": "scheduler", "sampling_method": "scheduler",
    "ddim_eta": "eta", "ddim_steps": "steps", "sampling_steps": "steps",
    "negative": "negative_prompt", "n_iter": "num_images", "n_samples": "num_images",
    "batch_count": "num_images", "images_per_prompt": "num_images", "num_images_per_prompt": "num_images",
    "W": "width", "H": "height", "denoising_strength": "strength", "init_img": "image", "init_image": "image",
    "mask_image": "mask", "lora": "adapter", "embedding": "adapter", "network_mul": "adapter",
    "outdir": "output", "from_file": "prompt_file", "ckpt": "model", "ckpt_path": "model",
    "network_dim": "rank", "network_rank": "rank", "lora_rank": "rank", "network_alpha": "alpha",
    "lora_alpha": "alpha", "network_dropout": "lora_dropout", "network_weights": "init_lora",
    "save_model_as": "save_format", "lr": "learning_rate", "unet_lr": "learning_rate",
    "epochs": "num_train_epochs", "max_train_epochs": "num_train_epochs",
    "steps": "max_train_steps", "batch_size": "train_batch_size", "output_name": "output_dir",
    "lr_scheduler_num_cycles": "lr_num_cycles", "lr_scheduler_power": "lr_power",
    "max_data_loader_n_workers": "dataloader_num_workers", "min_snr_gamma": "snr_gamma",
    "ip_noise_gamma": "input_perturbation", "zero_terminal_snr": "rescale_betas_zero_snr",
    "v_parameterization": "prediction_type", "enable_bucket": "bucket",
    "caption_dropout_rate": "caption_dropout", "flip_aug": "random_flip", "reg_data_dir": "class_data_dir",
    "token_string": "placeholder_token", "init_word": "initializer_token",
    "num_vectors_per_token": "num_vectors", "xformers": "enable_xformers_memory_efficient_attention",
    "resume": "resume_from_checkpoint", "log_with": "report_to",
    "save_every_n_steps": "checkpointing_steps", "save_every_n_epochs": "checkpointing_steps",
    "sample_prompts": "validation_prompt", "sample_every_n_steps": "validation_steps",
    "sample_every_n_epochs": "validation_epochs", "sample_sampler": "validation_scheduler",
}  # fmt: skip
