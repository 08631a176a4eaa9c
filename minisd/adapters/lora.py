"""LoRA: low-rank updates beside frozen layers (Hu et al. 2021, arXiv 2106.09685).

y = W x + scale * alpha / rank * B (A x). A layer may have several updates, each with a scale of its own; they
add up. Files' names for modules are in formats/lora_names.py; here a module's name is its path in
`networks(sd)`, such as `unet.conv_in`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters import _lycoris, token_embedding
from minisd.adapters._adapter import NETWORK_NAMES, Adapter
from minisd.formats import lora_names
from minisd.models.layers import conv1x1, conv3x3

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

# Named groups of layers, as ends of module names.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "projections": ("proj_in", "proj_out"),
    "resnet": (
        "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    ),
}  # fmt: skip


# --- Updates ---------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """One update of a layer with weight (c_out, c_in, ...): A (r, c_in, ...) and B (c_out, r, ...), always in
    fp32. `dropout` acts on the input, and only while gradients are recorded."""

    lora_bias = None

    def __init__(self, a: Tensor, b: Tensor, alpha: float, *, dropout: float = 0.0):
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.alpha = alpha
        self.dropout = dropout
        self.scale = 1.0

    @classmethod
    def new(cls, weight: Tensor, rank: int, alpha: float, dropout: float) -> LowRank:
        """Return an update that changes nothing yet: A ~ N(0, 1 / rank^2) and B = 0."""
        a = torch.randn(rank, *weight.shape[1:]) / rank
        b = torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2))
        return cls(a.to(weight.device), b.to(weight.device), alpha, dropout=dropout)

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def factor(self) -> float:
        return self.scale * self.alpha / self.rank

    def forward(self, layer: UpdatedLinear | UpdatedConv2d, x: Tensor) -> Tensor:
        if self.dropout:
            # `self.training` is not used: frozen networks are always in evaluation mode.
            x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        h = layer.apply_weight(x, self.lora_A.to(x.dtype))  # (b, n, r) or (b, r, h, w)
        if self.factor != 1:
            h = h * self.factor
        b = self.lora_B.to(x.dtype)
        return F.linear(h, b) if b.ndim == 2 else conv1x1(h, b)

    def delta(self) -> Tensor:
        """Return the change of the weight, in fp32."""
        return self.factor * _lycoris.product(self.lora_B.detach(), self.lora_A.detach())


class FullDelta(nn.Module):
    """One update as a whole matrix (c_out, c_in, ...), with an optional bias (c_out,): LoHa, LoKr and DoRA,
    multiplied out, and Custom Diffusion's projections."""

    def __init__(self, delta: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("lora_delta", delta)
        self.register_buffer("lora_bias", bias)
        self.scale = 1.0

    def forward(self, layer: UpdatedLinear | UpdatedConv2d, x: Tensor) -> Tensor:
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype)
        y = layer.apply_weight(x, self.lora_delta.to(x.dtype), bias)
        return y if self.scale == 1 else y * self.scale

    def delta(self) -> Tensor:
        """Return the change of the weight, in fp32."""
        return self.scale * self.lora_delta


class Updated(nn.Module):
    """A layer with `updates` beside its weights. `put` makes it by changing a layer's class, so that the
    layer's name, tensors and hooks stay."""

    updates: nn.ModuleList

    @property
    def idle(self) -> bool:
        """Whether no update has an effect, so that the layer computes the same as without them."""
        return not any(update.scale for update in self.updates)

    def forward(self, x: Tensor) -> Tensor:
        y = self.apply_weight(x, self.weight, self.bias)
        for update in self.updates:
            if update.scale:  # at scale 0 the output is the plain layer's, to the bit
                y = y + update(self, x)
        return y


