"""T2I-Adapters (Mou et al. 2023, arXiv 2302.08453): read from a folder or a file.

Like a ControlNet, one is used with a conditioning image. The names in diffusers begin with `adapter.`, and
blocks are in `body.LEVEL.resnets`. The authors number all blocks in a row, `body.0` to `body.7`, and have
those of light adapters in `body.LEVEL.body`. The shapes say what network it is.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minisd import files
from minisd.formats import diffusers, parts
from minisd.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from minisd.models.unet import UNetConfig
from minisd.options import require

CONTROL = "T2I-Adapter"
PREFIX = "adapter."
BLOCK = re.compile(r"(?:adapter\.)?body\.(\d+)\.(?:body\.|resnets\.)?(?:\d+\.)?block1\.weight")


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return any(BLOCK.fullmatch(name) for name in tensors)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the weights in the folder of one network."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        path = path / diffusers.choose({"t2i_adapter": names}, None, path)["t2i_adapter"][0]
    return {} if path.suffix == ".json" else files.read(path)  # an index, of several files


def load(tensors: Mapping[str, Tensor], unet: UNetConfig, downscale: int, source: str | Path) -> T2IAdapter:
    """The network for a UNet of this config, whose latents are `downscale` times smaller than its images.
    ValueError, naming the source, if it is for another."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    light, levels = "conv_in.weight" not in tensors, len(unet.block_out_channels)
    layers = sum(name.endswith(".block1.weight") for name in tensors) // levels
    first = tensors.get("body.0.in_conv.weight" if light else "conv_in.weight")
    require(first is not None and first.ndim == 4, f"{source}: a T2I-Adapter without its first convolution")
    count = first.shape[1]  # hint_channels * downscale^2
    hint_channels = 3 if count % 3 == 0 else 1
    scale = math.isqrt(count // hint_channels)
    problem = f"a T2I-Adapter for latents {scale} times smaller than the image, and here they are {downscale}"
    require(scale == downscale, f"{source}: {problem} times smaller")
    if not any(".resnets." in name for name in tensors):
        tensors = {_of_diffusers(name, light, max(layers, 1)): tensor for name, tensor in tensors.items()}
    config = T2IAdapterConfig(
        channels=unet.block_out_channels, layers_per_block=layers, hint_channels=hint_channels,
        downscale=downscale, light=light,
    )  # fmt: skip
    network = parts.on_meta(lambda: T2IAdapter(config), f"{source}: not the layout of a T2I-Adapter")
    return parts.fill(network, tensors, source)


def _of_diffusers(name: str, light: bool, layers: int) -> str:
    """The name that diffusers has for a tensor of the authors' file."""
    if light:
        return re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name)
    if not (match := re.fullmatch(r"body\.(\d+)\.(in_conv|block\d)\.(weight|bias)", name)):
        return name
    level, row = divmod(int(match[1]), layers)
    place = "" if match[2] == "in_conv" else f"resnets.{row}."
    return f"body.{level}.{place}{match[2]}.{match[3]}"
