"""What an adapter file adds to a model, and how the kind of a file is recognised.

A kind is a module beside this one with two functions. `matches(tensors)` says whether a file's tensors are of
this kind. `read(sd, tensors, metadata, source)` returns an Adapter without changing the model; it raises
ValueError, naming the file, if anything in it does not fit the model. A kind that is used with a conditioning
image, and not attached, has its name as CONTROL instead of `read`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn as nn
from torch import Tensor

from minisd import files, registry
from minisd.formats.parts import first_names
from minisd.options import require

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

NETWORK_NAMES = {"unet": "UNet", "text_encoder": "text encoder"}  # in messages


@dataclass(kw_only=True)
class Adapter:
    """The contents of one file, checked against the model.

    An update is a module that is called with a layer and its input, and returns what it adds to the output.
    It has a `scale`, a `lora_bias` or None, and `delta()`, the change of the weight. One that is no change of
    weights has a `scale` and a `layer_class`, which the layer becomes.
    """

    description: str  # one line for the user
    tokens: dict[str, Tensor]  # new token -> its embeddings (n, d)
    updates: dict[str, nn.Module] = field(default_factory=dict)  # native name of a layer -> its update
    image_prompt: nn.Module | None = None  # of an IP-Adapter: what takes the image that it needs


@dataclass(kw_only=True)
class Attached:
    """The adapters that one call of `StableDiffusion.attach` added, and their scale in each network."""

    files: list[Path]
    adapters: list[Adapter]
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """The networks with updates, and so with a scale: "unet", "text_encoder"."""
        return {name.partition(".")[0] for adapter in self.adapters for name in adapter.updates}

    def set_scales(self, scales: dict[str, float]) -> None:
        """Set the scale in each network: 1 is the full effect, 0 exactly the network without it."""
        self.scales = scales
        for adapter in self.adapters:
            for name, update in adapter.updates.items():
                update.scale = scales[name.partition(".")[0]]

    def rescale(self, scale: float, text_scale: float | None, name: str) -> None:
        """Set the scale; in the text encoder it is `text_scale`, unless that is None. ValueError, naming the
        adapter, if a scale is not finite, or would have no effect."""
        scales = {"unet": scale, "text_encoder": scale if text_scale is None else text_scale}
        for value in scales.values():
            require(math.isfinite(value), f"{name}: {value} is not a scale")
        if not self.parts and (scale != 1 or text_scale is not None):
            raise ValueError(f"{name} is an embedding: it has no scale, so {scale:g} would have no effect")
        idle = [part for part, value in scales.items() if value and part not in self.parts]
        if idle and text_scale not in (None, scale):
            raise ValueError(
                f"{name} changes nothing in the {NETWORK_NAMES[idle[0]]}, "
                f"so its scale {scales[idle[0]]:g} there would have no effect"
            )
        self.set_scales(scales)


def read(sd: StableDiffusion, file: Path) -> Adapter:
    """Read an adapter file; its tensors tell the kind. ValueError, naming the file, if it is no adapter, or
    does not fit the model."""
    tensors, metadata = files.read_with_metadata(file)
    for name, tensor in tensors.items():
        if tensor.ndim and not tensor.is_floating_point():  # single numbers may be integers
            raise ValueError(f"{file}: {name} holds {files.DTYPES[tensor.dtype]}, not weights")
        require(tensor.float().isfinite().all(), f"{file}: {name} has values that are not finite numbers")
    try:
        kind = registry.match("adapters", tensors)
    except ValueError:
        raise ValueError(f"{file} is no adapter of a known kind; it holds {first_names(tensors)}") from None
    if control := getattr(kind, "CONTROL", None):
        raise ValueError(f"{file} is a {control}: give it as --controlnet, with its --control_image")
    return kind.read(sd, tensors, metadata, file)
