"""Prior preservation: training on images of the class as well as the instance (arXiv 2208.12242)."""

from pathlib import Path

from minisd.methods._base import Captioned, Method, Source
from minisd.terminal import BRIEF


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
