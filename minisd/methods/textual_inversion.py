"""Learn a new token that stands for the concept in a few pictures (arXiv 2208.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minisd.config import flag, require
from minisd.methods._base import Method, Training

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(kw_only=True)
class Options(Training):
    """Textual inversion"""

    placeholder_token: str | None = flag(None, "the new token; <FOLDER> by default, after the name of --data")
    initializer_token: str | None = flag(None, "the word it starts from; the folder's name by default")
    num_vectors: int = flag(1, "embedding vectors of the token")
    learnable_property: Literal["object", "style"] = flag("object", "what the prompts say of the pictures")
    repeats: int = flag(100, "times that each picture counts in an epoch")
    flip_p: float = flag(0.5, "chance that a picture is flipped; 0 for text and what has a left and a right")
    save_steps: int = flag(500, "leave learned_embeds-steps-N every so many updates; 0 never")
    no_safe_serialization: bool = flag(False, "write .bin instead of .safetensors")
    only_save_embeds: bool = flag(True, "leave the token alone, without the model it belongs to")
    save_as_full_pipeline: bool = flag(False, "leave the whole model too, with the token in it")
    learning_rate: float = flag(1e-4)
    train_batch_size: int = flag(16)
    max_train_steps: int | None = flag(5000)
    max_grad_norm: float = flag(0.0)
    output_dir: Path = flag(Path("text-inversion-model"))

    def check(self):
        require(self.num_vectors > 0, "--num_vectors must be positive")
        require(self.repeats > 0, "--repeats must be positive")
        require(self.save_steps >= 0, "--save_steps must not be negative")
        require(0 <= self.flip_p <= 1, "--flip_p must be from 0 to 1")


class Method(Method):
    """Trains `rows` (n, d), a parameter beside the text encoder's frozen table: nothing has to be restored
    after an update, and the optimizer holds n rows instead of 49,408."""

    def __init__(self, options: Options):
        super().__init__(options)
        name = options.data.resolve().name.lower()
        self.token = options.placeholder_token or f"<{name}>"
        self.word = options.initializer_token or name

    def describe(self) -> str:
        return f"{self.token} starts from {self.word!r}\n{self.folder.summary()}"

    def build(self) -> dict[str, torch.nn.Parameter]:
        from minisd.adapters import token_embedding
        from minisd.data import datasets

        o = self.options
        self.folder = datasets.read_folder(o.data, flag="--data", skip_bad_images=o.skip_bad_images)
        self.sd = sd = self.load()
        sd.text_encoder.float()  # the rows' gradient passes through it, and it is a seventh of the UNet
        if o.gradient_checkpointing:
            sd.unet.enable_gradient_checkpointing()
        rows = self.initial_row(self.word).repeat(o.num_vectors, 1)  # (n, d)
        try:
            self.rows = token_embedding.add_token(sd.tokenizer, sd.text_encoder, self.token, rows)
        except ValueError as e:
            raise ValueError(f"--placeholder_token: {e}") from None
        return {"rows": self.rows}

    def dataset(self):
        from minisd.data.datasets import ConceptPictures

        o = self.options
        return ConceptPictures(
            self.folder,
            self.token,
            style=o.learnable_property == "style",
            resolution=o.resolution,
            center_crop=o.center_crop,
            flip_p=o.flip_p,
            repeats=o.repeats,
        )

    def save(self, folder: Path, suffix: str = "") -> None:
        from minisd.adapters import token_embedding

        extension = ".bin" if self.options.no_safe_serialization else ".safetensors"
        path = folder / f"learned_embeds{suffix}{extension}"
        metadata = {"format": "pt", "initializer_token": self.word, "model": self.sd.name}
        token_embedding.save(path, self.token, self.rows, metadata)
        if not suffix and (self.options.save_as_full_pipeline or not self.options.only_save_embeds):
            self.sd.save(folder, {"text_encoder"})

    def after_update(self, step: int) -> None:
        if self.options.save_steps and step % self.options.save_steps == 0:
            self.save(self.options.output_dir, f"-steps-{step}")

    def prompt(self) -> str:
        style = "a painting in the style of {}"
        kind = style if self.options.learnable_property == "style" else "a photo of a {}"
        return self.options.validation_prompt or kind

    def validation(self) -> Image.Image:
        from minisd.data import images

        return images.grid(self.samples(self.prompt().replace("{}", self.token)))

    def result(self) -> Image.Image:
        """What it was shown, what the model draws for the word it began with, and what for the token."""
        from minisd.data import images

        shown = [images.open_image(p) for p in self.folder.pictures[: self.options.num_validation_images]]
        before, after = (self.prompt().replace("{}", word) for word in (self.word, self.token))
        before = before.replace(self.token, self.word)
        rows = [("trained on", shown), (f"before: {before}", self.samples(before))]
        return images.labelled_rows([*rows, (f"after: {after}", self.samples(after))])
