"""What every kind of adapter provides, and how a file finds its kind.

A kind is a file beside this one with two functions. `matches(tensors)` says whether the tensors of a file
are of this kind. `read(sd, tensors, metadata, source)` returns an Adapter and leaves the model as it is; it
raises ValueError, naming the file, if anything in it does not fit the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from minisd import files, registry

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion


@dataclass(kw_only=True)
class Adapter:
    """What one file adds to a model; each kind of adapter has its own subclass, or shares another's."""

    description: str  # one line for the user
    tokens: dict[str, Tensor] = field(default_factory=dict)  # new token -> its embeddings (n, d)

    @property
    def parts(self) -> set[str]:
        """The networks that it changes to the extent of its scale: "unet", "text_encoder"."""
        return set()

    def put(self, sd: StableDiffusion) -> None:
        """Add it to the model. It was checked when it was read, so this cannot fail."""
        raise NotImplementedError

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Set the scale in each network: 1 is the full effect, and at 0 the network is what it was, to the
        bit."""


@dataclass(kw_only=True)
class Attached:
    """The adapters that one call of `StableDiffusion.attach` added, and their scale in each network."""

    files: list[Path]
    adapters: list[Adapter]
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """The networks for which there is a scale."""
        return set().union(*(adapter.parts for adapter in self.adapters))

    def set_scales(self, scales: dict[str, float]) -> None:
        self.scales = scales
        for adapter in self.adapters:
            adapter.set_scales(scales)

    def rescale(self, scale: float, text_scale: float | None, name: str) -> None:
        """Set the scale, that of the text encoder to `text_scale` if it is given. ValueError, naming the
        adapter, if a scale is not finite, or would have no effect."""
        scales = {"unet": scale, "text_encoder": scale if text_scale is None else text_scale}
        for value in scales.values():
            if not math.isfinite(value):
                raise ValueError(f"{name}: {value} is not a scale")
        if not self.parts and (scale != 1 or text_scale is not None):
            raise ValueError(f"{name} is an embedding: it has no scale, so {scale:g} would have no effect")
        idle = [part for part, value in scales.items() if value and part not in self.parts]
        if idle and text_scale not in (None, scale):
            raise ValueError(
                f"{name} changes nothing in the {network_name(idle[0])}, "
                f"so its scale {scales[idle[0]]:g} there would have no effect"
            )
        self.set_scales(scales)


def network_name(part: str) -> str:
    """A network's name in messages."""
    return {"unet": "UNet", "text_encoder": "text encoder"}[part]


def read(sd: StableDiffusion, file: Path) -> Adapter:
    """The adapter in a file, whose kind its tensors tell. ValueError, naming the file, if there is none, or
    if it does not fit the model."""
    tensors, metadata = files.read_with_metadata(file)
    try:
        kind = registry.match("adapters", tensors)
    except ValueError:
        names = ", ".join(list(tensors)[:3])
        raise ValueError(f"{file} is no adapter of a known kind; it holds {names}, ...") from None
    return kind.read(sd, tensors, metadata, file)
