"""Attention without the score matrix in memory: softmax(q k^T / sqrt(hd)) v, forward and backward.

Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691. Letters: b batch, nh heads, hd head width, n queries
and m keys; q (b, n, nh, hd) and k, v (b, m, nh, hd) in the layout that the projections write, or slices of
one fused QKV product. A head is a pair of tiles (x0, x1): see heads.py.

The backward takes two kernels, one for queries and one for keys, so that each sum stays in registers: no
atomics, the same bits in every run. The price is a second computation of the scores.
"""

import dataclasses
from collections.abc import Callable

import minisd.kernels.heads as heads
import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minisd.kernels.kernel import Case, Kernel
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same operation in plain torch; q (b, n, nh, hd), k and v (b, m, nh, hd)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, nh, n, hd)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (b, n, nh, hd)


# ------------------------------ Forward


@triton.jit
def _scores(q0, q1, k_ptr, start, m, stride_kn, HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
            EVEN: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Return q k^T for one tile of keys, unscaled; minus infinity where there is no key."""
    cols = start + tl.arange(0, BLOCK_N)
    k0, k1 = heads.load(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN)
    s = heads.dot(q0, q1, k0, k1, D1)
    if not EVEN:
        s = tl.where(cols[None, :] < m, s, float("-inf"))
    return s


@triton.jit
def _attend(q0, q1, k_ptr, v_ptr, scale, m, stride_kn, stride_vn, HD: tl.constexpr, D0: tl.constexpr,
            D1: tl.constexpr, EVEN: tl.constexpr, ANCHOR: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Return P V before division by the row sums of P, these sums, and the row maxima subtracted in P.

    With ANCHOR the maximum is that of the first tile of keys, which saves the running maximum, its shuffles
    and the rescaling. bf16 has fp32's range, so the result is right unless a sum overflows.
    """
    acc0, acc1 = heads.zeros(q0.shape[0], D0, D1)
    total = tl.zeros((q0.shape[0],), tl.float32)
    top = tl.full((q0.shape[0],), float("-inf"), tl.float32)
    if ANCHOR:
        top = tl.max(_scores(q0, q1, k_ptr, 0, m, stride_kn, HD, D0, D1, EVEN, BLOCK_N), 1) * scale
    for start in range(0, m, BLOCK_N):
        s = _scores(q0, q1, k_ptr, start, m, stride_kn, HD, D0, D1, EVEN, BLOCK_N)
        if ANCHOR:
            p = tl.exp2(s * scale - top[:, None])
            total += tl.sum(p, 1)
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            old = tl.exp2(top - new_top)
            total = total * old + tl.sum(p, 1)
            acc0 *= old[:, None]
            if D1 > 0:
                acc1 *= old[:, None]
            top = new_top
        v0, v1 = heads.load(v_ptr, start + tl.arange(0, BLOCK_N), m, stride_vn, HD, D0, D1, EVEN)
        acc0, acc1 = heads.dot_onto(p.to(v0.dtype), v0, v1, acc0, acc1, D1)
    return acc0, acc1, total, top


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    ANCHOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr, k_ptr, v_ptr = heads.at_head(q_ptr, k_ptr, v_ptr, stride_qb, stride_kb, stride_vb, nh, HD)
    q0, q1 = heads.load(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
    tl.assume(m > 0)  # without it the compiler keeps a path around the loop, and wgmma is serialised
    acc0, acc1, total, top = _attend(
        q0, q1, k_ptr, v_ptr, scale, m, stride_kn, stride_vn, HD, D0, D1, EVEN_M, ANCHOR, BLOCK_N
    )
    if ANCHOR:
        if tl.max(tl.where(total < 1e30, 0, 1), 0) > 0:  # also true for inf and nan
            acc0, acc1, total, top = _attend(
                q0, q1, k_ptr, v_ptr, scale, m, stride_kn, stride_vn, HD, D0, D1, EVEN_M, False, BLOCK_N
            )
    lse_ptr += tl.program_id(1).to(tl.int64) * n
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < n)
    o_ptr += heads.dense_offset(n, nh, HD)
    over = (1.0 / total)[:, None]
    heads.store(o_ptr, acc0 * over, acc1 * over, rows, n, nh * HD, HD, D0, D1)


# ------------------------------ Backward

# P = exp2(S - lse)   dV = P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ = dS K   dK = dS^T Q
# with delta = rowsum(dO * O), which is rowsum(P * dP) without a pass over the scores.


@triton.jit
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dq, and delta for `bwd_dkdv_kernel`."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr, k_ptr, v_ptr = heads.at_head(q_ptr, k_ptr, v_ptr, stride_qb, stride_kb, stride_vb, nh, HD)
    dense = heads.dense_offset(n, nh, HD)
    stats = tl.program_id(1).to(tl.int64) * n + rows
    q0, q1 = heads.load(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
    do0, do1 = heads.load(do_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
    o0, o1 = heads.load(o_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
    delta = heads.row_sums(do0, do1, o0, o1, D1)
    tl.store(delta_ptr + stats, delta, mask=rows < n)
    lse = tl.load(lse_ptr + stats, mask=rows < n, other=float("inf"))
    dq0, dq1 = heads.zeros(BLOCK_M, D0, D1)
    tl.assume(m > 0)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k0, k1 = heads.load(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN_M)
        v0, v1 = heads.load(v_ptr, cols, m, stride_vn, HD, D0, D1, EVEN_M)
        p = tl.exp2(heads.dot(q0, q1, k0, k1, D1) * scale - lse[:, None])
        if not EVEN_M:
            p = tl.where(cols[None, :] < m, p, 0.0)  # exp2(0 - lse) may be infinite, and inf * 0 is nan
        ds = p * (heads.dot(do0, do1, v0, v1, D1) - delta[:, None])
        dq0, dq1 = heads.dot_onto(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)
    heads.store(dq_ptr + dense, dq0 * HD**-0.5, dq1 * HD**-0.5, rows, n, nh * HD, HD, D0, D1)


@triton.jit
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, split_rows,
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dk and dv. Scores are transposed, (keys, queries), so that P^T and dS^T stay in registers.

    With SPLIT a program has all the keys, and split_rows of the queries. It computes delta, writes dq, and to
    dk_ptr, which is dv_ptr, its share of dk and dv: (splits, 2, b, m, nh, hd) fp32.
    """
    i, stats = tl.program_id(0), tl.program_id(1).to(tl.int64) * n
    cols = tl.arange(0, BLOCK_N) if SPLIT else i * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr, k_ptr, v_ptr = heads.at_head(q_ptr, k_ptr, v_ptr, stride_qb, stride_kb, stride_vb, nh, HD)
    dense = heads.dense_offset(n, nh, HD)
    k0, k1 = heads.load(k_ptr, cols, m, stride_kn, HD, D0, D1, EVEN_M)
    v0, v1 = heads.load(v_ptr, cols, m, stride_vn, HD, D0, D1, EVEN_M)
    dk0, dk1 = heads.zeros(BLOCK_N, D0, D1)
    dv0, dv1 = heads.zeros(BLOCK_N, D0, D1)
    tl.assume(split_rows > 0)
    for start in range(0, split_rows, BLOCK_M):
        rows = (i * split_rows if SPLIT else 0) + start + tl.arange(0, BLOCK_M)
        q0, q1 = heads.load(q_ptr, rows, n, stride_qn, HD, D0, D1, EVEN_N)
        do0, do1 = heads.load(do_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
        ok = (rows < n) | EVEN_N
        lse = tl.load(lse_ptr + stats + rows, mask=ok, other=float("inf"))  # no such row: P = 0
        delta = tl.load(delta_ptr + stats + rows, mask=ok, other=0.0)
        if SPLIT:
            o0, o1 = heads.load(o_ptr + dense, rows, n, nh * HD, HD, D0, D1, EVEN_N)
            delta = heads.row_sums(do0, do1, o0, o1, D1)
        p = tl.exp2(heads.dot(k0, k1, q0, q1, D1) * scale - lse[None, :])  # (keys, queries)
        if SPLIT:
            p = tl.where(cols[:, None] < m, p, 0.0)
        dv0, dv1 = heads.dot_onto(p.to(do0.dtype), do0, do1, dv0, dv1, D1)
        ds = (p * (heads.dot(v0, v1, do0, do1, D1) - delta[None, :])).to(q0.dtype)
        dk0, dk1 = heads.dot_onto(ds, q0, q1, dk0, dk1, D1)
        if SPLIT:
            dq0, dq1 = heads.zeros(BLOCK_M, D0, D1)
            dq0, dq1 = heads.dot_onto(tl.trans(ds), k0, k1, dq0, dq1, D1)
            heads.store(dq_ptr + dense, dq0 * HD**-0.5, dq1 * HD**-0.5, rows, n, nh * HD, HD, D0, D1)
    dense = heads.dense_offset(m, nh, HD)
    if SPLIT:
        plane = (tl.num_programs(1) // nh).to(tl.int64) * m * nh * HD
        dk_ptr += 2 * i * plane
        dv_ptr += (2 * i + 1) * plane
    heads.store(dk_ptr + dense, dk0 * HD**-0.5, dk1 * HD**-0.5, cols, m, nh * HD, HD, D0, D1)
    heads.store(dv_ptr + dense, dv0, dv1, cols, m, nh * HD, HD, D0, D1)


# ------------------------------ Launchers


def launcher(*, anchor: bool) -> Callable:
    """Return the forward's launcher. ANCHOR is not for fp16, which ends at 65504: exponentials above the
    anchor would overflow there, where those of bf16 and fp32 do not."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return o (b, n, nh, hd), dense, and the log-sum-exp (b, nh, n) in fp32 for the backward."""
        q, k, v = (heads.dense(t) for t in (q, k, v))
        b, n, nh, _ = q.shape
        o, lse = L.empty(q, *q.shape), L.empty(q, b, nh, n, dtype=torch.float32)
        _launch(_fwd_kernel, FWD_TILES, q, k, v, o, lse, ANCHOR=anchor)
        return o, lse

    return forward


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads.dense(t) for t in (q, k, v))
    do = do.contiguous()
    dq, dk, dv = (L.empty(t, *t.shape) for t in (q, k, v))
    both = q, k, v, o, do, lse, L.empty(lse), dq
    _launch(_bwd_dq_kernel, DQ_TILES, *both)
    _launch(bwd_dkdv_kernel, DKDV_TILES, *both, dk, dv, q.shape[1], keys=True, SPLIT=False)
    return dq, dk, dv


def _launch(kernel, tiles: dict, q: Tensor, k: Tensor, *rest, keys: bool = False, **flags) -> None:
    """Launch a program for every tile of queries of every head, or for every one of `keys`."""
    BLOCK_M, BLOCK_N, warps = L.pick(tiles, q.shape[-1], q.device)
    n, m = q.shape[1], k.shape[1]
    flags |= dict(EVEN_N=n % BLOCK_M == 0, EVEN_M=m % BLOCK_N == 0, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    blocks = L.cdiv(m, BLOCK_N) if keys else L.cdiv(n, BLOCK_M)
    heads.launch(kernel, blocks, q, k, *rest, **flags, num_warps=warps, num_stages=2)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str:
    hd = q.shape[-1]
    if hd % 8 or hd > 160:
        return f"head width {hd}, the kernels take multiples of 8 up to 160"
    if q.shape[0] * q.shape[2] > L.GRID_YZ:
        return f"more than {L.GRID_YZ} heads in the batch"
    if any(t.shape[1] * max(t.stride(1), t.shape[2] * hd) > L.INT32 for t in (q, k, v)):
        return "more than 2^31 elements in a sample"
    return ""


# ------------------------------ Tiles and cases


# By head width, up to 160: queries and keys of a tile, and warps. Chosen by compiling, not yet by timing:
# aot.py prints the registers.
FWD_TILES = {
    64: {80: (64, 64, 4), 90: (128, 64, 8)},
    80: {80: (64, 64, 4)},
    160: {80: (64, 32, 4), 90: (64, 64, 4)},
}
DQ_TILES = {
    64: {80: (64, 64, 4)},
    128: {80: (64, 32, 4), 90: (64, 64, 4)},
    160: {80: (64, 32, 4), 90: (64, 64, 4), 120: (32, 32, 4)},
}
DKDV_TILES = {
    80: {80: (32, 64, 4), 90: (64, 64, 4)},
    128: {80: (32, 64, 8), 90: (32, 64, 4)},
    160: {80: (16, 64, 8), 90: (32, 64, 8)},
}


def case(name: str, b: int, n: int, m: int, nh: int, hd: int, *, scale=1.0, equal=False, apart=0.0) -> Case:
    """`equal`: all logits are the same; `apart`: queries and keys point away from each other, so that all
    logits are far below zero."""

    def make(randn):
        q, k, v = randn(b, n, nh, hd) * scale + apart, randn(b, m, nh, hd) - apart, randn(b, m, nh, hd)
        return dict(q=q, k=k[:, :1].expand_as(k) if equal else k, v=v), {}

    scores = b * nh * n * m
    return Case(name, make, flops=4.0 * scores * hd, elements=2 * b * nh * hd * (n + m), exps=scores)


# Stable Diffusion's batch, tokens and head width, at 512 and at 768 pixels
SIZES = [(b, n, hd) for b in (2, 8) for n, hd in ((4096, 40), (1024, 80), (256, 160))]
SIZES += [(2, 9216, 40), (2, 2304, 80), (2, 576, 160), (2, 144, 160)]

KERNEL = Kernel(
    name="attention", reference=reference, unsupported=unsupported, dtypes=L.HALF,
    forward=launcher(anchor=False), backward=backward, size_class=heads.size_class,
    cases=[
        case("40 = 32 + 16, two heads", 1, 64, 128, 2, 40),
        case("80 = 64 + 16, ragged, batch 3", 3, 33, 70, 1, 80),
        case("160 = 128 + 32", 1, 64, 64, 1, 160),
        case("64, one tile", 1, 128, 64, 1, 64),
        case("32", 1, 64, 100, 2, 32),
        case("8, padded to 16", 1, 70, 9, 2, 8),
        case("96 = 64 + 32", 1, 20, 77, 1, 96),
        case("128", 1, 64, 33, 1, 128),
        case("one query, one key", 2, 1, 1, 3, 40),
        case("one query row", 1, 1, 130, 2, 40),
        case("peaked logits", 1, 64, 128, 1, 40, scale=30.0),
        case("all logits equal", 1, 64, 100, 1, 40, equal=True),
        case("all logits far below zero", 1, 70, 77, 1, 40, apart=5.0),
    ],
    timed=[case(f"self b{b} {n}x{n} hd{hd}", b, n, n, 8, hd) for b, n, hd in SIZES],
    compiled=[case(f"self 1024x1024 hd{hd}", 2, 1024, 1024, 8, hd) for hd in (32, 64, 128)],
)  # fmt: skip
anchored = dict(name="attention_anchored", forward=launcher(anchor=True), dtypes=(torch.bfloat16,))
KERNEL.variants = (dataclasses.replace(KERNEL, **anchored),)