class UpdatedLinear(Updated, nn.Linear):
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class UpdatedConv2d(Updated, nn.Conv2d):
    """A convolution with updates: A has the layer's kernel size, stride and padding, and B is 1x1."""

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kernel_size == (1, 1):
            return conv1x1(x, weight, bias)
        if self.kernel_size == (3, 3) and self.stride == (1, 1):
            return conv3x3(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


# --- Putting updates into a network ----------------------------------------------------------------------


def networks(sd: StableDiffusion) -> nn.ModuleDict:
    """Return the networks that a LoRA may change, in a module whose paths are the native names."""
    return nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder})


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return all layers that can have updates, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def put(module: nn.Module, updates: Mapping[str, nn.Module]) -> None:
    """Add an update to each of the named layers."""
    for name, update in updates.items():
        layer = module.get_submodule(name)
        if not hasattr(layer, "updates"):
            kind = UpdatedLinear if isinstance(layer, nn.Linear) else UpdatedConv2d
            layer.__class__ = getattr(update, "layer_class", kind)
            layer.updates = nn.ModuleList()
        layer.updates.append(update)


def insert(
    module: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, LowRank]:
    """Add a new update to every layer that a target means, and return the updates by layer. A target is a key
    of TARGETS, or the end of a module's name. ValueError, naming the flag, if a target means no layer."""
    known = layers(module)
    updates: dict[str, LowRank] = {}
    for target in targets:
        ends = TARGETS.get(target, (target,))
        names = [n for n in known if any(f".{n}".endswith(f".{end}") for end in ends)]
        if not names:
            raise ValueError(
                f"--target_modules {target!r} means no layer; it is one of {', '.join(TARGETS)}, or the end "
                "of a name such as attn2.to_k"
            )
        for n in names:
            if n not in updates:
                updates[n] = LowRank.new(known[n].weight, rank, alpha, dropout)
    put(module, updates)
    return updates


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a network's state without its updates."""
    return {n: t for n, t in module.state_dict().items() if ".updates." not in f".{n}"}


