"""LayerNorm over the last dimension, with an optional residual added first, forward and backward.

    s = x + residual        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias        returns y and s

Ba et al., Layer Normalization, https://arxiv.org/abs/1607.06450. A transformer block adds, then normalises;
fused, the sum is written once and not read back: four passes over the tokens instead of five. Statistics are
computed in fp32 from registers, so that a mean far from zero costs no digits. The backward's sums over tokens
are partial sums of a fixed number of programs, added in a fixed order.

Pointers, the same in both kernels:

    x, y, dy, dx    (rows, d)
    residual, sum   (rows, d), read and written if HAS_RESIDUAL; sum is x + residual
    s, dsum         (rows, d): x + residual or x alone, and the gradient of sum, read if HAS_RESIDUAL
    weight, bias    (d,)
    stats           (2, rows) fp32: mean and rstd
    part            (programs, 2, d) fp32: dbias and dweight of each program's rows
"""

import math

import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minisd.kernels.kernel import Case, Kernel
from torch import Tensor

PROGRAMS = 264  # of the backward, each with its own partial sums: two per multiprocessor of an H100
MAX_WIDTH = 8192  # a row must fit in the registers of one program


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y and x + residual for x (..., d), weight and bias (d,); the second is empty without one."""
    s = x if residual is None else x + residual
    if not torch.is_autocast_enabled(x.device.type):  # which casts by itself
        weight, bias = weight.to(s.dtype), bias.to(s.dtype)
    y = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y, x.new_empty(0) if residual is None else s


# ------------------------------ Forward


@triton.jit
def _fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, stats_ptr,
    d, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0), tl.arange(0, BLOCK_N)
    at, ok = row.to(tl.int64) * d + col, col < d
    s = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
        # The next residual add reads the rounded sum, so the statistics must be those of the rounded sum
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=ok)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 0) / d
    c = tl.where(ok, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(c * c, 0) / d + eps)
    weight = tl.load(weight_ptr + col, mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (c * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + tl.num_programs(0) + row, rstd)


# ------------------------------ Backward


@triton.jit
def _load_rows(dy_ptr, dsum_ptr, s_ptr, at, ok, HAS_RESIDUAL: tl.constexpr):
    dy = tl.load(dy_ptr + at, mask=ok, other=0.0)
    dsum = dy
    if HAS_RESIDUAL:
        dsum = tl.load(dsum_ptr + at, mask=ok, other=0.0)
    return dy, dsum, tl.load(s_ptr + at, mask=ok, other=0.0)


@triton.jit
def _bwd_kernel(
    dy_ptr, dsum_ptr, s_ptr, weight_ptr, stats_ptr, dx_ptr, part_ptr,
    rows, d,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Process ROWS rows at a time. The next ones are loaded before the present ones are used, so that the
    memory is never idle."""
    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    row, col = tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, BLOCK_N)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_N), tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_N), tl.float32)
    at, ok = (first + row) * d + col, (first + row < rows) & (col < d)
    next_dy, next_dsum, next_s = _load_rows(dy_ptr, dsum_ptr, s_ptr, at, ok, HAS_RESIDUAL)
    for start in range(first, rows, step):
        here = start + row
        at, ok = here * d + col, (here < rows) & (col < d)
        dy, dsum, s = next_dy.to(tl.float32), next_dsum.to(tl.float32), next_s.to(tl.float32)
        more = (here + step < rows) & (col < d)
        next_dy, next_dsum, next_s = _load_rows(dy_ptr, dsum_ptr, s_ptr, at + step * d, more, HAS_RESIDUAL)
        mean = tl.load(stats_ptr + here, mask=here < rows, other=0.0)
        rstd = tl.load(stats_ptr + rows + here, mask=here < rows, other=0.0)
        xhat = tl.where(ok, (s - mean) * rstd, 0.0)
        dbias += dy
        dweight += dy * xhat
        dxhat = dy * weight
        mean_dxhat, mean_product = tl.sum(dxhat, 1)[:, None] / d, tl.sum(dxhat * xhat, 1)[:, None] / d
        dx = rstd * (dxhat - mean_dxhat - xhat * mean_product)
        if HAS_RESIDUAL:
            dx += dsum
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    col = tl.arange(0, BLOCK_N)
    part_ptr += tl.program_id(0) * 2 * d
    tl.store(part_ptr + col, tl.sum(dbias, 0), mask=col < d)
    tl.store(part_ptr + d + col, tl.sum(dweight, 0), mask=col < d)


