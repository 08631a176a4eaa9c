"""ControlNets: read from a folder, a single file or the hub.

A ControlNet needs a conditioning image, so it is not attached: sampling takes it together with that image.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minisd import files
from minisd.formats import diffusers, hub, single_file
from minisd.models.controlnet import ControlNet
from minisd.models.layers import move
from minisd.models.unet import UNetConfig

CONTROL = "ControlNet"


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(single_file.CONTROLNET_NAMES) for name in tensors)


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> ControlNet:
    """Load a ControlNet, frozen, from a folder in the diffusers layout, or its file of weights, to which the
    config.json beside it belongs; from a single file; or from the hub by its id.

    ValueError, naming the file, if there is none, or if it is not for SD v1.x.
    """
    path = hub.resolve(path, cache_dir=cache_dir)
    if path.is_dir():
        network = diffusers.load_part(path, "controlnet")
    elif any(name.startswith("controlnet_") for name in files.read(path)):  # of such a folder
        network = diffusers.load_part(path.parent, "controlnet", path.name)
    else:
        network = single_file.load_controlnet(path)
    return move(network, device, dtype).eval().requires_grad_(False)


def check(network: ControlNet, unet: UNetConfig, path: str | Path) -> None:
    """Raise a ValueError, naming the path, if the network does not fit a UNet of this config."""
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
        theirs, ours = getattr(network.config, name), getattr(unet, name)
        if theirs != ours:
            raise ValueError(f"{path}: a ControlNet with {name} {theirs}; the model has {ours}")
    if network.config.in_channels > unet.in_channels:
        raise ValueError(f"{path}: a ControlNet for a model with {network.config.in_channels} channels")
