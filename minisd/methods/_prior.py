"""Training on pictures of the class beside those of the instance, so that it is kept (arXiv 2208.12242)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from minisd.methods._base import Method


class Method(Method):
    """One that trains on pictures of a class as well, if --with_prior_preservation asks for them."""

    def classes(self) -> list[tuple[Path, str]]:
        """The folder and the prompt of each class."""
        return [(self.options.class_data_dir, self.options.class_prompt)]

    def build(self):
        if self.options.with_prior_preservation:
            for folder, prompt in self.classes():
                self.draw_missing(folder, prompt)
        return super().build()

    def examples(self, source):
        return self.captioned(source, self.options.instance_prompt)

    def dataset(self):
        from minisd.data import datasets, source

        o, instances = self.options, super().dataset()
        if o.with_prior_preservation:
            pictures = source.read(o.class_data_dir, flag="--class_data_dir")
            classes = datasets.Captioned(pictures, prompt=o.class_prompt, **self.shown())
            self.data = datasets.Prior(instances, classes, o.prior_loss_weight)
        return self.data

    def draw_missing(self, folder: Path, prompt: str) -> None:
        """Fill a class's folder up to --num_class_images with what the untrained model draws for its prompt.
        Picture i has the seed --seed + i, so that a run that was stopped goes on where it was. ValueError if
        pictures are missing and have to be real."""
        import torch
        import torch.distributed as dist
        from tqdm import tqdm

        from minisd.data import images
        from minisd.sampling import infotext
        from minisd.sampling.generate import Settings, pictures

        o, first = self.options, _count(folder)
        if o.real_prior:
            if first < o.num_class_images:
                wanted = f"--real_prior wants --num_class_images {o.num_class_images}"
                raise ValueError(f"--class_data_dir: {folder} has {first} pictures, {wanted}")
        elif int(os.environ.get("RANK", 0)) == 0 and first < o.num_class_images:
            half = {"fp16": torch.float16, "bf16": torch.bfloat16}
            default = "fp16" if self.device.type == "cuda" else "fp32"
            sd = self.load(half.get(o.prior_generation_precision or default, torch.float32))
            settings = Settings(width=o.resolution, height=o.resolution, plain_prompt=True)
            free = (i for i in itertools.count() if not (folder / _name(i, o.seed + i)).exists())
            numbers = list(itertools.islice(free, o.num_class_images - first))
            prompts, seeds = [prompt] * len(numbers), [o.seed + i for i in numbers]
            made = pictures(sd, prompts, seeds, settings, batch_size=o.sample_batch_size)
            made = tqdm(made, desc=f"drawing {prompt!r}", total=len(numbers), leave=False)
            for i, seed, image in zip(numbers, seeds, made, strict=True):
                about = infotext.write(prompt, seed, sd.name, settings)
                images.save_png(image, folder / _name(i, seed), about)
        if dist.is_initialized():
            dist.barrier()


def _name(number: int, seed: int) -> str:
    return f"{number:05}-seed-{seed}.png"


def _count(folder: Path) -> int:
    from minisd.data import images

    found = [f for f in (folder, folder / "images") if f.is_dir()]
    return sum(len(images.list_images(f)) for f in found)