# ------------------------------ Launchers


def tile(d: int) -> dict:
    """Return the tile: a row per program, about 8 elements per thread."""
    block = L.power_of_two(d, 128)
    return dict(BLOCK_N=block, num_warps=min(16, max(1, block // 256)))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x + residual (empty without one), and mean and rstd (2, ...) in fp32 for the backward."""
    x, d = x.contiguous(), x.shape[-1]
    s = L.empty(x, 0) if residual is None else L.empty(x)
    y, stats = L.empty(x), L.empty(x, 2, *x.shape[:-1], dtype=torch.float32)
    residual_arg = x if residual is None else residual.contiguous()
    args = (x, residual_arg, weight, bias, y, s, stats, d, eps)
    L.launch(_fwd_kernel, (x.numel() // d,), *args, HAS_RESIDUAL=residual is not None, **tile(d))
    return y, s, stats


def backward(
    dy: Tensor | None, dsum: Tensor | None, s: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, which is also the gradient of the residual, and dweight and dbias in fp32."""
    s, d = s.contiguous(), s.shape[-1]
    dy = torch.zeros_like(s) if dy is None else dy.contiguous()
    rows, block = s.numel() // d, tile(d)["BLOCK_N"]
    flags = dict(HAS_RESIDUAL=dsum is not None, ROWS=max(1, 2048 // block))
    programs = min(PROGRAMS, L.cdiv(rows, flags["ROWS"]))
    dx, dweight, dbias = L.empty(s), *(L.empty(s, d, dtype=torch.float32) for _ in range(2))
    part = L.empty(s, programs, 2, d, dtype=torch.float32)
    dsum_arg = dy if dsum is None else dsum.contiguous()
    args = (dy, dsum_arg, s, weight, stats, dx, part, rows, d)
    L.launch(_bwd_kernel, (programs,), *args, BLOCK_N=block, num_warps=16 if block > 4096 else 8, **flags)
    L.add_up(part, dbias, dweight)
    return dx, dweight, dbias


def unsupported(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> str:
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]}, the kernels take up to {MAX_WIDTH}"
    if x.numel() // x.shape[-1] > 2**30:
        return "more than 2^30 rows"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return "x and residual differ in shape or type"
    return ""


def size_class(x: tuple, residual: tuple | None, weight, bias, eps) -> str:
    return f"{x[-1]} x{L.power_of_two(math.prod(x[:-1]))}{' add' if residual else ''}"


# ------------------------------ Cases


def case(name: str, *shape: int, residual: bool = True, shift: float = 0.0) -> Case:
    def make(randn):
        tensors = dict(x=randn(*shape) + shift, residual=randn(*shape) if residual else None)
        return tensors | dict(weight=randn(shape[-1]), bias=randn(shape[-1])), dict(eps=1e-5)

    return Case(name, make, elements=4 * math.prod(shape), back=1.0)


KERNEL = Kernel(
    name="layer_norm", reference=reference, unsupported=unsupported,
    forward=forward, backward=backward, size_class=size_class,
    save=lambda inputs, outputs: (inputs[0] if inputs[1] is None else outputs[1], inputs[2], outputs[2]),
    gradients=lambda dx, *rest: (dx, dx, *rest), differentiable=2,
    cases=[
        case("320, tokens", 2, 7, 320),
        case("no residual", 5, 64, residual=False),
        case("one row", 1, 1, 640),
        case("odd width", 9, 77),
        case("more rows than programs", 300, 16, residual=False),
        case("mean 100 deviations", 6, 128, residual=False, shift=100.0),
    ],
    timed=[
        case(f"add b{b} {n}x{d}", b, n, d) for b in (2, 8) for n, d in ((4096, 320), (1024, 640), (256, 1280))
    ],
)  # fmt: skip
