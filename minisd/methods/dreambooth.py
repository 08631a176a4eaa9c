"""Bind a rare word to the subject of a few pictures by training the UNet (arXiv 2208.12242)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minisd.config import Average, Captions, DeepFloyd, Prior, flag, require
from minisd.methods._base import Method, Training


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
        both = self.with_prior_preservation and self.bucket
        require(not both, "--with_prior_preservation and --bucket exclude each other")
        both = self.pre_compute_text_embeddings and self.train_text_encoder
        require(not both, "--pre_compute_text_embeddings and --train_text_encoder exclude each other")


class Method(Method):
    def build(self):
        from minisd.methods import _prior

        if self.options.with_prior_preservation:
            _prior.draw_missing(self, self.options.class_data_dir, self.options.class_prompt)
        trained = super().build()
        if self.options.train_text_encoder:
            trained |= self.thaw("text_encoder", self.sd.text_encoder)
        return trained

    def dataset(self):
        self.data = self.with_prior(self.captioned(self.options.instance_prompt))
        return self.data

    def prompts(self) -> list[str]:
        return super().prompts() or [self.options.instance_prompt]
