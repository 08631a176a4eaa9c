"""minisd: Stable Diffusion v1.x, small enough to read.

import minisd

sd = minisd.load("v1-5-pruned-emaonly.safetensors")
sd.attach("lora.safetensors", 0.8)
images = sd.generate("a photo of a cat", steps=20, seed=0)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.sampling.api import Model, PixelModel


__version__ = "0.1.0"


def load(model: str | Path, **options) -> Model | PixelModel:
    """Load the model in a folder, a file or a hub id; by default on the GPU and in fp16 if there is one.
    `options` are those of StableDiffusion.load."""
    import torch

    from minisd.sampling import api

    options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(options["device"]).type == "cuda"
    options.setdefault("dtype", torch.float16 if on_gpu else torch.float32)
    return api.load(model, **options)
