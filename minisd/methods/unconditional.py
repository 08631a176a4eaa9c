"""Train a diffusion model of pixels from scratch, without text (DDPM, arXiv 2006.11239)."""

from pathlib import Path
from typing import Literal

from minisd.methods._base import Image, Method, Parameters, PixelDiffusion, Tensor
from minisd.options import LR_SCHEDULERS, Average, Count, Dataset, Diffusion, Optimizer, Precision, Run, flag
from minisd.terminal import BRIEF


class Options(Dataset, Average, Optimizer, Diffusion, Precision, Run):
    """Unconditional"""

    DATA_HAS_SPLITS = True
    model_config_name_or_path: Path | None = flag(None, "config.json of another network, or its folder")
    image_column: str = flag("image", "column of the images")
    random_flip: bool = flag(False, "flip images with probability 1/2")
    preserve_input_precision: bool = flag(False, "refused: images have 8 bits a channel", refused=True)
    ddpm_num_steps: Count = flag(1000, "number of timesteps of the noise schedule")
    ddpm_num_inference_steps: Count = flag(1000, "number of denoising steps of a generated image", free=True)
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = flag(
        "linear", "shape of the noise schedule"
    )
    prediction_type: Literal["epsilon", "sample"] = flag("epsilon", "what the network learns to predict")
    eval_batch_size: Count = flag(16, "number of images generated each time", free=True)
    save_images_epochs: Count = flag(10, "generate images every this many epochs", free=True)
    save_model_epochs: Count = flag(10, "save the model every this many epochs", free=True)
    cache_dir: str | None = flag(None, "folder for files downloaded from the hub", free=True)
    resolution: int = flag(64)
    train_batch_size: int = flag(16)
    learning_rate: float = flag(1e-4)
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "precision of frozen networks and autocast")
    lr_scheduler: LR_SCHEDULERS = flag("cosine")
    adam_beta1: float = flag(0.95)
    adam_weight_decay: float = flag(1e-6)
    ema_warmup: bool = flag(True)
    output_dir: Path = flag(Path("ddpm-model-64"))

    def check(self):
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError("--ddpm_num_inference_steps must not be more than --ddpm_num_steps")

    def validation_interval(self, updates_per_epoch: int) -> int:
        return self.save_images_epochs * updates_per_epoch


class Unconditional(Method):
    """Trains all of the pixel UNet; its latents are the pixels, and nothing else is loaded."""

    def load(self) -> PixelDiffusion:
        import torch

        from minisd.sampling.pixel_diffusion import PixelDiffusion

        o = self.options
        torch.manual_seed(o.seed)
        schedule = {"beta_schedule": o.ddpm_beta_schedule, "num_train_timesteps": o.ddpm_num_steps}
        schedule |= {"prediction_type": o.prediction_type, "rescale_betas_zero_snr": o.rescale_betas_zero_snr}
        return PixelDiffusion.new(o.resolution, o.model_config_name_or_path, **schedule)

    def build(self, sd: PixelDiffusion) -> Parameters:
        from minisd.models.layers import move

        return self.unfreeze("unet", move(sd.unet, self.device))

    def inputs(self, batch: dict) -> dict:
        return self.send(batch | self.noise(batch, batch["pixels"].shape[1:]))

    def latents(self, batch: dict) -> Tensor:
        return batch["pixels"]

    def condition(self, batch: dict) -> dict:
        return {}

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """With --prediction_type sample, the weight is the SNR, as for noise; --snr_gamma caps it."""
        if self.options.prediction_type == "sample" and self.options.snr_gamma is None:
            return self.sd.schedule.snr(timesteps)
        return super().weights(timesteps)

    def save_interval(self, updates_per_epoch: int) -> int:
        return self.options.save_model_epochs * updates_per_epoch

    def preview(self, moment: str = "") -> Image | None:
        """Generated images, from the same noise every time; none before training, which would take many steps
        for noise."""
        from tqdm import tqdm

        from minisd.data import images
        from minisd.sampling.generate import Settings, pictures

        if moment == "before":
            return None
        o, steps = self.options, self.options.ddpm_num_inference_steps
        settings = Settings(steps=steps, scheduler="ddpm")
        settings.width = settings.height = self.sd.default_size  # of a model of one's own any number

        def draw(seeds: range) -> list[Image]:
            with tqdm(total=len(seeds) * steps, desc="drawing", **BRIEF) as bar, self.autocast():
                drawing = {"batch_size": o.eval_batch_size, "on_step": bar.update}
                return list(pictures(self.sd, [""] * len(seeds), seeds, settings, **drawing))

        return images.grid(self.share(range(o.eval_batch_size), draw))
