"""The only door between the models and the kernels: each op has one signature, whoever computes it.

Shapes: b batch, c channels, h w height and width, n tokens, nh heads, hd head width, d width.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v for q (b, n, nh, hd) and k, v (b, m, nh, hd). Returns (b, n, nh, hd)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, nh, n, hd)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)  # (b, n, nh, hd)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu=False,
    add: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x + add, then SiLU if asked; x (b, c, h, w), add (b, c), weight and bias (c,)."""
    if add is not None:
        x = x + add[:, :, None, None]
    x = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(x) if silu else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., d)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) with the exact gelu, for x = [a, g] (..., 2 d). Returns (..., d)."""
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)
