"""LoRA: low-rank updates beside frozen layers (Hu et al. 2021, arXiv 2106.09685).

y = W x + scale * alpha / rank * B (A x). A layer may carry several updates, each with a scale of its own:
they add. The names of files are in formats/lora_names.py; a module's name here is its path in `networks(sd)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters import _lycoris, token_embedding
from minisd.adapters._adapter import network_name
from minisd.formats import lora_names
from minisd.models.layers import conv1x1

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

# Ends of module names, by the groups that have a name of their own.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "projections": ("proj_in", "proj_out"),
    "resnet": (
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
    ),
}


# --- Modules ---------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """One update of a layer with weight (c_out, c_in, ...): A (r, c_in, ...) and B (c_out, r, ...), in fp32
    whatever the layer is in. `dropout` is on the input, and only where gradients are wanted."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float, *, dropout: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.alpha = alpha
        self.dropout = dropout
        self.scale = scale

    @classmethod
    def new(cls, weight: Tensor, rank: int, alpha: float, dropout: float) -> LowRank:
        """A ~ N(0, 1 / rank^2) and B = 0: an update that changes nothing yet."""
        a = torch.randn(rank, *weight.shape[1:]) / rank
        b = torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2))
        return cls(a.to(weight.device), b.to(weight.device), alpha, dropout=dropout)

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def factor(self) -> float:
        return self.scale * self.alpha / self.rank

    def forward(self, layer: LoRALinear | LoRAConv2d, x: Tensor) -> Tensor:
        if self.dropout:
            # Not self.training: frozen networks are always in evaluation mode.
            x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        h = layer.apply_weight(x, self.lora_A.to(x.dtype))  # (b, n, r) or (b, r, h, w)
        if self.factor != 1:
            h = h * self.factor
        b = self.lora_B.to(x.dtype)
        return F.linear(h, b) if b.ndim == 2 else conv1x1(h, b)

    def delta(self) -> Tensor:
        """What it adds to the weight, in fp32."""
        return self.factor * _lycoris.product(self.lora_B.detach(), self.lora_A.detach())


class FullDelta(nn.Module):
    """An update that is a whole matrix (c_out, c_in, ...), and may have a bias (c_out,): LoHa, LoKr and DoRA,
    multiplied out, and Custom Diffusion."""

    def __init__(self, delta: Tensor, bias: Tensor | None = None, *, scale: float = 1.0):
        super().__init__()
        self.register_buffer("lora_delta", delta)
        self.register_buffer("lora_bias", bias)
        self.scale = scale

    @property
    def factor(self) -> float:
        return self.scale

    def forward(self, layer: LoRALinear | LoRAConv2d, x: Tensor) -> Tensor:
        bias = None if self.lora_bias is None else self.lora_bias.to(x.dtype)
        y = layer.apply_weight(x, self.lora_delta.to(x.dtype), bias)
        return y if self.scale == 1 else y * self.scale

    def delta(self) -> Tensor:
        return self.scale * self.lora_delta


class LoRALinear(nn.Linear):
    """The layer as it was, and its updates."""

    @classmethod
    def of(cls, layer: nn.Linear) -> LoRALinear:
        self = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        return _take(self, layer)

    @property
    def idle(self) -> bool:
        """Whether it is the layer as it was: no update counts."""
        return not any(update.factor for update in self.updates)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return _add_updates(self, x, super().forward(x))


