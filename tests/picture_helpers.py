"""Pictures to start from, pictures that diffusers draws, and how near one is to another."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw


def photo(number: int, size=(40, 32)) -> Image.Image:
    """Smooth colours and an ellipse."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    array = np.stack([255 * x, 200 * y, 128 + 100 * np.sin(9 * x * y + number)], axis=2)
    image = Image.fromarray(array.astype(np.uint8))
    ImageDraw.Draw(image).ellipse((6, 6, 22 + 4 * number, 26), fill=(255, 80 * number, 30))
    return image


def draw_theirs(pipe, prompts, seeds, width, height, **kwargs):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompts, width=width, height=height, generator=generators, **kwargs).images


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in decibels."""
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
