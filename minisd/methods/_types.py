"""Names for the methods' annotations, imported by type checkers only."""

import torch
from PIL.Image import Image
from torch import Tensor

from minisd.data.source import Source
from minisd.sampling.pixel_diffusion import PixelDiffusion
from minisd.sampling.stable_diffusion import StableDiffusion

__all__ = ["Image", "Parameters", "PixelDiffusion", "Prompts", "Source", "StableDiffusion", "Tensor"]

Parameters = dict[str, torch.nn.Parameter]
Prompts = list[tuple[str, Tensor | None]]  # each with the image (3, h, w) in [-1, 1] that conditions it
