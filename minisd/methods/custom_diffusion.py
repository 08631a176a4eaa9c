"""Learn concepts by new words and the keys and values of cross-attention (arXiv 2212.04488)."""

from pathlib import Path
from typing import Literal

from minisd.methods._base import Device, Parameters, Prompts, Source, StableDiffusion, Tensor
from minisd.methods._prior import Prior, PriorPreservation
from minisd.options import Training, flag, require

CHANNELS = 4  # of the latents


class Options(Prior, Training):
    """Custom Diffusion"""

    EXCLUDES = {"data": "concepts_list"}
    FEWEST = 100
    data: Path | None = flag(None)
    instance_prompt: str | None = flag(None, "prompt of the images, with the new word in it")
    concepts_list: Path | None = flag(None, "a JSON list of concepts, instead of one concept by flags")
    real_prior: bool = flag(False, "the class images are real ones; none are generated")
    modifier_token: str | None = flag(None, "the new words, joined by +")
    initializer_token: str = flag("ktn+pll+ucd", "the words they start from, joined by +")
    freeze_model: Literal["crossattn_kv", "crossattn"] = flag(
        "crossattn_kv", "what trains: cross-attention's keys and values, or all of its projections"
    )
    cd_loss: Literal["mean", "reference"] = flag(
        "mean", "reference weights instances by 4, the number of channels, as diffusers' example script does"
    )
    hflip: bool = flag(False, "flip images with probability 1/2")
    noaug: bool = flag(False, "show the images at one size only")
    no_safe_serialization: bool = flag(False, "write .bin instead of .safetensors")
    num_class_images: int = flag(200)
    seed: int = flag(42)
    dataloader_num_workers: int = flag(2)
    num_train_epochs: int = flag(1)
    checkpointing_steps: int = flag(250)
    validation_steps: int | None = flag(50)
    num_validation_images: int = flag(2)
    output_dir: Path = flag(Path("custom-diffusion-model"))

    def check(self):
        one = self.data is not None and self.instance_prompt is not None
        require(one or bool(self.concepts_list), "give --data and --instance_prompt, or --concepts_list")
        if not self.concepts_list:
            self.check_class()
        if self.modifier_token:
            new, old = self.modifier_token.split("+"), self.initializer_token.split("+")
            require(len(new) <= len(old), f"--initializer_token: {len(old)} words for {len(new)} new ones")


class CustomDiffusion(PriorPreservation):
    """Trains copies of the projections, and an embedding row for each new word."""

    def __init__(self, options: Options, device: Device):
        from minisd.data.concepts import Concept, read_concepts

        super().__init__(options, device)
        if options.concepts_list:
            self.concepts = read_concepts(options.concepts_list, options.with_prior_preservation)
        else:
            same = {n: getattr(options, n) for n in ("instance_prompt", "class_prompt", "class_data_dir")}
            self.concepts = [Concept(instance_data_dir=options.data, **same)]
        self.words = options.modifier_token.split("+") if options.modifier_token else []
        if options.with_prior_preservation:
            self.lr_scale = 2.0  # twice the images, as diffusers' example script counts them

    def classes(self) -> list[tuple[Path, str]]:
        return [(c.class_data_dir, c.class_prompt) for c in self.concepts]

    def complete_class(self, folder: Path, prompt: str, missing: int) -> None:
        """ValueError if --real_prior forbids generating images."""
        needed = self.options.num_class_images
        there = f"--class_data_dir: {folder} has {needed - missing} images"
        require(not self.options.real_prior, f"{there}, --real_prior needs --num_class_images {needed}")
        super().complete_class(folder, prompt, missing)

    def build(self, sd: StableDiffusion) -> Parameters:
        from minisd.adapters import custom_diffusion

        o = self.options
        everything = o.freeze_model == "crossattn"
        projections = custom_diffusion.ALL if everything else custom_diffusion.KEYS_AND_VALUES
        self.projections = custom_diffusion.insert(sd.unet, projections)
        trained = dict(self.projections)
        for word, start in zip(self.words, o.initializer_token.split("+"), strict=False):
            self.rows = self.add_token(sd, word, start, 1, flag="--modifier_token")
            trained["modifier_tokens"] = self.rows  # one parameter for all words so far
        return trained

    def read(self) -> Source:
        from minisd.data import concepts, source

        o = self.options
        flag = "--concepts_list" if o.concepts_list else "--data"
        return concepts.read_instances(self.concepts, flag=flag, **source.keywords(o))

    def datasets(self) -> tuple:
        from minisd.data import concepts, datasets, source

        o = self.options
        size = {"resolution": o.resolution, "factor": self.sd.vae.config.downscale}
        self.data = concepts.CustomConcepts(self.read(), augment=not o.noaug, hflip=o.hflip, **size)
        if o.with_prior_preservation:
            classes = concepts.read_classes(self.concepts, flag="--class_data_dir", **source.keywords(o))
            classes = concepts.ClassPictures(classes, random_flip=o.hflip, center_crop=o.center_crop, **size)
            share = 1 / CHANNELS if o.cd_loss == "reference" else 1.0
            self.data = datasets.Prior(self.data, classes, o.prior_loss_weight * share)
        return self.data, None

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """The mean squared error within the mask, (b,)."""
        return super().errors(pred, target, batch) * (CHANNELS if self.options.cd_loss == "reference" else 1)

    def training_prompts(self) -> Prompts:
        return [(concept.instance_prompt, None) for concept in self.concepts]

    def save(self, folder: Path) -> None:
        from minisd.adapters import custom_diffusion, token_embedding

        extension = ".bin" if self.options.no_safe_serialization else ".safetensors"
        path = folder / f"pytorch_custom_diffusion_weights{extension}"
        custom_diffusion.save(path, self.sd.unet, self.projections, {"format": "pt", "model": self.sd.name})
        # The folder in which it will be: `folder` may be a temporary one.
        out, weights = self.options.output_dir, path.name
        calls = [f'unet.load_attn_procs("{out}", weight_name="{weights}", _pipeline=pipe)']
        for i, word in enumerate(self.words):
            row = self.rows[i : i + 1]
            token_embedding.save(folder / f"{word}{extension}", word, row, {"format": "pt"})
            calls.append(f'load_textual_inversion("{out}", weight_name="{word}{extension}")')
        print("in diffusers:", "; ".join(f"pipe.{call}" for call in calls))
