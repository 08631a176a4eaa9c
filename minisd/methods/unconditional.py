"""Train a diffusion model of pixels from nothing, without text (DDPM, arXiv 2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minisd.methods._base import Method
from minisd.options import LR_SCHEDULERS, Average, Dataset, Optimizer, Precision, Run, flag, require

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(kw_only=True)
class Options(Dataset, Average, Optimizer, Precision, Run):
    """Unconditional"""

    model_config_name_or_path: Path | None = flag(None, "config.json of another network, or its folder")
    image_column: str = flag("image", "column of the pictures")
    random_flip: bool = flag(False, "flip pictures with probability 1/2")
    preserve_input_precision: bool = flag(False, "refused: pictures are read with 8 bits a channel")
    ddpm_num_steps: int = flag(1000, "steps of the noise law")
    ddpm_num_inference_steps: int = flag(1000, "steps of a picture that is drawn")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = flag("linear", "its shape")
    prediction_type: Literal["epsilon", "sample"] = flag("epsilon", "what the network learns to predict")
    eval_batch_size: int = flag(16, "pictures drawn each time")
    save_images_epochs: int = flag(10, "draw every so many epochs")
    save_model_epochs: int = flag(10, "leave the model every so many epochs")
    num_train_epochs: int = flag(
        100, "passes over the data, if --max_train_steps is not given", also=("num_epochs",)
    )
    report_to: Literal["none", "tensorboard", "wandb", "all"] = flag(
        "tensorboard", "where curves and pictures go besides log.jsonl", also=("logger",)
    )
    cache_dir: str | None = flag(None, "where files from the hub are kept")
    resolution: int = flag(64)
    train_batch_size: int = flag(16)
    learning_rate: float = flag(1e-4)
    lr_scheduler: LR_SCHEDULERS = flag("cosine")
    adam_beta1: float = flag(0.95)
    adam_weight_decay: float = flag(1e-6)
    ema_warmup: bool = flag(True)
    output_dir: Path = flag(Path("ddpm-model-64"))

    @property
    def validation_epochs(self) -> int:
        return self.save_images_epochs

    def check(self):
        require(
            not self.preserve_input_precision, "--preserve_input_precision: pictures are read with 8 bits"
        )
        self.positive("ddpm_num_steps", "ddpm_num_inference_steps", "eval_batch_size")
        self.positive("save_images_epochs", "save_model_epochs")
        fewer = self.ddpm_num_inference_steps <= self.ddpm_num_steps
        require(fewer, "--ddpm_num_inference_steps must not be more than --ddpm_num_steps")


class Method(Method):
    """Trains all of the pixel UNet; its latents are the pixels, and nothing else is loaded."""

    def build(self) -> dict[str, torch.nn.Parameter]:
        import torch

        from minisd.models.layers import move
        from minisd.sampling.pixel_diffusion import PixelDiffusion

        o = self.options
        torch.manual_seed(o.seed)
        self.sd = PixelDiffusion.new(
            o.resolution,
            o.model_config_name_or_path,
            beta_schedule=o.ddpm_beta_schedule,
            num_train_timesteps=o.ddpm_num_steps,
            prediction_type=o.prediction_type,
            rescale_betas_zero_snr=o.rescale_betas_zero_snr,
        )
        return self.thaw("unet", move(self.sd.unet, self.device))

    def examples(self, source):
        return self.uncaptioned(source)

    def latents(self, batch: dict) -> Tensor:
        return batch["pixels"].to(self.device)

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        return self.sd.unet(noisy, timesteps)

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """A clean picture's error counts SNR times, as the noise's does by itself; --snr_gamma caps that."""
        errors = super().errors(pred, target, batch)
        if self.options.prediction_type == "sample" and self.options.snr_gamma is None:
            errors = errors * self.sd.schedule.snr(self.timesteps(batch)).to(errors.device)
        return errors

    def after_update(self, step: int) -> None:
        if step % (self.options.save_model_epochs * self.updates_per_epoch) == 0:
            with self.averaged():
                self.save(self.options.output_dir)

    validates = True

    def validation(self) -> Image.Image:
        """The same noise every time."""
        import torch

        from minisd.data import images

        count, steps = self.options.eval_batch_size, self.options.ddpm_num_inference_steps
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        with self.drawing(count * steps) as on_step:
            return images.grid([images.to_pil(p) for p in self.sd.sample(generators, steps, on_step)])

    result = validation
