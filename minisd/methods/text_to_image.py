"""Train the whole UNet on captioned images (Rombach et al. 2022, arXiv 2112.10752)."""

from pathlib import Path

from minisd.methods._base import Method, Parameters, Prompts, StableDiffusion, Tensor
from minisd.options import Average, Captions, Training, flag


class Options(Captions, Average, Training):
    """Text to image"""

    NEEDS = {"dream_training": "dream_detail_preservation"}
    validation_prompts: list[str] = flag([], "prompts to generate images for during training", free=True)
    non_ema_revision: str | None = flag(None, "load the UNet from this revision of a hub id")
    tracker_project_name: str = flag("text2image-fine-tune", "project of the trackers")
    learning_rate: float = flag(1e-4)
    train_batch_size: int = flag(16)
    dream_training: bool = flag(False, "DREAM: add the model's own error to its input and target")
    dream_detail_preservation: float = flag(1.0, "p in DREAM's weight (1 - alpha_bar)^(p / 2)")
    validation_steps: int | None = flag(None)
    validation_epochs: int | None = flag(5)
    output_dir: Path = flag(Path("sd-model-finetuned"))


class TextToImage(Method):
    """Trains the whole UNet, and with --train_text_encoder the text encoder."""

    def build(self, sd: StableDiffusion) -> Parameters:
        o, kind = self.options, sd.schedule.prediction_type
        if o.non_ema_revision:
            sd.unet.load_state_dict(self.load(revision=o.non_ema_revision).unet.state_dict())
        if o.dream_training and kind != "epsilon":
            raise ValueError(f"--dream_training: this model predicts {kind}, not noise")
        return super().build(sd)

    def noisy_batch(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """With DREAM (Zhou et al. 2024, arXiv 2312.00210), the model's error, times (1 - alpha_bar)^(p / 2),
        is added to the noise in the input and in the target."""
        import torch

        noisy, timesteps, target = super().noisy_batch(batch)
        if not self.options.dream_training:
            return noisy, timesteps, target
        with torch.no_grad():
            pred = self.predict_noisy(noisy, timesteps, batch)
        _, sigma = self.sd.schedule.levels(timesteps, noisy)
        error = sigma**self.options.dream_detail_preservation * (target - pred.float())
        return noisy + sigma * error, timesteps, target + error

    def read_validation_prompts(self) -> Prompts:
        prompts = [(prompt, None) for prompt in self.options.validation_prompts]
        return prompts or super().read_validation_prompts()
