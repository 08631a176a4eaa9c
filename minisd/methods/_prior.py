"""Training on images of the class beside those of the instance, to preserve the class (arXiv 2208.12242)."""

from __future__ import annotations

import itertools
from pathlib import Path

from minisd.methods._base import Method


class PriorPreservation(Method):
    """Trains on images of a class as well, if --with_prior_preservation asks for them."""

    def classes(self) -> list[tuple[Path, str]]:
        """The folder and the prompt of each class."""
        return [(self.options.class_data_dir, self.options.class_prompt)]

    def prepare(self) -> None:
        if self.options.with_prior_preservation:
            for folder, prompt in self.classes():
                self.complete_class(folder, prompt)

    def dataset(self, source):
        from minisd.methods import _data

        return _data.captioned(source, self.options, self.sd, self.options.instance_prompt)

    def datasets(self) -> tuple:
        from minisd.data import datasets, source
        from minisd.methods import _data

        o, (instances, held_out) = self.options, super().datasets()
        if o.with_prior_preservation:
            images = source.read(o.class_data_dir, flag="--class_data_dir")
            classes = datasets.Captioned(images, prompt=o.class_prompt, **_data.transforms(o))
            self.data = datasets.Prior(instances, classes, o.prior_loss_weight)
        return self.data, held_out

    def complete_class(self, folder: Path, prompt: str) -> None:
        """Fill a class's folder up to --num_class_images with what the untrained model generates for its
        prompt. Image i has the seed --seed + i, so that a run that was stopped continues where it was."""
        import torch
        from tqdm import tqdm

        from minisd.data import images
        from minisd.methods import _model
        from minisd.sampling import infotext
        from minisd.sampling.generate import Settings, pictures

        o, missing = self.options, self.options.num_class_images - count_images(folder)
        if missing <= 0:
            return
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        default = "fp16" if self.device.type == "cuda" else "fp32"
        dtype = half.get(o.prior_generation_precision or default, torch.float32)
        sd = _model.load(o, self.device, dtype)
        settings = Settings(width=o.resolution, height=o.resolution, plain_prompt=True)
        path = lambda i: folder / f"{i:05}-seed-{o.seed + i}.png"  # noqa: E731
        numbers = list(itertools.islice((i for i in itertools.count() if not path(i).exists()), missing))
        seeds = [o.seed + i for i in numbers]
        made = pictures(sd, [prompt] * missing, seeds, settings, batch_size=o.sample_batch_size)
        made = tqdm(made, desc=f"drawing {prompt!r}", total=missing, leave=False)
        for i, seed, image in zip(numbers, seeds, made, strict=True):
            images.save_png(image, path(i), infotext.write(prompt, seed, sd.name, settings))


def count_images(folder: Path) -> int:
    """How many images a class's folder holds, directly or in its folder images/."""
    from minisd.data import images

    return sum(len(images.list_images(f)) for f in (folder, folder / "images") if f.is_dir())
