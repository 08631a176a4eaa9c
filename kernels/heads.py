"""Tiles of an attention head, shared by attention.py and cross_attention.py.

Stable Diffusion's head widths, 40, 80 and 160, are not powers of two, and the width of a tile must be one.
Padding to 64, 128 and 256 would waste a third of every product, so a head is cut into two tiles (32 + 16,
64 + 16, 128 + 32), written as a pair (x0, x1). With D1 = 0 there is one tile; x1 is then x0 and unused.

Pointers, the same in every kernel:

    q                   (b, n, nh, hd): strides (stride_qb, stride_qn, hd, 1)
    k, v                (b, m, nh, hd): likewise
    o, do, dq, dk, dv   like q or k, and dense
    lse                 (b, nh, n) fp32: log2 of the sum of exp2(scaled scores)
    delta               (b, nh, n) fp32: row sums of dO * O
"""

import math

import minisd.kernels.launch as L
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634  # log2(e): the kernels use exp2, one instruction, instead of exp, two

# ------------------------------ On the device


@triton.jit
def at_head(q_ptr, k_ptr, v_ptr, stride_qb, stride_kb, stride_vb, nh, HD: tl.constexpr):
    """Return the pointers moved to this program's head; the grid's second axis is batch x heads."""
    b, h = (tl.program_id(1) // nh).to(tl.int64), tl.program_id(1) % nh
    q_ptr += b * stride_qb + h * HD
    k_ptr += b * stride_kb + h * HD
    v_ptr += b * stride_vb + h * HD
    return q_ptr, k_ptr, v_ptr


@triton.jit
def dense_offset(rows, nh, HD: tl.constexpr):
    """Return the offset of this program's head in a dense tensor (b, rows, nh, hd)."""
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    return b.to(tl.int64) * rows * nh * HD + h * HD


@triton.jit
def load(
    ptr, rows, num_rows, stride, HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN: tl.constexpr
):
    """Load both parts of rows of a head; 0 past HD and, unless EVEN, past num_rows."""
    at, ok = ptr + rows[:, None] * stride, (rows[:, None] < num_rows) | EVEN
    cols = tl.arange(0, D0)[None, :]
    x0 = tl.load(at + cols, mask=ok & ((cols < HD) | (D0 <= HD)), other=0.0)
    x1 = x0
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)[None, :]
        x1 = tl.load(at + cols, mask=ok & ((cols < HD) | (D0 + D1 <= HD)), other=0.0)
    return x0, x1


@triton.jit
def store(ptr, x0, x1, rows, num_rows, stride, HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    at, ok = ptr + rows[:, None] * stride, rows[:, None] < num_rows
    cols = tl.arange(0, D0)[None, :]
    tl.store(at + cols, x0.to(ptr.dtype.element_ty), mask=ok & (cols < HD))
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)[None, :]
        tl.store(at + cols, x1.to(ptr.dtype.element_ty), mask=ok & (cols < HD))


@triton.jit
def dot(a0, a1, b0, b1, D1: tl.constexpr):
    """Return a b^T over the whole head width, (rows of a, rows of b) fp32."""
    s = tl.dot(a0, b0.T)
    if D1 > 0:
        s = tl.dot(a1, b1.T, s)
    return s


@triton.jit
def dot_onto(p, x0, x1, acc0, acc1, D1: tl.constexpr):
    """Return both parts of acc + p x."""
    acc0 = tl.dot(p, x0, acc0)
    if D1 > 0:
        acc1 = tl.dot(p, x1, acc1)
    return acc0, acc1


@triton.jit
def row_sums(a0, a1, b0, b1, D1: tl.constexpr):
    """Return the sum of a * b over the head width, (rows,) fp32."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), tl.float32)
    return x0, x1


# ------------------------------ On the host


def two_tiles(size: int) -> tuple[int, int]:
    """Return two tiles that hold `size`: 40 is 32 + 16; (tile, 0) where two are not shorter (64, 56)."""
    whole = L.power_of_two(size, 16)
    first = max(16, whole // 2)
    second = L.power_of_two(size - first, 16) if size > first else 0
    return (first, second) if 0 < second < whole - first else (whole, 0)


def size_class(q: tuple, k: tuple, v: tuple) -> str:
    """Head width, queries x keys, heads in the batch up to the next power of two."""
    return f"hd{q[3]} {q[1]}x{k[1]} x{L.power_of_two(q[0] * q[2])}"


def dense(t: Tensor) -> Tensor:
    """Return t, copied only where its heads are not adjacent (slices of a fused QKV product are fine)."""
    return t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous()


def launch(kernel, blocks: int, *arguments, **meta) -> None:
    """Launch `blocks` programs for every head, with what all kernels take after their own arguments, of which
    the first three are q, k and v: log2(e) / sqrt(hd), n, m, nh, and the strides of batch and tokens."""
    q, k, v = arguments[:3]
    b, n, nh, hd = q.shape
    strides = [s for t in (q, k, v) for s in t.stride()[:2]]
    scalars = (LOG2E / math.sqrt(hd), n, k.shape[1], nh, *strides)
    d0, d1 = two_tiles(hd)
    L.launch(kernel, (blocks, b * nh), *arguments, *scalars, HD=hd, D0=d0, D1=d1, **meta)
