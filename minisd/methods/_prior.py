"""Prior preservation: training on images of the class as well as the instance (arXiv 2208.12242)."""

from pathlib import Path
from typing import Literal

from minisd.methods._base import Captioned, Method, Source
from minisd.options import Captions, Count, Group, flag, require
from minisd.terminal import BRIEF


class Prior(Group):
    """Prior preservation"""

    with_prior_preservation: bool = flag(False, "train on images of the class as well")
    class_data_dir: Path | None = flag(None, "folder of class images; missing ones are generated")
    class_prompt: str | None = flag(None, "prompt of the class images")
    num_class_images: Count = flag(100, "number of class images")
    prior_loss_weight: float = flag(1.0, "weight of the prior loss")
    sample_batch_size: Count = flag(4, "batch size for generating class images")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = flag(
        None, "precision of generating class images; fp16 on a GPU and fp32 elsewhere by default"
    )

    def check_class(self) -> None:
        """ValueError if the class, or the folder of its images, is needed but not given."""
        for name in ("class_data_dir", "class_prompt") if self.with_prior_preservation else ():
            require(getattr(self, name), f"--with_prior_preservation needs --{name}")


class Subject(Captions, Prior):
    """Subject"""

    EXCLUDES = {"with_prior_preservation": "bucket", "pre_compute_text_embeddings": "train_text_encoder"}
    instance_prompt: str | None = flag(None, "prompt of images without a caption, with a rare word in it")
    # For DeepFloyd IF, in diffusers' example scripts.
    pre_compute_text_embeddings: bool = flag(False, "accepted: a frozen encoder sees a prompt once anyway")
    tokenizer_max_length: int | None = flag(None, "refused: SD v1.x has 77 tokens", refused=True)
    text_encoder_use_attention_mask: bool = flag(False, "refused: SD v1.x attends to padding", refused=True)
    validation_images: list[str] = flag([], "refused: SD v1.x has no upscaler", refused=True)
    class_labels_conditioning: str | None = flag(None, "refused: SD v1.x has no classes", refused=True)

    def check(self):
        self.check_class()


class PriorPreservation(Method):
    """A method that also trains on images of a class if --with_prior_preservation is given."""

    def classes(self) -> list[tuple[Path, str]]:
        """The folder and the prompt of each class."""
        return [(self.options.class_data_dir, self.options.class_prompt)]

    def prepare(self) -> None:
        from minisd.data import images

        o = self.options
        for folder, prompt in self.classes() if o.with_prior_preservation else ():
            there = sum(len(images.list_images(f)) for f in (folder, folder / "images") if f.is_dir())
            if there < o.num_class_images:
                self.complete_class(folder, prompt, o.num_class_images - there)

    def dataset(self, source: Source) -> Captioned:
        prompt = self.options.instance_prompt
        try:
            return super().dataset(source, prompt)
        except ValueError as e:
            if prompt is None and source.columns == ["image"]:
                raise ValueError(f"{e}; or give all of them one by --instance_prompt") from None
            raise

    def datasets(self) -> tuple[Captioned, Captioned | None]:
        from minisd.data import datasets, source

        o, (instances, held_out) = self.options, super().datasets()
        if o.with_prior_preservation:
            views = {"resolution": o.resolution, "center_crop": o.center_crop, "random_flip": o.random_flip}
            classes = source.read(o.class_data_dir, flag="--class_data_dir", **source.keywords(o))
            about = {"prompt": o.class_prompt, "interpolation": o.image_interpolation_mode}
            classes = datasets.Captioned(classes, **about, **views)
            self.data = datasets.Prior(instances, classes, o.prior_loss_weight)
        return self.data, held_out

    def complete_class(self, folder: Path, prompt: str, missing: int) -> None:
        """Generate the `missing` images of a class's folder with the untrained model. Image i has the seed
        --seed + i, so that an interrupted run continues where it stopped."""
        from tqdm import tqdm

        from minisd.data import images
        from minisd.device import DTYPES
        from minisd.sampling import infotext
        from minisd.sampling.generate import Settings, pictures

        o, default = self.options, "fp16" if self.device.type == "cuda" else "fp32"
        sd = self.load(DTYPES[o.prior_generation_precision or default])
        settings = Settings(width=o.resolution, height=o.resolution, plain_prompt=True)
        paths = {o.seed + i: folder / f"{i:05}-seed-{o.seed + i}.png" for i in range(o.num_class_images)}
        seeds = [seed for seed, path in paths.items() if not path.exists()][:missing]
        made = pictures(sd, [prompt] * missing, seeds, settings, batch_size=o.sample_batch_size)
        made = tqdm(made, desc=f"drawing {prompt!r}", total=missing, **BRIEF)
        for seed, image in zip(seeds, made, strict=True):
            images.save_png(image, paths[seed], infotext.write(prompt, seed, sd.name, settings))
