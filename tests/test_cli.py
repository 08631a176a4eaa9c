"""The command line: every flag of the field's script, and one clear line for every mistake."""

from dataclasses import fields

import pytest

from minisd import cli, registry
from minisd.optim import lr_factor

# Flags of the field's script for each method, old and new.
FIELD = {
    "textual_inversion": """
        train_data_dir output_dir resolution center_crop train_batch_size dataloader_num_workers
        gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps lr_num_cycles
        adam_beta1 adam_beta2 adam_weight_decay adam_epsilon push_to_hub hub_token hub_model_id
        logging_dir local_rank mixed_precision checkpointing_steps checkpoints_total_limit
        resume_from_checkpoint enable_xformers_memory_efficient_attention
        pretrained_model_name_or_path revision variant seed num_train_epochs max_train_steps
        gradient_checkpointing scale_lr allow_tf32 report_to validation_prompt num_validation_images
        validation_steps validation_epochs save_steps only_save_embeds save_as_full_pipeline
        no_safe_serialization num_vectors tokenizer_name placeholder_token initializer_token
        learnable_property repeats
    """,
    "lora": """
        dataset_name dataset_config_name train_data_dir instance_data_dir output_dir cache_dir resolution
        center_crop random_flip train_batch_size dataloader_num_workers gradient_accumulation_steps
        learning_rate lr_scheduler lr_warmup_steps lr_num_cycles lr_power adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon push_to_hub hub_token hub_model_id logging_dir local_rank
        mixed_precision checkpointing_steps checkpoints_total_limit resume_from_checkpoint
        enable_xformers_memory_efficient_attention pretrained_model_name_or_path revision variant
        tokenizer_name image_column caption_column max_train_samples seed num_train_epochs max_train_steps
        gradient_checkpointing scale_lr use_8bit_adam allow_tf32 max_grad_norm report_to noise_offset
        validation_epochs validation_prompt num_validation_images class_data_dir instance_prompt
        class_prompt with_prior_preservation prior_loss_weight num_class_images train_text_encoder
        sample_batch_size prior_generation_precision snr_gamma prediction_type rank lora_dropout
        image_interpolation_mode pre_compute_text_embeddings tokenizer_max_length
        text_encoder_use_attention_mask validation_images class_labels_conditioning
    """,
}
DEFAULTS = {
    "textual_inversion": {
        "resolution": 512, "train_batch_size": 16, "learning_rate": 1e-4, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "adam_weight_decay": 1e-2, "max_train_steps": 5000, "save_steps": 500,
        "checkpointing_steps": 500, "repeats": 100, "num_vectors": 1, "validation_steps": 100,
        "num_validation_images": 4, "report_to": "tensorboard", "mixed_precision": "no",
    },
    "lora": {
        "resolution": 512, "train_batch_size": 16, "learning_rate": 1e-4, "lr_scheduler": "constant",
        "adam_weight_decay": 1e-2, "max_train_steps": None, "num_train_epochs": 100, "validation_epochs": 1,
        "checkpointing_steps": 500, "num_validation_images": 4, "num_class_images": 100,
        "sample_batch_size": 4, "caption_column": "text", "image_interpolation_mode": "lanczos",
        "output_dir": cli.Path("sd-model-finetuned-lora"),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", registry.names("methods"))
def test_every_flag_of_the_field(method):
    cls = cli.options_of(method)
    ours = {name for f in fields(cls) for name in cli.spellings(cls, f)}
    assert set(FIELD[method].split()) <= ours
    _, options = cli.parse_train(["--method", method, "--model", "m", "--data", "d"])
    assert {k: getattr(options, k) for k in DEFAULTS[method]} == DEFAULTS[method]


def test_every_flag_has_help():
    for cls in [cli.config.Sample, *(cli.options_of(m) for m in registry.names("methods"))]:
        assert all(cli._metadata(cls, f.name).get("help") for f in fields(cls))


GUIDE = """--pretrained_model_name_or_path=runwayml/sd --train_data_dir=cat --learnable_property=object
--placeholder_token=<cat-toy> --initializer_token=toy --resolution=512 --train_batch_size=1
--gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
--lr_scheduler=constant --lr_warmup_steps=0 --output_dir=textual_inversion_cat"""


def test_the_guide_s_command_parses():
    name, options = cli.parse_train(["--method", "textual_inversion", *GUIDE.split()])
    assert name == "textual_inversion"
    assert (options.model, str(options.data)) == ("runwayml/sd", "cat")
    assert options.scale_lr and options.learning_rate == 5e-4 and options.max_train_steps == 3000


TI = ["--method", "textual_inversion", "--model", "m", "--data", "d"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--method is required"),
        (["--method", "textual_invertion"], "did you mean 'textual_inversion'?"),
        ([*TI, "--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        ([*TI, "--num_vectors", "two"], "--num_vectors: invalid int value: 'two'"),
        ([*TI, "--num_vectors", "0"], "--num_vectors must be positive"),
        ([*TI, "--resolution", "500"], "--resolution must be a multiple of 8"),
        ([*TI, "--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        ([*TI, "--flip_p", "2"], "--flip_p must be from 0 to 1"),
        ([*TI, "--report_to", "wandb", "--hub_token", "x"], "--hub_token"),
        (["--method", "textual_inversion"], "the following arguments are required"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse_train(argv)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text, path, scale",
    [("a/b.safetensors", "a/b.safetensors", 1), ("x:0.5", "x", 0.5), ("C:/x", "C:/x", 1), ("x:-1", "x", -1)],
)
def test_adapter_scale(text, path, scale):
    assert tuple(map(str, cli.split_scale(text))) == (path, str(float(scale)))


@pytest.mark.parametrize(
    "name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10)])
def test_learning_rates_equal_diffusers(name, warmup, total):
    import torch
    from diffusers.optimization import get_scheduler

    lr = 0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=2, power=2.0
    )
    for step in range(total):
        if name == "cosine":  # whose number of half waves is another thing under the same name there
            expected = None if step >= warmup else lr * step / warmup
        else:
            expected = optimizer.param_groups[0]["lr"]
        ours = lr * lr_factor(name, step, warmup=warmup, total=total, lr=lr, cycles=2, power=2.0)
        assert expected is None or ours == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_is_half_a_wave():
    factors = [lr_factor("cosine", s, warmup=0, total=10, lr=1, cycles=1, power=1) for s in (0, 5, 10)]
    assert factors == pytest.approx([1, 0.5, 0])
