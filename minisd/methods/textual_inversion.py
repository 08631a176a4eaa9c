"""Learn a new token that stands for the concept in a few images (textual inversion, arXiv 2208.01618)."""

from pathlib import Path
from typing import Literal

from minisd import reading
from minisd.methods._base import Device, Method, Parameters, Prompts, StableDiffusion
from minisd.options import Count, Number, Probability, Training, flag


class Options(Training):
    """Textual inversion"""

    SUBFOLDERS = "none"
    placeholder_token: str | None = flag(None, "the new token; by default <FOLDER>, after the name of --data")
    initializer_token: str | None = flag(None, "the word to start from; by default the folder's name")
    num_vectors: Count = flag(1, "number of embedding vectors of the token")
    learnable_property: Literal["object", "style"] = flag("object", "what is learned; decides the prompts")
    repeats: Count = flag(100, "times that each image occurs in an epoch")
    flip_p: Probability = flag(0.5, "probability of flipping an image; 0 for asymmetric things such as text")
    save_steps: Number = flag(500, "save learned_embeds-steps-N every this many updates; 0 never", free=True)
    no_safe_serialization: bool = flag(False, "write .bin instead of .safetensors")
    only_save_embeds: bool = flag(True, "save the token only, without the model")
    save_as_full_pipeline: bool = flag(False, "also save the whole model, with the token in it")
    learning_rate: float = flag(1e-4)
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "precision of frozen networks and autocast")
    train_batch_size: int = flag(16)
    max_train_steps: int | None = flag(5000)
    max_grad_norm: float = flag(0.0)
    output_dir: Path = flag(Path("text-inversion-model"))


class TextualInversion(Method):
    """Trains `rows` (n, d), a parameter beside the text encoder's frozen table: no other row changes, and the
    optimizer holds n rows instead of 49,408."""

    def __init__(self, options: Options, device: Device):
        super().__init__(options, device)
        name = reading.real(options.data).name.lower()
        self.token = options.placeholder_token or f"<{name}>"
        self.word = options.initializer_token or name
        style = options.learnable_property == "style"
        kind = "a painting in the style of {}" if style else "a photo of a {}"
        self.prompt = options.validation_prompt or kind

    def build(self, sd: StableDiffusion) -> Parameters:
        o = self.options
        self.rows = self.add_token(sd, self.token, self.word, o.num_vectors, flag="--placeholder_token")
        return {"rows": self.rows}

    def datasets(self) -> tuple:
        from minisd.data import datasets

        o = self.options
        views = {"resolution": o.resolution, "center_crop": o.center_crop, "flip_p": o.flip_p}
        style = o.learnable_property == "style"
        self.data = datasets.ConceptPictures(self.read(), self.token, style=style, repeats=o.repeats, **views)
        return self.data, None

    def describe(self) -> str:
        return f"{self.token} starts from {self.word!r}\n{super().describe()}"

    def save_interval(self, updates_per_epoch: int) -> int:
        return self.options.save_steps

    def save_intermediate(self, folder: Path, step: int) -> None:
        self.save(folder, f"-steps-{step}")

    def save(self, folder: Path, suffix: str = "") -> None:
        from minisd.adapters import token_embedding

        extension = ".bin" if self.options.no_safe_serialization else ".safetensors"
        path = folder / f"learned_embeds{suffix}{extension}"
        metadata = {"format": "pt", "initializer_token": self.word, "model": self.sd.name}
        token_embedding.save(path, self.token, self.rows, metadata)
        if not suffix and (self.options.save_as_full_pipeline or not self.options.only_save_embeds):
            self.sd.save(folder, {"text_encoder"})

    def read_validation_prompts(self) -> Prompts:
        return self.training_prompts() if self.options.validation_prompt else []

    def training_prompts(self) -> Prompts:
        return [(self.prompt.replace("{}", self.token), None)]
