"""The layers of the UNet, the VAE, ControlNet and the text encoder.

Shapes, here and in the other files of this folder:

    b       batch                       s   text tokens
    c       channels                    d   width of a token
    h w     height and width            nh  heads
    n       image tokens, n = h * w     hd  width of a head, d = nh * hd

h is never heads. Images are (b, c, h, w), tokens (b, n, d), text (b, s, d).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files, ops


class GroupNorm(nn.GroupNorm):
    """GroupNorm of x (b, c, h, w) + add (b, c), followed by SiLU with `silu`: one fused op."""

    def forward(self, x: Tensor, *, silu: bool = False, add: Tensor | None = None) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=silu, add=add)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension of x (..., d)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """LayerNorm of x + residual, and x + residual: one fused op."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (b, c_in, h, w) with weight (c_out, c_in, 1, 1) as a matrix product, in the memory layout of
    x; torch's convolution may copy x into another layout. Returns (b, c_out, h, w)."""
    weight = weight.flatten(1)  # (c_out, c_in)
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)  # (b, c_out, h, w)
    weights, tokens = weight.expand(len(x), -1, -1), x.flatten(2)  # (b, c_out, c_in), (b, c_in, n)
    y = weights @ tokens if bias is None else torch.baddbmm(bias[:, None], weights, tokens)  # (b, c_out, n)
    return y.unflatten(2, x.shape[2:])  # (b, c_out, h, w)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution, by `conv1x1`: (b, c_in, h, w) -> (b, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight, self.bias)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (b, c_in, h, w) with weight (c_out, c_in, 3, 3), padded by 1: (b, c_out, h, w). Few pixels
    in bf16 on a CPU are convolved as a matrix product: torch's convolution reorders all weights at every
    call, which takes longer there than to multiply by them."""
    b, c_in, h, w = x.shape
    if not ops.fast_bf16(x) or 8 * b * h * w > len(weight):
        return F.conv2d(x, weight, bias, padding=1)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, c_in)
    along = x.stride()
    patches = x.as_strided((b, h, w, 3, 3, c_in), (*along[:3], *along[1:]))
    rows = patches.reshape(b * h * w, -1)  # (b h w, 9 c_in)
    y = F.linear(rows, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)  # (b h w, c_out)
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)  # (b, c_out, h, w)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution padded by 1, by `conv3x3`: (b, c_in, h, w) -> (b, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, device: str | None = None):
        super().__init__(c_in, c_out, 3, padding=1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias)


def conv3x3_of_doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv3x3` of x (b, c_in, h, w) with each pixel doubled along both sides: (b, c_out, 2 h, 2 w). Of the
    nine weights those that meet the same pixel are summed first, which makes it a transposed convolution of
    4x4 and stride 2, with 16 products for a pixel instead of 36."""
    for side in (2, 3):
        first, middle, last = weight.unbind(side)
        weight = torch.stack([last, middle + last, first + middle, first], side)  # (c_out, c_in, 4, 4)
    return F.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2, padding=1)


def timestep_embedding(timesteps: Tensor, dim: int, *, shift: int = 0, sines_first: bool = False) -> Tensor:
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-i/(dim/2 - shift)), (b, dim) in fp32, of timesteps (b,):
    Vaswani et al. 2017, section 3.5, with the cosines first as in SD. The published DDPM weights have a shift
    of 1 and the sines first."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * (exponent / (half - shift)).exp()  # (b, dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([sin, cos] if sines_first else [cos, sin], dim=-1)  # (b, dim)


class ResnetBlock(nn.Module):
    """GN, SiLU, conv, + temb, GN, SiLU, conv, + shortcut: (b, c_in, h, w) -> (b, c_out, h, w). `temb`
    (b, temb_dim) has its SiLU already applied."""

    def __init__(self, c_in: int, c_out: int, *, groups: int, eps: float, temb_dim: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv3x3(c_in, c_out)
        self.time_emb_proj = nn.Linear(temb_dim, c_out) if temb_dim else None
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.conv2 = Conv3x3(c_out, c_out)
        self.conv_shortcut = Conv1x1(c_in, c_out) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))  # (b, c_out, h, w)
        h = self.norm2(h, silu=True, add=self.time_emb_proj(temb) if self.time_emb_proj else None)
        h = self.conv2(h)  # (b, c_out, h, w)
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


