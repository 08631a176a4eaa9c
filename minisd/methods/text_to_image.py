"""Train the whole UNet on captioned pictures (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minisd.config import Average, Captions, flag
from minisd.methods._base import Method, Training


@dataclass(kw_only=True)
class Options(Captions, Average, Training):
    """Text to image"""

    validation_prompts: list[str] = flag([], "draw these while training")
    non_ema_revision: str | None = flag(None, "take the UNet from this revision of a hub id")
    train_text_encoder: bool = flag(False, "train the text encoder along with the UNet")
    tracker_project_name: str = flag("text2image-fine-tune", "project of the trackers")
    learning_rate: float = flag(1e-4)
    train_batch_size: int = flag(16)
    validation_epochs: int | None = flag(5)
    output_dir: Path = flag(Path("sd-model-finetuned"))


class Method(Method):
    def insert(self, sd):
        if revision := self.options.non_ema_revision:
            sd.unet.load_state_dict(self.load(revision=revision).unet.state_dict())
        trained = super().insert(sd)
        if self.options.train_text_encoder:
            trained |= self.thaw("text_encoder", sd.text_encoder)
        return trained

    def wanted(self):
        return [(prompt, None) for prompt in self.options.validation_prompts] or super().wanted()