class LoRAConv2d(nn.Conv2d):
    """The layer as it was, and its updates: A has its kernel, stride and padding, B is 1x1."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> LoRAConv2d:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return _take(cls(*shape, **where, bias=layer.bias is not None, device="meta"), layer)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kernel_size == (1, 1):
            return conv1x1(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return _add_updates(self, x, self.apply_weight(x, self.weight, self.bias))


def _take(new, layer):
    new.weight, new.bias, new.updates = layer.weight, layer.bias, nn.ModuleList()
    return new.train(layer.training)


def _add_updates(layer: LoRALinear | LoRAConv2d, x: Tensor, y: Tensor) -> Tensor:
    for update in layer.updates:
        if update.factor:  # at scale 0 the layer is what it was, to the bit
            y = y + update(layer, x)
    return y


@dataclass(kw_only=True)
class LayerUpdates(token_embedding.Tokens):
    """Updates of layers, and the new tokens that came with them."""

    updates: dict[str, nn.Module]  # native name of a layer -> LowRank or FullDelta

    @classmethod
    def of(
        cls, description: str, updates: dict[str, nn.Module], tokens: token_embedding.Tokens
    ) -> LayerUpdates:
        """`description` is that of the updates, empty if there are none."""
        description = ", ".join(filter(None, [description, tokens.description]))
        return cls(description=description, tokens=tokens.tokens, updates=updates)

    @property
    def parts(self) -> set[str]:
        return {name.partition(".")[0] for name in self.updates}

    def put(self, sd: StableDiffusion) -> None:
        super().put(sd)
        put(networks(sd), self.updates)

    def set_scales(self, scales: Mapping[str, float]) -> None:
        for name, update in self.updates.items():
            update.scale = scales[name.partition(".")[0]]


# --- Putting updates into a network ----------------------------------------------------------------------


def networks(sd: StableDiffusion) -> nn.ModuleDict:
    """What a LoRA may change, under the names that a module's native name begins with."""
    return nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder})


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that can carry an update, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def put(module: nn.Module, updates: Mapping[str, nn.Module]) -> None:
    """Add an update to each of the named layers."""
    for name, update in updates.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, LoRALinear | LoRAConv2d):
            layer = (LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d).of(layer)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer)
        layer.updates.append(update)


def insert(
    module: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, LowRank]:
    """Give every layer that a target means a new update; returns these by the layers' names. A target is a
    key of TARGETS, or the end of a module's name. ValueError naming --target if it means none."""
    found = layers(module)
    chosen: dict[str, LowRank] = {}
    for target in targets:
        ends = TARGETS.get(target, (target,))
        names = [n for n in found if any(f".{n}".endswith(f".{end}") for end in ends)]
        if not names:
            raise ValueError(
                f"--target {target!r} means no layer; it is one of {', '.join(TARGETS)}, or the end of a "
                "name such as attn2.to_k"
            )
        for n in names:
            if n not in chosen:
                chosen[n] = LowRank.new(found[n].weight, rank, alpha, dropout)
    put(module, chosen)
    return chosen


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network without its updates."""
    return {n: t for n, t in module.state_dict().items() if ".updates." not in f".{n}"}


def merged(
    module: nn.Module, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state of a network (`tensors`, or its own) as if its updates had been part of the weights: added in
    fp32, rounded once, to `dtype` or to what each tensor is in."""
    tensors = dict(own_state(module) if tensors is None else tensors)
    for name, layer in layers(module).items():
        active = [update for update in getattr(layer, "updates", ()) if update.factor]
        biases = [u.scale * u.lora_bias for u in active if getattr(u, "lora_bias", None) is not None]
        for kind, deltas in (("weight", [update.delta() for update in active]), ("bias", biases)):
            if deltas:
                own = f"{name}.{kind}".lstrip(".")
                base = tensors[own]
                tensors[own] = (base.float() + sum(deltas).to(base.device)).to(dtype or base.dtype)
    return {n: t.to(dtype) for n, t in tensors.items()} if dtype else tensors


# --- Files -----------------------------------------------------------------------------------------------


def state_dict(updates: Mapping[str, LowRank], form: str = "diffusers") -> tuple[dict, dict[str, str]]:
    """Tensors in fp32, and metadata, by the names of a form: `diffusers` or `kohya`."""
    factors = {
        name: (u.lora_A.detach().float(), u.lora_B.detach().float(), u.alpha) for name, u in updates.items()
    }
    return lora_names.WRITERS[form](factors)


