"""Custom Diffusion: trained projections in cross-attention (Kumari et al. 2022, arXiv 2212.04488).

The file has the whole trained matrices, as diffusers writes them:
`down_blocks.0. ... .attn2.processor.to_k_custom_diffusion.weight`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.adapters._adapter import Adapter
from minisd.adapters.lora import FullDelta
from minisd.models.unet import UNet
from minisd.weights import files

KEYS_AND_VALUES = ("to_k", "to_v")
ALL = (*KEYS_AND_VALUES, "to_q", "to_out.0")
NAME = re.compile(r"(.+\.attn2)\.processor\.(to_[a-z]+)_custom_diffusion(\.0)?\.(weight|bias)")


class CustomLinear(nn.Linear):
    """A projection with its base weights kept beside the trained ones, `custom` and `custom_bias`, in fp32.

    No gradient comes from the first of the tokens that keys and values are made of: it is the same in every
    prompt.
    """

    @classmethod
    def of(cls, base: nn.Linear, *, first_token: bool) -> CustomLinear:
        self = cls(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.first_token = base.weight, base.bias, first_token
        self.custom = nn.Parameter(base.weight.detach().float().clone())
        self.custom_bias = None
        if base.bias is not None:
            self.custom_bias = nn.Parameter(base.bias.detach().float().clone())
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.custom_bias is None else self.custom_bias.to(self.weight.dtype)
        y = F.linear(x, self.custom.to(self.weight.dtype), bias)  # (b, s, d)
        if self.first_token or not torch.is_grad_enabled():
            return y
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)


def insert(unet: UNet, projections: tuple[str, ...]) -> dict[str, CustomLinear]:
    """Replace these projections of every cross-attention; returns the new ones by name."""
    inserted = {}
    for name, module in list(unet.named_modules()):
        if name.endswith(".attn2"):
            for projection in projections:
                base = module.get_submodule(projection)
                layer = CustomLinear.of(base, first_token=projection not in KEYS_AND_VALUES)
                module.set_submodule(projection, layer)
                inserted[f"{name}.{projection}"] = layer
    return inserted


def parameters(layers: dict[str, CustomLinear]) -> dict[str, nn.Parameter]:
    """The trained parameters by the names of the file."""
    found = {}
    for name, layer in layers.items():
        attention, _, projection = name.partition(".attn2.")
        projection, _, index = projection.partition(".")
        base = f"{attention}.attn2.processor.{projection}_custom_diffusion" + (f".{index}" if index else "")
        found[f"{base}.weight"] = layer.custom
        if layer.custom_bias is not None:
            found[f"{base}.bias"] = layer.custom_bias
    return found


def save(path: Path, unet: UNet, layers: dict[str, CustomLinear], metadata: dict[str, str]) -> None:
    """Write the trained matrices; a .bin is what diffusers' `load_attn_procs` takes."""
    tensors = {name: p.detach().cpu() for name, p in parameters(layers).items()}
    if path.suffix == files.SAFETENSORS:
        files.write(path, tensors, metadata)
    else:
        # Its reader wants an entry for every attention of the UNet, empty where nothing was trained, which a
        # .safetensors file cannot hold.
        processors = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
        trained = {name.rpartition("_custom_diffusion")[0].rpartition(".")[0] for name in tensors}
        empty = {f"{name}.processor": {} for name in processors if f"{name}.processor" not in trained}
        files.write_pickle(path, tensors | empty)


def matches(tensors: dict[str, Tensor]) -> bool:
    return any("_custom_diffusion." in name for name in tensors)


def read(sd, tensors: dict[str, Tensor], source: Path) -> Adapter:
    """What moves the model's projections to those in the file: at a scale of 1 all the way."""
    if unknown := [name for name in tensors if not NAME.fullmatch(name)]:
        raise ValueError(f"{source}: {len(unknown)} names are not Custom Diffusion's, such as {unknown[0]}")
    deltas: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        attention, projection, index, kind = NAME.fullmatch(name).groups()
        path = f"{attention}.{projection}{index or ''}"
        try:
            base = getattr(sd.unet.get_submodule(path), kind)
        except AttributeError:
            raise ValueError(f"{source}: {name} has no place in this model") from None
        if base is None or base.shape != tensor.shape:
            shape = None if base is None else tuple(base.shape)
            raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, this model's is {shape}")
        delta = tensor.to(base.device).float() - base.detach().float()
        deltas.setdefault(f"unet.{path}", {})[kind] = delta
    if bare := [layer for layer, t in deltas.items() if "weight" not in t]:
        raise ValueError(f"{source}: has a bias of {bare[0]}, and no weight")
    updates = {layer: FullDelta(t["weight"], t.get("bias")) for layer, t in deltas.items()}
    return Adapter(about=f"Custom Diffusion of {len(updates)} projections", updates=updates)
