"""The pictures of its class that DreamBooth trains on beside those of the instance (arXiv 2208.12242)."""

from __future__ import annotations

import os
from pathlib import Path


def draw_missing(method) -> None:
    """Fill --class_data_dir up to --num_class_images with what the untrained model draws for --class_prompt.
    Picture i has the seed --seed + i, so that a run that was stopped goes on where it was."""
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from minisd.data import images
    from minisd.generate import Settings, infotext, pictures

    o = method.options
    if int(os.environ.get("RANK", 0)) == 0 and (first := _count(o.class_data_dir)) < o.num_class_images:
        by_name = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        default = "fp16" if method.device.type == "cuda" else "fp32"
        sd = method.load(by_name[o.prior_generation_precision or default])
        settings = Settings(width=o.resolution, height=o.resolution)
        numbers = range(first, o.num_class_images)
        prompts, seeds = [o.class_prompt] * len(numbers), [o.seed + i for i in numbers]
        made = pictures(sd, prompts, seeds, settings, batch_size=o.sample_batch_size)
        made = tqdm(made, desc=f"drawing {o.class_prompt!r}", total=len(numbers), leave=False)
        for i, seed, image in zip(numbers, seeds, made, strict=True):
            about = infotext(sd, o.class_prompt, seed, settings)
            images.save_png(image, o.class_data_dir / f"{i:05}-seed-{seed}.png", about)
    if dist.is_initialized():
        dist.barrier()


def _count(folder: Path) -> int:
    from minisd.data import images

    return len(images.list_images(folder)[0]) if folder.is_dir() else 0
