"""Custom Diffusion: trained projections in cross-attention (Kumari et al. 2022, arXiv 2212.04488).

A file has the whole trained matrices, as diffusers writes them:
`down_blocks.0. ... .attn2.processor.to_k_custom_diffusion.weight`, and an empty tensor for each attention
without any, `down_blocks.0. ... .attn1.processor`. Two formats of the authors are read, too:
{"unet": {"down_blocks.0. ... .attn2.to_k.weight": ...}, "modifier_token": {"<new1>": (d,)}}, whose matrices
may be {"u": ..., "v": ...} with u v as the change; and their CompVis branch's, whose tokens are in "embed".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters import lora, token_embedding
from minisd.adapters._adapter import Adapter
from minisd.formats import lora_names
from minisd.models.unet import UNet

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

KEYS_AND_VALUES = ("to_k", "to_v")
ALL = (*KEYS_AND_VALUES, "to_q", "to_out.0")
ENDINGS = {".weight": "weight", ".bias": "bias", ".weight.u": "u", ".weight.v": "v"}  # -> kind of tensor
WORDS, EMBED = "modifier_token.", "embed"


class CustomLinear(nn.Linear):
    """A projection that keeps its base weights beside the trained ones, `custom` and `custom_bias` in fp32.

    Keys and values get no gradient from the first token, which is the same in every prompt.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.custom_bias is None else self.custom_bias.to(self.weight.dtype)
        y = F.linear(x, self.custom.to(self.weight.dtype), bias)  # (b, s, d)
        if self.first_token or not torch.is_grad_enabled():
            return y
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)


def insert(unet: UNet, projections: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Make these projections of every cross-attention trainable; return their parameters, by their names in
    the file. A projection keeps its name and its tensors: only its class changes."""
    parameters = {}
    for name, attention in unet.named_modules():
        for projection in projections if name.endswith(".attn2") else ():
            layer, key = attention.get_submodule(projection), stem(f"{name}.{projection}")
            layer.__class__, layer.first_token = CustomLinear, projection not in KEYS_AND_VALUES
            parameters[f"{key}.weight"] = layer.custom = _trainable(layer.weight)
            layer.custom_bias = None
            if layer.bias is not None:
                parameters[f"{key}.bias"] = layer.custom_bias = _trainable(layer.bias)
    return parameters


def _trainable(base: Tensor) -> nn.Parameter:
    return nn.Parameter(base.detach().float().clone())


def stem(name: str) -> str:
    """Return what the file's names for a projection begin with."""
    return re.sub(r"\.attn2\.(\w+)", r".attn2.processor.\1_custom_diffusion", name)


def save(path: Path, unet: UNet, parameters: dict[str, nn.Parameter], metadata: dict[str, str]) -> None:
    """Write the trained matrices, as a .safetensors or .bin file that diffusers' `load_attn_procs` reads."""
    tensors = {name: p.detach().cpu() for name, p in parameters.items()}
    trained = {name.rpartition("_custom_diffusion")[0].rpartition(".")[0] for name in tensors}
    for name, _ in unet.named_modules():
        # diffusers needs an entry for every attention, which is empty where nothing was trained.
        if name.endswith((".attn1", ".attn2")) and f"{name}.processor" not in trained:
            tensors[f"{name}.processor"] = torch.empty(0)
    if path.suffix == files.SAFETENSORS:
        files.write(path, tensors, metadata)
    else:
        files.write_pickle(path, tensors)


# --- Reading ---------------------------------------------------------------------------------------------


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return any("_custom_diffusion." in name or name.startswith(WORDS) for name in tensors) or all(
        lora_names.split(name, ENDINGS)[0].partition(".attn2.")[2] in ALL or name == EMBED for name in tensors
    )


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> Adapter:
    """Return the differences between the file's projections and the model's, and the file's tokens."""
    rows = {name.removeprefix(WORDS): t for name, t in tensors.items() if name.startswith(WORDS)}
    rows |= {f"<new{i}>": row for i, row in enumerate(tensors.get(EMBED, ()), 1)}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(WORDS) and n != EMBED and t.numel()}
    names = [f"unet.{name}" for name in lora.layers(sd.unet) if ".attn2." in name]
    stems = {stem(name.removeprefix("unet.")): name for name in names}
    stems |= lora_names.table(names, sd.unet.config)
    groups = lora_names.group(tensors, stems, source, ENDINGS) if tensors else {}
    updates = lora.make_updates(sd, groups, partial(_update, sd), source)
    tokens = token_embedding.read(sd, rows, metadata, source)
    description = f"Custom Diffusion of {len(updates)} projections" if updates else ""
    description = ", ".join(filter(None, [description, tokens.description]))
    return replace(tokens, description=description, updates=updates)


def _update(sd: StableDiffusion, name: str, t: dict[str, Tensor], weight: Tensor) -> lora.FullDelta:
    """Return the change to a layer's trained weight, which may be stored as u v, and to its trained bias."""

    def change(kind: str) -> Tensor:
        base = lora.base(sd, name, kind)
        if base is None or base.shape != t[kind].shape:
            raise RuntimeError(f"another shape of the {kind}")
        return t[kind] - base

    delta = change("weight") if "weight" in t else t["u"] @ t["v"]
    if delta.shape != weight.shape:
        raise RuntimeError("another shape of the product")
    return lora.FullDelta(delta, change("bias") if "bias" in t else None)
