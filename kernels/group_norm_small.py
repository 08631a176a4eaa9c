"""GroupNorm of small images, one program a group, and the helpers that both forms share.

At 8x8 and 16x16 pixels a group has a few thousand elements: it fits in registers, and what counts is one grid
instead of three. See group_norm.py for the operation, the letters and the launcher.
"""

import minisd.kernels.launch as L
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------ Helpers


@triton.jit
def load_row(ptr, at, ok):
    """One value a channel, (1, c) fp32: weight, bias, or a statistic of the channel's group."""
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(x_ptr, add_ptr, b, n, c, n_ok, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD: tl.constexpr):
    """x + add of sample b at pixels n and channels c, (n, c) fp32, and the mask of what exists."""
    ok = n_ok[:, None] & c_ok[None, :]
    x_ptr += b.to(tl.int64) * stride_b  # a batch of VAE activations has more than 2^31 elements
    x = tl.load(x_ptr + n[:, None] * stride_n + c[None, :] * stride_c, mask=ok, other=0.0).to(tl.float32)
    if HAS_ADD:
        x += load_row(add_ptr, b * C + c, c_ok)
    return x, ok


@triton.jit
def store_tile(ptr, value, b, n, c, ok, stride_b, stride_n, stride_c):
    ptr += b.to(tl.int64) * stride_b
    tl.store(ptr + n[:, None] * stride_n + c[None, :] * stride_c, value.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) by exp2 and a reciprocal root: exp and division would add six guarding steps."""
    r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return r * r


@triton.jit
def grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU: tl.constexpr):
    """xhat and the gradient of xhat * weight + bias, both (n, c) and zero outside; SiLU is recomputed."""
    xhat = tl.where(ok, (x - mean) * rstd, 0.0)
    if SILU:
        z = xhat * weight + bias
        s = sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return xhat, dy


# ------------------------------ Forward


@triton.jit
def small_fwd_kernel(
    x_ptr,  # (b, n, c) by strides
    y_ptr,  # as x
    add_ptr,  # (b, c), read if HAS_ADD
    weight_ptr,  # (c,)
    bias_ptr,  # (c,)
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    N, C, inv_total, eps, stride_b, stride_n, stride_c,
    GROUP_C: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program, one group, held in registers from the load to the store."""
    g, b, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    c, c_ok = g * GROUP_C + k, k < GROUP_C
    x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
    mean = tl.sum(tl.where(ok, x, 0.0)) * inv_total
    d = tl.where(ok, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d) * inv_total + eps)
    weight = load_row(weight_ptr, c, c_ok)
    bias = load_row(bias_ptr, c, c_ok)
    y = d * (rstd * weight) + bias
    if SILU:
        y = y * sigmoid(y)
    store_tile(y_ptr, y, b, n, c, ok, stride_b, stride_n, stride_c)
    tl.store(mean_ptr + b * G + g, mean)
    tl.store(rstd_ptr + b * G + g, rstd)


# ------------------------------ Backward


@triton.jit
def small_bwd_kernel(
    x_ptr,  # (b, n, c) by strides
    dy_ptr,  # as x
    dx_ptr,  # as x
    add_ptr,  # (b, c), read if HAS_ADD
    weight_ptr,  # (c,)
    bias_ptr,  # (c,)
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    sums_ptr,  # (2, b, c) fp32: dbias and dweight of each sample
    dadd_ptr,  # (b, c), written if HAS_ADD
    N, C, inv_total, stride_b, stride_n, stride_c,
    GROUP_C: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, b, G, B = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    c, c_ok = g * GROUP_C + k, k < GROUP_C
    x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
    dy, _ = load_tile(dy_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, False)
    mean, rstd = tl.load(mean_ptr + b * G + g), tl.load(rstd_ptr + b * G + g)
    weight = load_row(weight_ptr, c, c_ok)
    bias = load_row(bias_ptr, c, c_ok)
    xhat, dz = grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU)
    tl.store(sums_ptr + b * C + c, tl.sum(dz, 0), mask=c_ok)
    tl.store(sums_ptr + (B + b) * C + c, tl.sum(dz * xhat, 0), mask=c_ok)
    mean_dz = tl.sum(weight * dz) * inv_total
    mean_dz_xhat = tl.sum(weight * dz * xhat) * inv_total
    dx = tl.where(ok, rstd * (weight * dz - mean_dz - xhat * mean_dz_xhat), 0.0)
    store_tile(dx_ptr, dx, b, n, c, ok, stride_b, stride_n, stride_c)
    if HAS_ADD:
        tl.store(dadd_ptr + b * C + c, tl.sum(dx, 0).to(dadd_ptr.dtype.element_ty), mask=c_ok)


# ------------------------------ On the host

# Elements of a padded group that 8 warps hold in registers: one tensor forward, two backward
FWD, BWD = 16384, 8192


def sizes(x: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """b, c, n and the strides (b, n, c) of a dense x."""
    b, c = x.shape[:2]
    n = x[0, 0].numel()
    return b, c, n, (c * n, c, 1) if L.layout(x) == "channels_last" else (c * n, 1, n)


def blocks(x: Tensor, num_groups: int, most: int):
    """(tile, BLOCK_N, BLOCK_C) if a padded group has at most `most` elements, else (tile, splits, rows)."""
    _, c, n, _ = sizes(x)
    block_n, block_c = L.power_of_two(n, 16), L.power_of_two(c // num_groups)
    if block_n * block_c <= most:
        return dict(num_warps=8), block_n, block_c
    tile = L.tile("group_norm_fwd" if most == FWD else "group_norm_bwd", L.layout(x), x.device)
    # A split is a whole number of tiles; the merge holds (splits, channels of a group) in one program
    most_splits = max(1, min(256, 4096 // block_c))
    split_rows = tile["BLOCK_N"] * L.cdiv(L.cdiv(n, tile["BLOCK_N"]), most_splits)
    return tile, L.cdiv(n, split_rows), split_rows