def merged(
    module: nn.Module, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a network's state (`tensors`, or its own) with its updates added to the weights: in fp32, then
    rounded once, to `dtype` or to the weight's dtype."""
    tensors = dict(own_state(module) if tensors is None else tensors)
    for name, layer in module.named_modules():
        active = [update for update in layer.updates if update.scale] if isinstance(layer, Updated) else []
        biases = [update.scale * update.lora_bias for update in active if update.lora_bias is not None]
        for kind, deltas in (("weight", [update.delta() for update in active]), ("bias", biases)):
            if deltas:
                key = f"{name}.{kind}".lstrip(".")
                base = tensors[key]
                tensors[key] = (base.float() + sum(deltas).to(base.device)).to(dtype or base.dtype)
    return tensors


# --- Files -----------------------------------------------------------------------------------------------


def state_dict(updates: Mapping[str, LowRank], form: str = "diffusers") -> tuple[dict, dict[str, str]]:
    """Return the tensors, in fp32, and the metadata of a file of a format: a key of `lora_names.WRITERS`."""
    factors = {
        name: (u.lora_A.detach().float(), u.lora_B.detach().float(), u.alpha) for name, u in updates.items()
    }
    return lora_names.WRITERS[form](factors)


def save(
    path: Path, updates: Mapping[str, LowRank], form: str = "diffusers", about: dict[str, str] | None = None
) -> None:
    """Write the updates to a file of a format, with `about` added to its metadata."""
    tensors, metadata = state_dict(updates, form)
    files.write(path, tensors, metadata | (about or {}))


def matches(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors are those of a LoRA or a relative, supported or not. Their keys have dots;
    a key without dots may be a token such as <flora>."""
    marks = ("lora", "lycoris", "hada_", "lokr_", "oft_")
    return any(mark in key for key in tensors if "." in key for mark in marks)


def load(sd: StableDiffusion, path: Path, dropout: float = 0.0) -> dict[str, LowRank]:
    """Add a file's updates to the model, to train them further; they are still frozen. ValueError, naming the
    file, if an update is not a product of two low-rank factors."""
    updates = read(sd, *files.read_with_metadata(path), path).updates
    for name, update in updates.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"{path}: only a plain LoRA can be trained further; its update of {name} is not")
        update.dropout = dropout
    put(networks(sd), updates)
    return updates


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> Adapter:
    """Return the updates and tokens in a file of any LoRA format. ValueError, naming the file, if it is for
    another model, has unknown keys, or lacks a part of an update."""
    lora_names.refuse_others(tensors, sd.unet.config.cross_attention_dim, source)
    bundled = {key: t for key, t in tensors.items() if key.startswith(token_embedding.BUNDLE)}
    tokens = token_embedding.read(sd, bundled, metadata, source)
    tensors = {key: t for key, t in tensors.items() if key not in bundled}
    stems = lora_names.table(layers(networks(sd)), sd.unet.config)
    groups = lora_names.group(tensors, stems, source)
    alpha = lora_names.alphas(metadata, source)
    updates = make_updates(sd, groups, partial(_update, alpha), source)
    description = ", ".join(filter(None, [describe(updates), tokens.description]))
    return replace(tokens, description=description, updates=updates)


def make_updates(
    sd: StableDiffusion, groups: Mapping[str, dict[str, Tensor]], make: Callable[..., nn.Module], source: Path
) -> dict[str, nn.Module]:
    """Return the update `make(name, tensors by kind, weight)` of each layer in `groups`, in fp32. ValueError,
    naming the file and the layer, if a tensor is missing (KeyError in `make`) or does not fit."""
    updates = {}
    for name, t in groups.items():
        weight = base(sd, name)
        t = {kind: tensor.to(weight) for kind, tensor in t.items()}
        try:
            updates[name] = make(name, t, weight).requires_grad_(False)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else "does not fit this model"
            shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in t.items())
            raise ValueError(
                f"{source}: its update of {name} {tuple(weight.shape)} {reason}: {shapes or 'alpha alone'}"
            ) from None
    return updates


def base(sd: StableDiffusion, name: str, kind: str = "weight") -> Tensor | None:
    """Return a layer's weight, or its bias if it has one, in fp32, without updates."""
    part, _, path = name.partition(".")
    tensor = getattr(sd.parts[part].get_submodule(path), kind)
    if tensor is None:
        return None
    return sd.exact(part, f"{path}.{kind}", tensor.detach()).to(tensor.device, torch.float32)


def _update(alpha: lora_names.Alpha, name: str, t: dict[str, Tensor], weight: Tensor) -> LowRank | FullDelta:
    """Return a layer's update in a LoRA or a relative: two thin factors, or else a whole matrix."""
    alpha = partial(alpha, name, t.pop("alpha", None))
    if any(kind.startswith(("hada_", "lokr_", "dora_", "magnitude")) for kind in t):
        return FullDelta(_lycoris.delta(t, weight, alpha))
    down, up = _lycoris.inner_factor(t), t["up"]
    rank = len(up[0])
    # A file may store 1x1 convolutions as linear layers, and the other way round: the shape is the layer's.
    a = down.reshape(rank, *weight.shape[1:])  # (r, c_in, ...)
    b = up.reshape(len(weight), rank, *[1] * (weight.ndim - 2))  # (c_out, r, ...)
    return LowRank(a.contiguous(), b.contiguous(), alpha(rank))


def describe(updates: Mapping[str, nn.Module]) -> str:
    """Return a line with the ranks, and the number of updated modules in each network."""
    counts = Counter(name.partition(".")[0] for name in updates)
    ranks = sorted({u.rank for u in updates.values() if isinstance(u, LowRank)})
    kind = f"LoRA of rank {', '.join(map(str, ranks))}" if ranks else "LoHa, LoKr or DoRA, multiplied out,"
    where = [f"{counts[part]} modules of the {NETWORK_NAMES[part]}" for part in sorted(counts, reverse=True)]
    return f"{kind} on {' and '.join(where)}"
