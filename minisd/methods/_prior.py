"""The pictures of its class that DreamBooth trains on beside those of the instance (arXiv 2208.12242)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path


def draw_missing(method, folder: Path, prompt: str, real: bool = False) -> None:
    """Fill the class's folder up to --num_class_images with what the untrained model draws for its prompt.
    Picture i has the seed --seed + i, so that a run that was stopped goes on where it was. ValueError if
    pictures are missing and have to be real."""
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from minisd.data import images
    from minisd.generate import Settings, infotext, pictures

    o = method.options
    first = _count(folder)
    if real:
        if first < o.num_class_images:
            wanted = f"--real_prior wants --num_class_images {o.num_class_images}"
            raise ValueError(f"--class_data_dir: {folder} has {first} pictures, {wanted}")
    elif int(os.environ.get("RANK", 0)) == 0 and first < o.num_class_images:
        by_name = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        default = "fp16" if method.device.type == "cuda" else "fp32"
        sd = method.load(by_name[o.prior_generation_precision or default])
        settings = Settings(width=o.resolution, height=o.resolution)
        free = (i for i in itertools.count() if not (folder / _name(i, o.seed + i)).exists())
        numbers = list(itertools.islice(free, o.num_class_images - first))
        prompts, seeds = [prompt] * len(numbers), [o.seed + i for i in numbers]
        made = pictures(sd, prompts, seeds, settings, batch_size=o.sample_batch_size)
        made = tqdm(made, desc=f"drawing {prompt!r}", total=len(numbers), leave=False)
        for i, seed, image in zip(numbers, seeds, made, strict=True):
            about = infotext(sd, prompt, seed, settings)
            images.save_png(image, folder / _name(i, seed), about)
    if dist.is_initialized():
        dist.barrier()


def _name(number: int, seed: int) -> str:
    return f"{number:05}-seed-{seed}.png"


def _count(folder: Path) -> int:
    from minisd.data import images

    found = [f for f in (folder, folder / "images") if f.is_dir()]
    return sum(len(images.list_images(f)[0]) for f in found)