def save(
    path: Path,
    updates: Mapping[str, LowRank],
    form: str = "diffusers",
    about: Mapping[str, str] | None = None,
) -> None:
    tensors, metadata = state_dict(updates, form)
    files.write(path, tensors, metadata | dict(about or {}))


def matches(tensors: dict[str, Tensor]) -> bool:
    return lora_names.is_lora(tensors)


def load(sd: StableDiffusion, path: Path, dropout: float = 0.0) -> dict[str, LowRank]:
    """Put the updates in a file into the model, to train on; they are still frozen. ValueError, naming the
    file, if one of them is not a product of two low-rank factors."""
    updates = read(sd, files.read(path), files.metadata(path), path).updates
    for name, update in updates.items():
        if not isinstance(update, LowRank):
            raise ValueError(f"{path}: its update of {name} is no plain LoRA, which alone can be trained on")
        update.requires_grad_(False).dropout = dropout
    put(networks(sd), updates)
    return updates


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> LayerUpdates:
    """The updates in a file of any format, by the names of their layers. ValueError, naming the file and the
    keys, if one of them is unknown, incomplete, or for another model."""
    lora_names.refuse_others(tensors, sd.unet.config.cross_attention_dim, source)
    bundled = {key: t for key, t in tensors.items() if key.startswith(token_embedding.BUNDLE)}
    tokens = token_embedding.read(sd, bundled, metadata, source)
    known = layers(networks(sd))
    tensors = {key: t for key, t in tensors.items() if key not in bundled}
    groups = lora_names.group(tensors, lora_names.table(known, sd.unet.config), source)
    alpha = lora_names.alphas(metadata, source)
    updates = {}
    for name, t in groups.items():
        weight = known[name].weight
        t = {kind: tensor.to(weight.device, torch.float32) for kind, tensor in t.items()}
        alpha_of = partial(alpha, name, t.pop("alpha", None))
        try:
            updates[name] = _update(t, alpha_of, weight, base(sd, name)).requires_grad_(False)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else "does not fit this model"
            shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in t.items())
            raise ValueError(
                f"{source}: its update of {name} {tuple(weight.shape)} {reason}: {shapes or 'alpha alone'}"
            ) from None
    return LayerUpdates.of(describe(updates), updates, tokens)


def base(sd: StableDiffusion, name: str, kind: str = "weight") -> Tensor | None:
    """A layer's weight, or its bias if it has one, in fp32, without what is added to it."""
    part, _, path = name.partition(".")
    tensor = getattr(networks(sd).get_submodule(name), kind)
    if tensor is None:
        return None
    return sd.exact(part, f"{path}.{kind}", tensor.detach()).to(tensor.device, torch.float32)


def _update(t: dict[str, Tensor], alpha: Callable[[int], float], weight: Tensor, base: Tensor) -> nn.Module:
    """Of the tensors of one layer. KeyError if a factor is missing, RuntimeError if a shape is wrong."""
    if _lycoris.is_full(t):
        return FullDelta(_lycoris.delta(t, base, alpha))
    down, up = t["down"], t["up"]
    rank = len(up[0])
    if "mid" in t:
        down = _lycoris.fold(t["mid"], down)
    # 1x1 convolutions and linear layers are written as either: the layer here decides.
    a = down.reshape(rank, *weight.shape[1:])  # (r, c_in, ...)
    b = up.reshape(len(weight), rank, *[1] * (weight.ndim - 2))  # (c_out, r, ...)
    return LowRank(a.contiguous(), b.contiguous(), alpha(rank))


def describe(updates: Mapping[str, nn.Module]) -> str:
    """How many modules of which network, and the ranks."""
    counts = Counter(name.partition(".")[0] for name in updates)
    ranks = sorted({u.rank for u in updates.values() if isinstance(u, LowRank)})
    kind = f"LoRA of rank {', '.join(map(str, ranks))}" if ranks else "LoRA's relative, multiplied out,"
    where = [f"{counts[part]} modules of the {network_name(part)}" for part in sorted(counts, reverse=True)]
    return f"{kind} on {' and '.join(where)}"
