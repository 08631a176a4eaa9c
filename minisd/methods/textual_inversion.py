"""Learn a new token that stands for the concept in a few pictures (arXiv 2208.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minisd.methods._base import Method, Training
from minisd.options import flag, require

if TYPE_CHECKING:
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
        self.positive("num_vectors", "repeats")
        self.chances("flip_p")
        require(self.save_steps >= 0, "--save_steps must not be negative")


class Method(Method):
    """Trains `rows` (n, d), a parameter beside the text encoder's frozen table: nothing has to be restored
    after an update, and the optimizer holds n rows instead of 49,408."""

    def __init__(self, options: Options):
        super().__init__(options)
        name = options.data.resolve().name.lower()
        self.token = options.placeholder_token or f"<{name}>"
        self.word = options.initializer_token or name
        style = "a painting in the style of {}"
        kind = style if options.learnable_property == "style" else "a photo of a {}"
        self.prompt = options.validation_prompt or kind

    def insert(self, sd):
        self.rows = self.teach(self.token, self.word, self.options.num_vectors, flag="--placeholder_token")
        return {"rows": self.rows}

    def dataset(self):
        from minisd.data import datasets, source

        o = self.options
        self.data = datasets.ConceptPictures(
            source.read(o.data, flag="--data", subfolders="none", skip_bad_images=o.skip_bad_images),
            self.token,
            style=o.learnable_property == "style",
            resolution=o.resolution,
            center_crop=o.center_crop,
            flip_p=o.flip_p,
            repeats=o.repeats,
        )
        return self.data

    def describe(self) -> str:
        return f"{self.token} starts from {self.word!r}\n{self.data.summary()}"

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

    def wanted(self):
        return [(self.prompt.replace("{}", self.token), None)] if self.options.validation_prompt else []

    def result(self) -> Image.Image:
        """What it was shown, what the model draws for the word it began with, and what for the token."""
        from minisd.data import images

        shown = [self.data.source.open(i, self.data.image_column) for i in range(len(self.data.source))[:8]]
        before, after = (self.prompt.replace("{}", word) for word in (self.word, self.token))
        before = before.replace(self.token, self.word)
        rows = [("trained on", shown), (f"before: {before}", self.samples(before))]
        return images.labelled_rows([*rows, (f"after: {after}", self.samples(after))])