def fused_qkv(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """Apply each layer to x (b, n, d); in one matrix product, if the layers are plain and `to_channels_last`
    has put their weights into one piece of memory."""
    weights = [layer.weight for layer in layers]
    plain = not torch.compiler.is_compiling() and all(_is_plain(n) and n.bias is None for n in layers)
    if not plain or not _in_one_piece(weights):
        return [layer(x) for layer in layers]
    widths = [len(w) for w in weights]
    whole = weights[0].as_strided((sum(widths), x.shape[-1]), (x.shape[-1], 1))  # (d_q + d_k + d_v, d)
    return F.linear(x, whole).split(widths, dim=-1)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer has no gradient, no hooks, and no adapter that has an effect."""
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks
    no_adapter = type(layer) in (nn.Linear, Conv3x3) or getattr(layer, "idle", False)
    return no_adapter and not (layer.weight.requires_grad or has_hooks)


def _in_one_piece(weights: list[Tensor]) -> bool:
    """Whether the weights follow each other in the same memory."""
    starts, ends = zip(*((w.storage_offset(), w.storage_offset() + w.numel()) for w in weights), strict=True)
    dense = all(w.is_contiguous() for w in weights)
    return dense and starts[1:] == ends[:-1] and len({w.untyped_storage().data_ptr() for w in weights}) == 1


def multi_head(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, causal: bool = False) -> Tensor:
    """Multi-head attention of q (b, n, d) to k and v (b, m, d). Returns (b, n, d)."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # (b, n or m, nh, hd)
    return ops.attention(q, k, v, causal=causal).flatten(-2)  # (b, n, d)


@dataclass(eq=False)
class CachedContext:
    """Text states (b, s, d), and the keys and values of cross-attention, each computed once: for sampling,
    where neither the text nor the layers change between steps."""

    states: Tensor
    cache: dict[nn.Module, Tensor] = field(default_factory=dict)

    def project(self, layer: nn.Module) -> Tensor:
        """The projection of the states by a layer to keys or values, (b, s, d)."""
        if layer not in self.cache:
            self.cache[layer] = layer(self.states)
        return self.cache[layer]

    def fill(self, network: nn.Module) -> "CachedContext":
        """Compute the keys and values of a network now: within torch.compile or a CUDA graph they would be
        computed each time."""
        for module in network.modules():
            if isinstance(module, TransformerBlock):
                self.project(module.attn2.to_k), self.project(module.attn2.to_v)
        return self


Context = Tensor | CachedContext | None  # text states (b, s, d); None in a network without text


class Attention(nn.Module):
    """Multi-head attention of x (b, n, d) to itself or to context (b, s, context_dim). Returns (b, n, d)."""

    def __init__(self, dim: int, num_heads: int, *, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        if context is None:
            q, k, v = fused_qkv(x, self.to_q, self.to_k, self.to_v)  # (b, n, d)
        elif isinstance(context, CachedContext):
            q, k, v = self.to_q(x), context.project(self.to_k), context.project(self.to_v)
        else:
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)  # (b, n, d), (b, s, d) twice
        return self.to_out(self.attend(q, k, v, context))  # (b, n, d)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attention of q (b, n, d) to k and v (b, m, d), to which an adapter may add."""
        return multi_head(q, k, v, self.num_heads)  # (b, n, d)


class GEGLU(nn.Module):
    """a * gelu(g) with [a, g] = proj(x) (Shazeer 2020): (b, n, d) -> (b, n, d_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))  # (b, n, d_out)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each after a LayerNorm and added to its
    input: (b, n, d) -> (b, n, d)."""

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim=context_dim)
        self.norm3 = LayerNorm(dim)
        # Named as published: index 1 is dropout there; SD trains without it.
        feed_forward = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.ModuleDict({"net": feed_forward})

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, x = self.norm2.add(self.attn1(self.norm1(x)), x)
        h, x = self.norm3.add(self.attn2(h, context), x)
        return x + self.ff.net(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of x (b, c, h, w), between two 1x1 convolutions, added to x."""

    def __init__(self, channels: int, num_heads: int, context_dim: int, *, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)  # not the 1e-5 of the ResnetBlocks
        self.proj_in = Conv1x1(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, num_heads, context_dim)])
        self.proj_out = Conv1x1(channels, channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (b, n, c)
        for block in self.transformer_blocks:
            h = block(h, context)  # (b, n, c)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (b, c, h, w)
        return x + self.proj_out(h)


class SelfAttention2d(nn.Module):
    """Attention over the pixels of x (b, c, h, w), added to x; for the VAE and the pixel UNet."""

    def __init__(self, channels: int, num_heads: int, *, groups: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = GroupNorm(groups, channels, eps=eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (b, n, c)
        h = self.to_out(multi_head(self.to_q(h), self.to_k(h), self.to_v(h), self.num_heads))  # (b, n, c)
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])  # (b, c, h, w)


class Downsample(nn.Module):
    """Convolution of stride 2: (b, c, h, w) -> (b, c, h / 2, w / 2)."""

    def __init__(self, channels: int, *, pad_end_only: bool = False):
        super().__init__()
        # The VAE pads one row and one column at the end, the UNet pads all sides.
        self.pad_end_only = pad_end_only
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end_only else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_end_only else x)  # (b, c, h / 2, w / 2)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to `size` (by default twice that of x), then a convolution:
    (b, c, h, w) -> (b, c, *size)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        b, c, h, w = x.shape
        # Of fewer pixels the sums take longer than they save. UNets, which name the size, compute the same
        # with and without gradients: methods compare what they predict.
        doubles = size is None and b * h * w >= c and not torch.is_grad_enabled()
        if doubles and ops.fast_bf16(x) and _is_plain(self.conv):
            return conv3x3_of_doubled(x, self.conv.weight, self.conv.bias)
        size = size or (2 * h, 2 * w)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (b, c, *size)


def to_channels_last(network: nn.Module) -> nn.Module:
    """Lay out the weights in memory for speed; names, shapes and values stay. A convolution with a
    channels-last weight returns channels-last, in which pixels become tokens without a copy. The three
    weights of a self-attention share one piece of memory, for `fused_qkv`."""
    network.to(memory_format=torch.channels_last)
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            layers = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
            whole = torch.cat([layer.weight.data for layer in layers])  # (3 d, d)
            for layer, weight in zip(layers, whole.chunk(len(layers)), strict=True):
                layer.weight.data = weight
    return network


def move(network: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Move a network to a device, in the fast memory layout there. Where its weights are copied from a file,
    the file's pages leave the memory."""
    like = torch.empty(0, device=device, dtype=dtype or next(network.parameters()).dtype)
    last = is_fast_in_channels_last(like)
    how = {"memory_format": torch.channels_last} if last else {}
    copied = []
    for module in network.modules():
        before = [p.data for p in module.parameters(recurse=False)]
        if before:
            module.to(device, dtype, **how)
        after = module.parameters(recurse=False)
        copied += [b for b, p in zip(before, after, strict=True) if p.data_ptr() != b.data_ptr()]
        if sum(t.nbytes for t in copied) > 2**26:
            files.let_go(copied)
            copied = []
    files.let_go(copied)
    return to_channels_last(network) if last else network


def is_fast_in_channels_last(weight: Tensor) -> bool:
    """Whether convolutions by this weight are faster in channels-last: not in fp32 on a CPU."""
    return weight.device.type == "cuda" or ops.fast_bf16(weight)
