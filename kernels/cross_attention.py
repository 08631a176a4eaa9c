"""Attention to a short text: at most 128 keys, so that K and V are held as a whole.

The softmax is then exact in one pass, with no running maximum, and one backward kernel reads everything once:
it writes dQ and keeps dK and dV of its share of the queries, which a second kernel sums in a fixed order.
Letters and reference as in attention.py. CLIP's 77 keys are tiles of 64 + 16 in the forward and one of 128 in
the backward, where two would need two sets of sums. Heads wider than 80 take attention.py's backward instead.
"""

import math

import minisd.kernels.attention as attention
import minisd.kernels.launch as L
import torch
import triton
import triton.language as tl
from minisd.kernels.heads import (
    LOG2E,
    arguments,
    dot_heads,
    dot_onto,
    heads_dense,
    load_head,
    shape_class,
    split,
    store_head,
    zeros,
)
from torch import Tensor

MAX_KEYS = 128
PLENTY = 1024  # programs that keep every multiprocessor busy, twice over

# ------------------------------ Forward


@triton.jit
def _fwd_kernel(
    q_ptr,  # (b, n, nh, hd): strides (stride_qb, stride_qn, hd, 1)
    k_ptr,  # (b, m, nh, hd)
    v_ptr,  # (b, m, nh, hd)
    o_ptr,  # (b, n, nh, hd) dense
    lse_ptr,  # (b, nh, n) fp32: log2 of the sum of exp2(scaled scores)
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """REPEAT tiles of queries for one load of K and V; the keys are a first K0 (a) and K1 more (b)."""
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    q_ptr += b.to(tl.int64) * stride_qb + h * HD
    k_ptr += b.to(tl.int64) * stride_kb + h * HD
    v_ptr += b.to(tl.int64) * stride_vb + h * HD
    o_ptr += b.to(tl.int64) * n * nh * HD + h * HD
    a = tl.arange(0, K0)
    ka0, ka1 = load_head(k_ptr, a, m, stride_kn, HD, D0, D1, False)
    va0, va1 = load_head(v_ptr, a, m, stride_vn, HD, D0, D1, False)
    if K1 > 0:
        c = K0 + tl.arange(0, K1)
        kb0, kb1 = load_head(k_ptr, c, m, stride_kn, HD, D0, D1, False)
        vb0, vb1 = load_head(v_ptr, c, m, stride_vn, HD, D0, D1, False)
    for i in range(REPEAT):
        rows = (tl.program_id(0) * REPEAT + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        q0, q1 = load_head(q_ptr, rows, n, stride_qn, HD, D0, D1, False)
        sa = tl.where(a[None, :] < m, dot_heads(q0, q1, ka0, ka1, D1) * scale, float("-inf"))
        top = tl.max(sa, 1)
        if K1 > 0:
            sb = tl.where(c[None, :] < m, dot_heads(q0, q1, kb0, kb1, D1) * scale, float("-inf"))
            top = tl.maximum(top, tl.max(sb, 1))
        pa = tl.exp2(sa - top[:, None])
        total = tl.sum(pa, 1)
        acc0, acc1 = zeros(BLOCK_M, D0, D1)
        acc0, acc1 = dot_onto(pa.to(va0.dtype), va0, va1, acc0, acc1, D1)
        if K1 > 0:
            pb = tl.exp2(sb - top[:, None])
            total += tl.sum(pb, 1)
            acc0, acc1 = dot_onto(pb.to(vb0.dtype), vb0, vb1, acc0, acc1, D1)
        tl.store(lse_ptr + tl.program_id(1) * n + rows, top + tl.log2(total), mask=rows < n)
        over = (1.0 / total)[:, None]
        store_head(o_ptr, acc0 * over, acc1 * over, rows, n, nh * HD, HD, D0, D1)


# ------------------------------ Backward


@triton.jit
def _bwd_kernel(
    q_ptr,  # (b, n, nh, hd) by strides, as in the forward
    k_ptr,  # (b, m, nh, hd) by strides
    v_ptr,  # (b, m, nh, hd) by strides
    o_ptr,  # (b, n, nh, hd) dense
    do_ptr,  # (b, n, nh, hd) dense
    lse_ptr,  # (b, nh, n) fp32
    dq_ptr,  # (b, n, nh, hd) dense
    part_ptr,  # (splits, 2, b, m, nh, hd) fp32: dk and dv of each split's queries
    scale, sm_scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn, split_rows,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    q_ptr += b.to(tl.int64) * stride_qb + h * HD
    k_ptr += b.to(tl.int64) * stride_kb + h * HD
    v_ptr += b.to(tl.int64) * stride_vb + h * HD
    dense = b.to(tl.int64) * n * nh * HD + h * HD
    cols = tl.arange(0, KEYS)
    k0, k1 = load_head(k_ptr, cols, m, stride_kn, HD, D0, D1, False)
    v0, v1 = load_head(v_ptr, cols, m, stride_vn, HD, D0, D1, False)
    dk0, dk1 = zeros(KEYS, D0, D1)
    dv0, dv1 = zeros(KEYS, D0, D1)
    tl.assume(split_rows > 0)
    for start in range(0, split_rows, BLOCK_M):
        rows = tl.program_id(0) * split_rows + start + tl.arange(0, BLOCK_M)
        q0, q1 = load_head(q_ptr, rows, n, stride_qn, HD, D0, D1, False)
        do0, do1 = load_head(do_ptr + dense, rows, n, nh * HD, HD, D0, D1, False)
        o0, o1 = load_head(o_ptr + dense, rows, n, nh * HD, HD, D0, D1, False)
        delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
        # a row that is not there has P = 0
        lse = tl.load(lse_ptr + tl.program_id(1) * n + rows, mask=rows < n, other=float("inf"))
        p = tl.exp2(dot_heads(k0, k1, q0, q1, D1) * scale - lse[None, :])  # (keys, queries)
        p = tl.where(cols[:, None] < m, p, 0.0)
        dv0, dv1 = dot_onto(p.to(do0.dtype), do0, do1, dv0, dv1, D1)
        ds = (p * (dot_heads(v0, v1, do0, do1, D1) - delta[None, :])).to(q0.dtype)
        dk0, dk1 = dot_onto(ds, q0, q1, dk0, dk1, D1)
        dq0, dq1 = zeros(BLOCK_M, D0, D1)
        dq0, dq1 = dot_onto(tl.trans(ds), k0, k1, dq0, dq1, D1)
        store_head(dq_ptr + dense, dq0 * sm_scale, dq1 * sm_scale, rows, n, nh * HD, HD, D0, D1)
    batch = tl.num_programs(1) // nh
    part_ptr += ((tl.program_id(0) * 2 * batch + b) * m * nh + h) * HD
    store_head(part_ptr, dk0 * sm_scale, dk1 * sm_scale, cols, m, nh * HD, HD, D0, D1)
    store_head(part_ptr + batch * m * nh * HD, dv0, dv1, cols, m, nh * HD, HD, D0, D1)


@triton.jit
def _sum_kernel(
    part_ptr,  # (splits, size) fp32
    sum_ptr,  # (size,)
    splits, size,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for s in range(splits):
        total += tl.load(part_ptr + s * size + at, mask=at < size, other=0.0)
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=at < size)


# ------------------------------ Launchers


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads_dense(t) for t in (q, k, v))
    b, n, nh, hd = q.shape
    m = k.shape[1]
    o, lse = q.new_empty(q.shape), q.new_empty(b, nh, n, dtype=torch.float32)
    whole = L.power_of_two(m, 16)
    k0 = max(16, whole // 2)
    k1 = L.power_of_two(m - k0, 16) if m > k0 else 0
    keys = dict(K0=k0, K1=k1) if 0 < k1 < k0 else dict(K0=whole, K1=0)
    tile = L.tile("cross_attention_fwd", shape_class(hd), q.device)
    # Several tiles of queries for one load of K and V, as long as every multiprocessor still has work
    tiles = L.cdiv(n, tile["BLOCK_M"])
    repeat = 4 if tiles * b * nh >= 2 * PLENTY else 2 if tiles * b * nh >= PLENTY else 1
    args = (q, k, v, o, lse, LOG2E / math.sqrt(hd), *arguments(q, k, v))
    L.launch(_fwd_kernel, (L.cdiv(tiles, repeat), b * nh), *args, **split(hd), **keys, REPEAT=repeat, **tile)
    return o, lse


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dq, and dk and dv as one tensor (2, b, m, nh, hd)."""
    if q.shape[-1] > 80:
        dq, dk, dv = attention.backward(do, q, k, v, o, lse)
        return dq, torch.stack((dk, dv))
    q, k, v = (heads_dense(t) for t in (q, k, v))
    do = do.contiguous()
    b, n, nh, hd = q.shape
    m = k.shape[1]
    tile = L.tile("cross_attention_bwd", shape_class(hd), q.device)
    # Two programs a multiprocessor of the largest chips, and few enough partial sums
    most_splits = min(8, L.cdiv(264, b * nh))
    split_rows = tile["BLOCK_M"] * L.cdiv(L.cdiv(n, tile["BLOCK_M"]), most_splits)
    splits = L.cdiv(n, split_rows)
    dq, dkv = q.new_empty(q.shape), k.new_empty(2, *k.shape)
    part = q.new_empty(splits, *dkv.shape, dtype=torch.float32)
    scalars = (LOG2E / math.sqrt(hd), 1 / math.sqrt(hd), *arguments(q, k, v), split_rows)
    keys = L.power_of_two(m, 16)
    tensors = (q, k, v, o, do, lse, dq, part)
    L.launch(_bwd_kernel, (splits, b * nh), *tensors, *scalars, **split(hd), KEYS=keys, **tile)
    grid = (L.cdiv(dkv.numel(), 1024),)
    L.launch(_sum_kernel, grid, part, dkv, splits, dkv.numel(), BLOCK_N=1024, num_warps=4)
    return dq, dkv


# ------------------------------ The torch operator


@torch.library.custom_op("minisd::cross_attention", mutates_args=(), device_types="cuda")
def cross_attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o (b, n, nh, hd) dense, and the log-sum-exp (b, nh, n) that the backward needs."""
    return forward(q, k, v)


@cross_attention_op.register_kernel("cpu")
def _(q, k, v):
    return forward(q, k, v) if L.INTERPRET else attention.attention_op(q, k, v)


cross_attention_op.register_fake(attention.fake)


@torch.library.custom_op("minisd::cross_attention_bwd", mutates_args=(), device_types="cuda")
def cross_attention_bwd_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return backward(do, q, k, v, o, lse)


@cross_attention_bwd_op.register_kernel("cpu")
def _(do, q, k, v, o, lse):
    if L.INTERPRET:
        return backward(do, q, k, v, o, lse)
    dq, dk, dv = attention.attention_bwd_op(do, q, k, v, o, lse)
    return dq, torch.stack((dk, dv))


@cross_attention_bwd_op.register_fake
def _(do, q, k, v, o, lse):
    return q.new_empty(q.shape), k.new_empty(2, *k.shape)


def _autograd(ctx, do, dlse):
    dq, dkv = cross_attention_bwd_op(do, *ctx.saved_tensors)
    return dq, dkv[0], dkv[1]


cross_attention_op.register_autograd(_autograd, setup_context=attention.setup_context)
_eager = L.function(forward, attention.setup_context, _autograd)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v: q (b, n, nh, hd), k and v (b, m, nh, hd) to (b, n, nh, hd)."""
    return L.call(cross_attention_op, _eager, q, k, v)[0]


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """An empty string if the kernels take these, else the reason."""
    if k.shape[1] > MAX_KEYS:
        return f"{k.shape[1]} keys, the single pass takes {MAX_KEYS}"
    return attention.why_not(q, k, v)
