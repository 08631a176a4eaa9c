"""LayerNorm over the last dimension, with an optional residual added in front, forward and backward.

    s = x + residual        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias        gives y and s

Ba et al., Layer Normalization, https://arxiv.org/abs/1607.06450. A transformer block adds, then normalises;
fused, the sum is written once and not read back: four passes over the tokens instead of five. Statistics are
fp32 from registers, so that a mean far from zero costs no digits. The backward's sums over tokens are partial
sums of a fixed set of programs, added in a fixed order.
"""

import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # of the backward, each with its own partial sums: two a multiprocessor of an H100
MAX_WIDTH = 8192  # a row must fit in the registers of one program

# ------------------------------ Reference


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float):
    """y and x + residual for x (..., d), weight and bias (d,)."""
    s = x if residual is None else x + residual
    return F.layer_norm(s, s.shape[-1:], weight.to(s.dtype), bias.to(s.dtype), eps), s


# ------------------------------ Forward


@triton.jit
def _fwd_kernel(
    x_ptr,  # (rows, d)
    residual_ptr,  # (rows, d), read if HAS_RESIDUAL
    weight_ptr,  # (d,)
    bias_ptr,  # (d,)
    y_ptr,  # (rows, d)
    sum_ptr,  # (rows, d), written if HAS_RESIDUAL
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    d, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0), tl.arange(0, BLOCK_N)
    at, ok = row.to(tl.int64) * d + col, col < d
    s = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
        # The next residual add sees the rounded sum, so the statistics must be its statistics
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=ok)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 0) / d
    c = tl.where(ok, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(c * c, 0) / d + eps)
    weight = tl.load(weight_ptr + col, mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (c * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


# ------------------------------ Backward


@triton.jit
def _bwd_kernel(
    dy_ptr,  # (rows, d)
    dsum_ptr,  # (rows, d), gradient of x + residual, read if HAS_RESIDUAL
    s_ptr,  # (rows, d): x + residual
    weight_ptr,  # (d,)
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    dx_ptr,  # (rows, d)
    part_ptr,  # (programs, 2, d) fp32: dbias and dweight of each program's rows
    rows, d,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    ok = col < d
    weight = tl.load(weight_ptr + col, mask=ok, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * d + col
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + at, mask=ok, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(ok, (s - tl.load(mean_ptr + row)) * rstd, 0.0)
        dbias += dy
        dweight += dy * xhat
        dxhat = dy * weight
        dx = rstd * (dxhat - tl.sum(dxhat, 0) / d - xhat * (tl.sum(dxhat * xhat, 0) / d))
        if HAS_RESIDUAL:
            dx += tl.load(dsum_ptr + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    part_ptr += tl.program_id(0) * 2 * d
    tl.store(part_ptr + col, dbias, mask=ok)
    tl.store(part_ptr + d + col, dweight, mask=ok)


# ------------------------------ Launchers


def _tile(d: int) -> dict:
    """A row in one program, about 8 elements a thread."""
    block = L.power_of_two(d, 128)
    return dict(BLOCK_N=block, num_warps=min(16, max(1, block // 256)))


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float):
    x, d = x.contiguous(), x.shape[-1]
    y, stats = torch.empty_like(x), x.new_empty(2, *x.shape[:-1], dtype=torch.float32)
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    residual_arg = x if residual is None else residual.contiguous()
    args = (x, residual_arg, weight, bias, y, s, stats[0], stats[1], d, eps)
    L.launch(_fwd_kernel, (x.numel() // d,), *args, HAS_RESIDUAL=residual is not None, **_tile(d))
    return y, s, stats


def backward(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    s, dy, d = s.contiguous(), dy.contiguous(), s.shape[-1]
    rows = s.numel() // d
    programs = min(PROGRAMS, rows)
    dx, part = torch.empty_like(s), s.new_empty(programs, 2, d, dtype=torch.float32)
    dsum_arg = dy if dsum is None else dsum.contiguous()
    args = (dy, dsum_arg, s, weight, stats[0], stats[1], dx, part, rows, d)
    L.launch(_bwd_kernel, (programs,), *args, HAS_RESIDUAL=dsum is not None, **_tile(d))
    return dx, part.sum(0)


# ------------------------------ The torch operator


@torch.library.custom_op("minisd::layer_norm", mutates_args=(), device_types="cuda")
def layer_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (empty without one), and mean and rstd (2, ...) in fp32 for the backward."""
    return forward(x, residual, weight, bias, eps)


@layer_norm_op.register_kernel("cpu")
def _(x, residual, weight, bias, eps):
    if L.INTERPRET:
        return forward(x, residual, weight, bias, eps)
    y, s = reference(x.contiguous(), residual, weight, bias, eps)
    wide = s.float()
    stats = torch.stack((wide.mean(-1), (wide.var(-1, unbiased=False) + eps).rsqrt()))
    return y, x.new_empty(0) if residual is None else s, stats


@layer_norm_op.register_fake
def _(x, residual, weight, bias, eps):
    s = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), s, x.new_empty(2, *x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("minisd::layer_norm_bwd", mutates_args=(), device_types="cuda")
def layer_norm_bwd_op(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, which is also the gradient of the residual, and (dbias, dweight) as (2, d) fp32."""
    return backward(dy, dsum, s, weight, stats)


@layer_norm_bwd_op.register_kernel("cpu")
def _(dy, dsum, s, weight, stats):
    if L.INTERPRET:
        return backward(dy, dsum, s, weight, stats)
    g = dy.float()
    xhat = (s.float() - stats[0][..., None]) * stats[1][..., None]
    dxhat = g * weight.float()
    dx = dxhat - dxhat.mean(-1, True) - xhat * (dxhat * xhat).mean(-1, True)
    dx = dx * stats[1][..., None] + (0.0 if dsum is None else dsum.float())
    sums = torch.stack((g, g * xhat)).flatten(1, -2).sum(1)
    return dx.to(s.dtype, memory_format=torch.contiguous_format), sums


@layer_norm_bwd_op.register_fake
def _(dy, dsum, s, weight, stats):
    return s.new_empty(s.shape), s.new_empty(2, s.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, s, stats = output
    ctx.has_residual, ctx.bias_type = residual is not None, bias.dtype
    ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient: each would be a launch
    ctx.mark_non_differentiable(stats, *(() if ctx.has_residual else (s,)))
    ctx.save_for_backward(s if ctx.has_residual else x, weight, stats)


def _autograd(ctx, dy, dsum, dstats):
    s, weight, stats = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    dx, sums = layer_norm_bwd_op(dy, dsum, s, weight, stats)
    dresidual = dx if ctx.has_residual else None
    return dx, dresidual, sums[1].to(weight.dtype), sums[0].to(ctx.bias_type), None


layer_norm_op.register_autograd(_autograd, setup_context=_setup_context)
_eager = L.function(forward, _setup_context, _autograd)


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float):
    """The reference's y and x + residual by the kernels; without a residual the second is empty."""
    return L.call(layer_norm_op, _eager, x, residual, weight, bias, eps)[:2]


def why_not(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> str:
    """An empty string if the kernels take these, else the reason."""
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}, the kernels take up to {MAX_WIDTH}"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return "x and residual differ in shape or type"
    return L.why_not(x, weight, bias, dtypes=L.FLOAT)
