"""GEGLU: a * gelu(g) with the exact gelu, for x = [a, g] side by side, forward and backward.

Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202. Eager torch writes gelu(g)
and reads it back, the largest tensor of a transformer block; here x is read once, and x alone is kept.
"""

import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------ Reference


def reference(x: Tensor) -> Tensor:
    """x (..., 2 d) -> (..., d)."""
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


# ------------------------------ Forward


@triton.jit
def _load_halves(x_ptr, row, col, d):
    """a and g of one row in fp32, and what exists of them."""
    ok = col < d
    x_ptr += row.to(tl.int64) * 2 * d
    a = tl.load(x_ptr + col, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + d + col, mask=ok, other=0.0).to(tl.float32)
    return a, g, ok


@triton.jit
def _fwd_kernel(
    x_ptr,  # (rows, 2 d)
    y_ptr,  # (rows, d)
    d,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a, g, ok = _load_halves(x_ptr, row, col, d)
    y = a * g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    tl.store(y_ptr + row.to(tl.int64) * d + col, y.to(y_ptr.dtype.element_ty), mask=ok)


# ------------------------------ Backward


@triton.jit
def _bwd_kernel(
    x_ptr,  # (rows, 2 d)
    dy_ptr,  # (rows, d)
    dx_ptr,  # (rows, 2 d); never over x, which another backward may still need
    d,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a, g, ok = _load_halves(x_ptr, row, col, d)
    dy = tl.load(dy_ptr + row.to(tl.int64) * d + col, mask=ok, other=0.0).to(tl.float32)
    phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))  # the normal distribution up to g
    density = 0.3989422804014327 * tl.exp2(g * g * -0.7213475204444817)  # exp(-g^2 / 2) / sqrt(2 pi)
    dx_ptr += row.to(tl.int64) * 2 * d
    tl.store(dx_ptr + col, (dy * g * phi).to(dx_ptr.dtype.element_ty), mask=ok)
    tl.store(dx_ptr + d + col, (dy * a * (phi + g * density)).to(dx_ptr.dtype.element_ty), mask=ok)


# ------------------------------ Launchers


def forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    d = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], d)
    tile = L.tile("geglu", "any", x.device)
    L.launch(_fwd_kernel, (y.numel() // d, L.cdiv(d, tile["BLOCK_N"])), x, y, d, **tile)
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    d = x.shape[-1] // 2
    dx = torch.empty_like(x)
    tile = L.tile("geglu", "any", x.device)
    L.launch(_bwd_kernel, (dy.numel() // d, L.cdiv(d, tile["BLOCK_N"])), x, dy, dx, d, **tile)
    return dx


# ------------------------------ The torch operator


@torch.library.custom_op("minisd::geglu", mutates_args=(), device_types="cuda")
def geglu_op(x: Tensor) -> Tensor:
    return forward(x)


@geglu_op.register_kernel("cpu")
def _(x):
    return forward(x) if L.INTERPRET else reference(x)


@geglu_op.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("minisd::geglu_bwd", mutates_args=(), device_types="cuda")
def geglu_bwd_op(dy: Tensor, x: Tensor) -> Tensor:
    return backward(dy, x)


@geglu_bwd_op.register_kernel("cpu")
def _(dy, x):
    if L.INTERPRET:
        return backward(dy, x)
    a, g = x.chunk(2, dim=-1)
    return torch.cat((dy * F.gelu(g), torch.ops.aten.gelu_backward(dy * a, g)), dim=-1)


@geglu_bwd_op.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return geglu_bwd_op(dy, *ctx.saved_tensors)


geglu_op.register_autograd(_autograd, setup_context=_setup_context)
_eager = L.function(forward, _setup_context, _autograd)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) for x = [a, g] (..., 2 d), as (..., d)."""
    return L.call(geglu_op, _eager, x)


def why_not(x: Tensor) -> str:
    """An empty string if the kernel takes this, else the reason."""
    return f"{x.shape[-1]} columns do not divide in two" if x.shape[-1] % 2 else L.why_not(x, dtypes=L.FLOAT)
