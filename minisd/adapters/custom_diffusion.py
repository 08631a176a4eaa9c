"""Custom Diffusion: trained projections in cross-attention (Kumari et al. 2022, arXiv 2212.04488).

The file has the whole trained matrices, as diffusers writes them:
`down_blocks.0. ... .attn2.processor.to_k_custom_diffusion.weight`. The authors' own are read too: {"unet":
{"down_blocks.0. ... .attn2.to_k.weight": ...}, "modifier_token": {"<new1>": (d,)}}, whose matrices may be
{"u": ..., "v": ...} with u v the change; and those of their CompVis branch, with the words' rows in "embed".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters import lora, token_embedding
from minisd.formats import single_file
from minisd.models.unet import UNet

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

KEYS_AND_VALUES = ("to_k", "to_v")
ALL = (*KEYS_AND_VALUES, "to_q", "to_out.0")
KIND = re.compile(r"(?s)(.*?)\.?(weight\.[uv]|weight|bias|)")
DELTA = re.compile(r"\.attn2\.to_(q|k|v|out\.0)\.(weight|bias)(\.[uv])?$")
WORDS, EMBED = "modifier_token.", "embed"


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


def stem(name: str) -> str:
    """The beginning of the file's names for a projection."""
    attention, _, projection = name.partition(".attn2.")
    projection, _, index = projection.partition(".")
    return f"{attention}.attn2.processor.{projection}_custom_diffusion" + (f".{index}" if index else "")


def parameters(layers: dict[str, CustomLinear]) -> dict[str, nn.Parameter]:
    """The trained parameters by the names of the file."""
    found = {}
    for name, layer in layers.items():
        found[f"{stem(name)}.weight"] = layer.custom
        if layer.custom_bias is not None:
            found[f"{stem(name)}.bias"] = layer.custom_bias
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


# --- Reading ---------------------------------------------------------------------------------------------


def matches(tensors: dict[str, Tensor]) -> bool:
    return any("_custom_diffusion." in name or name.startswith(WORDS) for name in tensors) or all(
        DELTA.search(name) or name == EMBED for name in tensors
    )


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> lora.LayerUpdates:
    """What moves the model's projections to those in the file, at a scale of 1 all the way; and its words."""
    table = {}
    modules = single_file.unet_modules(sd.unet.config)
    for name in lora.layers(sd.unet):
        if ".attn2." in name:
            theirs = single_file.rename(f"{name}.weight", modules).removesuffix(".weight")
            stems = (stem(name), f"unet.{name}", single_file.PREFIXES["unet"] + theirs)
            table |= dict.fromkeys(stems, f"unet.{name}")
    groups: dict[
        str, dict[str, Tensor]
    ] = {}  # layer -> weight and bias, or the factors of the weight's change
    words, unknown = {}, []
    for name, tensor in tensors.items():
        beginning, kind = KIND.fullmatch(name).groups()
        if layer := table.get(beginning):
            groups.setdefault(layer, {})[kind] = tensor
        elif name.startswith(WORDS):
            words[name.removeprefix(WORDS)] = tensor
        elif name == EMBED:
            words |= {f"<new{i}>": row for i, row in enumerate(tensor, 1)}
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} of its {len(tensors)} names have no place in Custom Diffusion of this "
            f"model, such as {unknown[0]}"
        )
    updates = {layer: _update(sd, layer, t, source) for layer, t in groups.items()}
    tokens = token_embedding.read(sd, words, metadata, source)
    description = f"Custom Diffusion of {len(updates)} projections" if updates else ""
    return lora.LayerUpdates.of(description, updates, tokens)


def _update(sd: StableDiffusion, layer: str, t: dict[str, Tensor], source: Path) -> lora.FullDelta:
    """Of the tensors of one layer: its new weight, or `u` and `v` whose product is the weight's change."""
    base = lora.base(sd, layer)
    changes = {}
    for kind in ("weight", "bias"):
        if kind in t:
            old = base if kind == "weight" else lora.base(sd, layer, "bias")
            if old is None or old.shape != t[kind].shape:
                shape = None if old is None else tuple(old.shape)
                raise ValueError(
                    f"{source}: its {kind} of {layer} is {tuple(t[kind].shape)}, this model's is {shape}"
                )
            changes[kind] = t[kind].to(old) - old
    if t.keys() == {"weight.u", "weight.v"}:
        u, v = (t[f"weight.{k}"].to(base) for k in "uv")
        if (len(u), *v.shape[1:]) == base.shape and u.shape[1:] == v.shape[:1]:
            changes["weight"] = u @ v
    if "weight" not in changes:
        shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in t.items())
        raise ValueError(f"{source}: {shapes} is no change of {layer} {tuple(base.shape)}")
    return lora.FullDelta(changes["weight"], changes.get("bias"))
