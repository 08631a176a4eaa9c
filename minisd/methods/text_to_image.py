"""Train the whole UNet on captioned pictures (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.methods._base import Method, Training
from minisd.options import Average, Captions, flag, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Options(Captions, Average, Training):
    """Text to image"""

    validation_prompts: list[str] = flag([], "draw these while training")
    non_ema_revision: str | None = flag(None, "take the UNet from this revision of a hub id")
    train_text_encoder: bool = flag(False, "train the text encoder along with the UNet")
    tracker_project_name: str = flag("text2image-fine-tune", "project of the trackers")
    learning_rate: float = flag(1e-4)
    train_batch_size: int = flag(16)
    dream_training: bool = flag(False, "train on what a sampler would see: the model's own error counts")
    dream_detail_preservation: float = flag(1.0, "p of --dream_training: it counts (1 - alpha_bar)^(p / 2)")
    validation_epochs: int | None = flag(
        None, "draw every so many epochs; 5, unless --validation_steps is given"
    )
    output_dir: Path = flag(Path("sd-model-finetuned"))

    drawn_every = "validation_epochs", 5

    def check(self):
        used = self.dream_training or self.dream_detail_preservation == 1
        require(used, "--dream_detail_preservation needs --dream_training")


class Method(Method):
    def insert(self, sd):
        if revision := self.options.non_ema_revision:
            sd.unet.load_state_dict(self.load(revision=revision).unet.state_dict())
        kind = sd.schedule.prediction_type
        if self.options.dream_training and kind != "epsilon":
            raise ValueError(f"--dream_training: this model predicts {kind}, not noise")
        trained = super().insert(sd)
        if self.options.train_text_encoder:
            trained |= self.thaw("text_encoder", sd.text_encoder)
        return trained

    def rectify(self, noisy: Tensor, target: Tensor, timesteps: Tensor, batch: dict):
        """DREAM (Zhou et al. 2024, arXiv 2312.00210): the model's error, lambda = (1 - alpha_bar)^(p / 2) of
        it, is part of the noise that it sees and of what it has to say."""
        import torch

        if not self.options.dream_training:
            return noisy, target
        with torch.no_grad(), self.autocast():
            pred = self.predict(noisy.to(self.dtype), timesteps.to(self.device), batch)
        _, sigma = self.sd.schedule.levels(timesteps, noisy)
        error = sigma**self.options.dream_detail_preservation * (target - pred.float())
        return noisy + sigma * error, target + error

    def wanted(self):
        return [(prompt, None) for prompt in self.options.validation_prompts] or super().wanted()
