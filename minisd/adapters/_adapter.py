"""What any adapter comes to, whatever its file: updates of layers, and tokens.

A kind of adapter is a file beside this one, with `matches(tensors)` and `read(sd, tensors, source)`, which
gives an Adapter, changes nothing in the model, and raises ValueError, naming the file, if anything in it has
no place there.
"""

import math
from dataclasses import dataclass, field

import torch.nn as nn
from torch import Tensor


@dataclass(kw_only=True)
class Adapter:
    about: str  # for people
    updates: dict[str, nn.Module] = field(default_factory=dict)  # by the native names of the layers
    tokens: dict[str, Tensor] = field(default_factory=dict)  # token -> its rows (n, d)


Updates = list[tuple[str, nn.Module]]  # with the native names of their layers


def set_scale(updates: Updates, scale: float, text_scale: float | None, name: str) -> None:
    """How far the layers are moved, those of the text encoder by `text_scale` if that is given. ValueError,
    naming the adapter, if that would change nothing, or only a part of what was asked for."""
    asked = {"unet": scale, "text_encoder": scale if text_scale is None else text_scale}
    wrong = [s for s in asked.values() if not math.isfinite(s)]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]} is no scale")
    if not updates and (scale != 1 or text_scale is not None):
        raise ValueError(f"{name} is an embedding: it has no scale, so {scale:g} would change nothing")
    moved = {layer.partition(".")[0] for layer, _ in updates}
    idle = [part for part, s in asked.items() if s and part not in moved]
    if idle and text_scale not in (None, scale):
        part = idle[0]
        raise ValueError(
            f"{name} changes nothing in the {part.replace('unet', 'UNet').replace('_', ' ')}, "
            f"so its scale {asked[part]:g} there would change nothing"
        )
    for layer, update in updates:
        update.scale = asked[layer.partition(".")[0]]
