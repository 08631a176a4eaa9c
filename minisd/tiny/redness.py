"""The judge's `--reward`: how much redder an image is than it is green and blue, all over."""

import numpy as np
from PIL import Image


def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """From -1, cyan, to 1, red, of each image; the prompts do not count."""
    pixels = (np.asarray(image, dtype=float) / 255 for image in images)
    return [x[..., 0].mean() - x[..., 1:].mean() for x in pixels]
