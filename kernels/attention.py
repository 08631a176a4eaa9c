"""Attention without the score matrix in memory: softmax(q k^T / sqrt(hd)) v, forward and backward.

Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691. Letters: b batch, nh heads, hd head width, n queries
and m keys; q (b, n, nh, hd) and k, v (b, m, nh, hd) lie as the projections write them, or as slices of one
fused QKV product. A head is a pair of tiles (x0, x1): see heads.py.

The backward takes two kernels, queries then keys, so that each sum stays in registers: no atomics, the same
bits in every run. The price is a second computation of the scores.
"""

import math

import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
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

# ------------------------------ Reference


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the kernels compute, in plain torch; q (b, n, nh, hd), k and v (b, m, nh, hd)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, nh, n, hd)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (b, n, nh, hd)


# ------------------------------ Forward


@triton.jit
def _scores(q0, q1, k_ptr, start, m, stride_kn, HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
            EVEN: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """q k^T for one tile of keys, unscaled; minus infinity where there is no key."""
    cols = start + tl.arange(0, BLOCK_N)
    k0, k1 = load_head(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN)
    s = dot_heads(q0, q1, k0, k1, D1)
    if not EVEN:
        s = tl.where(cols[None, :] < m, s, float("-inf"))
    return s


@triton.jit
def _fwd_kernel(
    q_ptr,  # (b, n, nh, hd): strides (stride_qb, stride_qn, hd, 1)
    k_ptr,  # (b, m, nh, hd)
    v_ptr,  # (b, m, nh, hd)
    o_ptr,  # (b, n, nh, hd) dense
    lse_ptr,  # (b, nh, n) fp32: log2 of the sum of exp2(scaled scores)
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    ANCHOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b.to(tl.int64) * stride_qb + h * HD
    k_ptr += b.to(tl.int64) * stride_kb + h * HD
    v_ptr += b.to(tl.int64) * stride_vb + h * HD
    q0, q1 = load_head(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
    acc0, acc1 = zeros(BLOCK_M, D0, D1)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    tl.assume(m > 0)  # without it the compiler keeps a path around the loop, and wgmma is serialised
    redo = True
    if ANCHOR:
        # bf16 reaches as far as fp32, so scores need not be taken from the running maximum: that of the first
        # keys will do, and the loop loses its maximum, shuffles and rescaling. Only overflow can go wrong.
        s = _scores(q0, q1, k_ptr, 0, m, stride_kn, HD, D0, D1, EVEN_M, BLOCK_N)
        top = tl.max(s, 1) * scale
        for start in range(0, m, BLOCK_N):
            s = _scores(q0, q1, k_ptr, start, m, stride_kn, HD, D0, D1, EVEN_M, BLOCK_N)
            p = tl.exp2(s * scale - top[:, None])
            total += tl.sum(p, 1)
            v0, v1 = load_head(v_ptr, start + tl.arange(0, BLOCK_N), m, stride_vn, HD, D0, D1, EVEN_M)
            acc0, acc1 = dot_onto(p.to(v0.dtype), v0, v1, acc0, acc1, D1)
        redo = tl.max(tl.where(total < 1e30, 0, 1), 0) > 0  # also true for inf and nan
        if redo:
            acc0, acc1 = zeros(BLOCK_M, D0, D1)
            total = tl.zeros((BLOCK_M,), tl.float32)
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if redo:
        for start in range(0, m, BLOCK_N):
            s = _scores(q0, q1, k_ptr, start, m, stride_kn, HD, D0, D1, EVEN_M, BLOCK_N)
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            old = tl.exp2(top - new_top)
            total = total * old + tl.sum(p, 1)
            acc0 *= old[:, None]
            if D1 > 0:
                acc1 *= old[:, None]
            v0, v1 = load_head(v_ptr, start + tl.arange(0, BLOCK_N), m, stride_vn, HD, D0, D1, EVEN_M)
            acc0, acc1 = dot_onto(p.to(v0.dtype), v0, v1, acc0, acc1, D1)
            top = new_top
    lse_ptr += tl.program_id(1) * n
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < n)
    o_ptr += b.to(tl.int64) * n * nh * HD + h * HD
    over = (1.0 / total)[:, None]
    store_head(o_ptr, acc0 * over, acc1 * over, rows, n, nh * HD, HD, D0, D1)


# ------------------------------ Backward

# P = exp2(S - lse)   dV = P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ = dS K   dK = dS^T Q
# with delta = rowsum(dO * O), which is rowsum(P * dP) without a pass over the scores.


@triton.jit
def _bwd_dq_kernel(
    q_ptr,  # (b, n, nh, hd) by strides, as in the forward
    k_ptr,  # (b, m, nh, hd) by strides
    v_ptr,  # (b, m, nh, hd) by strides
    o_ptr,  # (b, n, nh, hd) dense
    do_ptr,  # (b, n, nh, hd) dense
    lse_ptr,  # (b, nh, n) fp32
    delta_ptr,  # (b, nh, n) fp32, written for the other kernel
    dq_ptr,  # (b, n, nh, hd) dense
    scale, sm_scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b.to(tl.int64) * stride_qb + h * HD
    k_ptr += b.to(tl.int64) * stride_kb + h * HD
    v_ptr += b.to(tl.int64) * stride_vb + h * HD
    dense = b.to(tl.int64) * n * nh * HD + h * HD
    stats = tl.program_id(1) * n + rows
    q0, q1 = load_head(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
    do0, do1 = load_head(do_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
    o0, o1 = load_head(o_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
    delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta_ptr + stats, delta, mask=rows < n)
    lse = tl.load(lse_ptr + stats, mask=rows < n, other=float("inf"))
    dq0, dq1 = zeros(BLOCK_M, D0, D1)
    tl.assume(m > 0)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k0, k1 = load_head(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN_M)
        v0, v1 = load_head(v_ptr, cols, m, stride_vn, HD, D0, D1, EVEN_M)
        p = tl.exp2(dot_heads(q0, q1, k0, k1, D1) * scale - lse[:, None])
        if not EVEN_M:
            p = tl.where(cols[None, :] < m, p, 0.0)  # exp2(0 - lse) may be infinite, and inf * 0 is nan
        ds = p * (dot_heads(do0, do1, v0, v1, D1) - delta[:, None])
        dq0, dq1 = dot_onto(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)
    store_head(dq_ptr + dense, dq0 * sm_scale, dq1 * sm_scale, rows, n, nh * HD, HD, D0, D1)


@triton.jit
def _bwd_dkdv_kernel(
    q_ptr,  # (b, n, nh, hd) by strides, as in the forward
    k_ptr,  # (b, m, nh, hd) by strides
    v_ptr,  # (b, m, nh, hd) by strides
    do_ptr,  # (b, n, nh, hd) dense
    lse_ptr,  # (b, nh, n) fp32
    delta_ptr,  # (b, nh, n) fp32
    dk_ptr,  # (b, m, nh, hd) dense
    dv_ptr,  # (b, m, nh, hd) dense
    scale, sm_scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All transposed, (keys, queries): P^T and dS^T go from one product to the next in registers."""
    b, h = tl.program_id(1) // nh, tl.program_id(1) % nh
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += b.to(tl.int64) * stride_qb + h * HD
    k_ptr += b.to(tl.int64) * stride_kb + h * HD
    v_ptr += b.to(tl.int64) * stride_vb + h * HD
    do_ptr += b.to(tl.int64) * n * nh * HD + h * HD
    stats = tl.program_id(1) * n
    k0, k1 = load_head(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN_M)
    v0, v1 = load_head(v_ptr, cols, m, stride_vn, HD, D0, D1, EVEN_M)
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, D0, D1)
    tl.assume(n > 0)
    for start in range(0, n, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = load_head(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
        do0, do1 = load_head(do_ptr, rows, n, nh * HD, HD, D0, D1, EVEN_N)
        if EVEN_N:
            lse, delta = tl.load(lse_ptr + stats + rows), tl.load(delta_ptr + stats + rows)
        else:
            lse = tl.load(lse_ptr + stats + rows, mask=rows < n, other=float("inf"))  # no such row: P = 0
            delta = tl.load(delta_ptr + stats + rows, mask=rows < n, other=0.0)
        p = tl.exp2(dot_heads(k0, k1, q0, q1, D1) * scale - lse[None, :])  # (keys, queries)
        dv0, dv1 = dot_onto(p.to(do0.dtype), do0, do1, dv0, dv1, D1)
        ds = p * (dot_heads(v0, v1, do0, do1, D1) - delta[None, :])
        dk0, dk1 = dot_onto(ds.to(q0.dtype), q0, q1, dk0, dk1, D1)
    dense = b.to(tl.int64) * m * nh * HD + h * HD
    store_head(dk_ptr + dense, dk0 * sm_scale, dk1 * sm_scale, cols, m, nh * HD, HD, D0, D1)
    store_head(dv_ptr + dense, dv0, dv1, cols, m, nh * HD, HD, D0, D1)


# ------------------------------ Launchers


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads_dense(t) for t in (q, k, v))
    b, n, nh, hd = q.shape
    m = k.shape[1]
    o, lse = q.new_empty(q.shape), q.new_empty(b, nh, n, dtype=torch.float32)
    tile = L.tile("attention_fwd", shape_class(hd), q.device)
    even = dict(EVEN_N=n % tile["BLOCK_M"] == 0, EVEN_M=m % tile["BLOCK_N"] == 0)
    args = (q, k, v, o, lse, LOG2E / math.sqrt(hd), *arguments(q, k, v))
    # fp16 ends at 65504: weights above the anchor would overflow where bf16 and fp32 do not
    tile["ANCHOR"] = tile.get("ANCHOR", False) and q.dtype != torch.float16
    L.launch(_fwd_kernel, (L.cdiv(n, tile["BLOCK_M"]), b * nh), *args, **split(hd), **even, **tile)
    return o, lse


def backward(do, q, k, v, o, lse) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads_dense(t) for t in (q, k, v))
    do = do.contiguous()
    b, n, nh, hd = q.shape
    m = k.shape[1]
    delta = torch.empty_like(lse)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    scalars = (LOG2E / math.sqrt(hd), 1 / math.sqrt(hd), *arguments(q, k, v))
    for op, kernel, tensors in (
        ("attention_bwd_dq", _bwd_dq_kernel, (q, k, v, o, do, lse, delta, dq)),
        ("attention_bwd_dkdv", _bwd_dkdv_kernel, (q, k, v, do, lse, delta, dk, dv)),
    ):
        tile = L.tile(op, shape_class(hd), q.device)
        even = dict(EVEN_N=n % tile["BLOCK_M"] == 0, EVEN_M=m % tile["BLOCK_N"] == 0)
        blocks = L.cdiv(n, tile["BLOCK_M"]) if kernel is _bwd_dq_kernel else L.cdiv(m, tile["BLOCK_N"])
        L.launch(kernel, (blocks, b * nh), *tensors, *scalars, **split(hd), **even, **tile)
    return dq, dk, dv


# ------------------------------ The torch operator


@torch.library.custom_op("minisd::attention", mutates_args=(), device_types="cuda")
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o (b, n, nh, hd) dense, and the log-sum-exp (b, nh, n) that the backward needs."""
    return forward(q, k, v)


@attention_op.register_kernel("cpu")
def _(q, k, v):
    if L.INTERPRET:
        return forward(q, k, v)
    s = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * (LOG2E / math.sqrt(q.shape[-1]))
    return reference(q, k, v).contiguous(), torch.logsumexp(s / LOG2E, -1) * LOG2E


@attention_op.register_fake
def fake(q, k, v):
    b, n, nh, hd = q.shape
    return q.new_empty(q.shape), q.new_empty(b, nh, n, dtype=torch.float32)


@torch.library.custom_op("minisd::attention_bwd", mutates_args=(), device_types="cuda")
def attention_bwd_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(do, q, k, v, o, lse)


@attention_bwd_op.register_kernel("cpu")
def _(do, q, k, v, o, lse):
    if L.INTERPRET:
        return backward(do, q, k, v, o, lse)
    do_, q_, k_, v_, o_ = (t.float().transpose(1, 2) for t in (do, q, k, v, o))  # (b, nh, n, hd)
    scale = 1 / math.sqrt(q.shape[-1])
    p = torch.exp2(q_ @ k_.mT * (scale * LOG2E) - lse[..., None])  # (b, nh, n, m)
    ds = p * (do_ @ v_.mT - (do_ * o_).sum(-1, True)) * scale
    grads = ds @ k_, ds.mT @ q_, p.mT @ do_
    return tuple(g.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format) for g in grads)


@attention_bwd_op.register_fake
def _(do, q, k, v, o, lse):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def setup_context(ctx, inputs, output):
    # no zeros for outputs without a gradient: each would be a launch
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _autograd(ctx, do, dlse):
    return attention_bwd_op(do, *ctx.saved_tensors)


attention_op.register_autograd(_autograd, setup_context=setup_context)
_eager = L.function(forward, setup_context, _autograd)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v: q (b, n, nh, hd), k and v (b, m, nh, hd) to (b, n, nh, hd)."""
    return L.call(attention_op, _eager, q, k, v)[0]


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """An empty string if the kernels take these, else the reason."""
    hd = q.shape[-1]
    if hd % 8 or hd > 160:
        return f"head width {hd}, the kernels take multiples of 8 up to 160"
    if not (q.dtype == k.dtype == v.dtype):
        return "q, k and v differ in type"
    if q.shape[0] * q.shape[2] > 65535:
        return "more than 65535 heads in the batch"
    return L.why_not(q, k, v)
