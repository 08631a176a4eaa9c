"""Bind a rare word to the subject of a few pictures by training the UNet (arXiv 2208.12242)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minisd.methods._base import Training
from minisd.methods._prior import Method
from minisd.options import Average, Captions, DeepFloyd, Prior, flag


@dataclass(kw_only=True)
class Options(Captions, Prior, DeepFloyd, Average, Training):
    """DreamBooth"""

    instance_prompt: str = flag(help="the prompt of pictures without a caption, with a rare word in it")
    train_text_encoder: bool = flag(False, "train the text encoder as well")
    skip_save_text_encoder: bool = flag(
        False, "accepted: a text encoder that did not train is left as it was"
    )
    offset_noise: bool = flag(False, "the same as --noise_offset 0.1")
    learning_rate: float = flag(5e-6)
    train_batch_size: int = flag(4)
    num_train_epochs: int = flag(1)
    output_dir: Path = flag(Path("dreambooth-model"))

    def check(self):
        if self.offset_noise and not self.noise_offset:
            self.noise_offset = 0.1


class Method(Method):
    def insert(self, sd):
        trained = super().insert(sd)
        if self.options.train_text_encoder:
            trained |= self.thaw("text_encoder", sd.text_encoder)
        return trained
