"""Attention to a short text: at most 128 keys, so that a program holds all of K and V.

The softmax is then exact in one pass, with no running maximum, and one backward kernel reads everything once:
it writes dQ, and dK and dV of its share of the queries, which a second kernel sums in a fixed order. Letters
and reference as in attention.py. CLIP's 77 keys are tiles of 64 + 16 in the forward and one of 128 in the
backward, where two would need two sets of sums. Heads that are too wide for it use attention.py's backward.
"""

import minisd.kernels.attention as attention
import minisd.kernels.heads as heads
import minisd.kernels.launch as L
import torch
import triton
import triton.language as tl
from minisd.kernels.kernel import Kernel
from torch import Tensor

MAX_KEYS = 128
BUSY_PROGRAMS = 1024  # twice as many programs as keep every multiprocessor busy

# ------------------------------ Forward


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    scale, n, m, nh, stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    HD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Process REPEAT tiles of queries with one load of K and V; the keys are K0 (a) and then K1 (b)."""
    q_ptr, k_ptr, v_ptr = heads.at_head(q_ptr, k_ptr, v_ptr, stride_qb, stride_kb, stride_vb, nh, HD)
    o_ptr += heads.dense_offset(n, nh, HD)
    a = tl.arange(0, K0)
    ka0, ka1 = heads.load(k_ptr, a, m, stride_kn, HD, D0, D1, False)
    va0, va1 = heads.load(v_ptr, a, m, stride_vn, HD, D0, D1, False)
    if K1 > 0:
        c = K0 + tl.arange(0, K1)
        kb0, kb1 = heads.load(k_ptr, c, m, stride_kn, HD, D0, D1, False)
        vb0, vb1 = heads.load(v_ptr, c, m, stride_vn, HD, D0, D1, False)
    for i in range(REPEAT):
        rows = (tl.program_id(0) * REPEAT + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        q0, q1 = heads.load(q_ptr, rows, n, stride_qn, HD, D0, D1, False)
        sa = tl.where(a[None, :] < m, heads.dot(q0, q1, ka0, ka1, D1) * scale, float("-inf"))
        top = tl.max(sa, 1)
        if K1 > 0:
            sb = tl.where(c[None, :] < m, heads.dot(q0, q1, kb0, kb1, D1) * scale, float("-inf"))
            top = tl.maximum(top, tl.max(sb, 1))
        pa = tl.exp2(sa - top[:, None])
        total = tl.sum(pa, 1)
        acc0, acc1 = heads.zeros(BLOCK_M, D0, D1)
        acc0, acc1 = heads.dot_onto(pa.to(va0.dtype), va0, va1, acc0, acc1, D1)
        if K1 > 0:
            pb = tl.exp2(sb - top[:, None])
            total += tl.sum(pb, 1)
            acc0, acc1 = heads.dot_onto(pb.to(vb0.dtype), vb0, vb1, acc0, acc1, D1)
        tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * n + rows, top + tl.log2(total), mask=rows < n)
        over = (1.0 / total)[:, None]
        heads.store(o_ptr, acc0 * over, acc1 * over, rows, n, nh * HD, HD, D0, D1)


# ------------------------------ Launchers


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return o (b, n, nh, hd), dense, and the log-sum-exp (b, nh, n) in fp32 for the backward."""
    q, k, v = (heads.dense(t) for t in (q, k, v))
    b, n, nh, hd = q.shape
    o, lse = L.empty(q, *q.shape), L.empty(q, b, nh, n, dtype=torch.float32)
    k0, k1 = heads.two_tiles(k.shape[1])
    block, warps = L.pick(FWD_TILES, hd, q.device)
    # Several tiles of queries per load of K and V, as long as every multiprocessor still has work
    tiles = L.cdiv(n, block)
    repeat = 4 if tiles * b * nh >= 2 * BUSY_PROGRAMS else 2 if tiles * b * nh >= BUSY_PROGRAMS else 1
    constants = dict(K0=k0, K1=k1, REPEAT=repeat, BLOCK_M=block, num_warps=warps)
    heads.launch(_fwd_kernel, L.cdiv(tiles, repeat), q, k, v, o, lse, **constants)
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tile = L.pick(BWD_TILES, q.shape[-1], q.device)
    if not tile:
        return attention.backward(do, q, k, v, o, lse)
    block, warps = tile
    q, k, v = (heads.dense(t) for t in (q, k, v))
    do = do.contiguous()
    b, n, nh, _ = q.shape
    # Two programs per multiprocessor of the largest GPUs, and at most 8 partial sums
    most_splits = min(8, L.cdiv(264, b * nh))
    split_rows = block * L.cdiv(L.cdiv(n, block), most_splits)
    splits = L.cdiv(n, split_rows)
    dq, dk, dv = (L.empty(t, *t.shape) for t in (q, k, v))
    part = L.empty(q, splits, 2, *k.shape, dtype=torch.float32)
    tile = dict(BLOCK_M=block, BLOCK_N=L.power_of_two(k.shape[1], 16), num_warps=warps)
    args = (q, k, v, o, do, lse, lse, dq, part, part, split_rows)  # computes delta where it would read it
    heads.launch(attention.bwd_dkdv_kernel, splits, *args, SPLIT=True, EVEN_N=False, EVEN_M=False, **tile)
    L.add_up(part, dk, dv)
    return dq, dk, dv


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str:
    if k.shape[1] > MAX_KEYS:
        return f"{k.shape[1]} keys, the single pass takes {MAX_KEYS}"
    return attention.unsupported(q, k, v)


# ------------------------------ Tiles and cases


# By head width: queries of a tile, and warps
FWD_TILES = {128: {80: (64, 4)}, 160: {80: (64, 8), 90: (64, 4), 120: (32, 8)}}
BWD_TILES = {  # without a tile, attention.py's backward
    32: {80: (64, 8)},
    40: {80: (32, 8), 90: (64, 8)},
    64: {80: (32, 8)},
    80: {80: (32, 8), 120: ()},
    160: {80: ()},
}
case = attention.case

KERNEL = Kernel(
    name="cross_attention", reference=attention.reference, unsupported=unsupported, dtypes=L.HALF,
    forward=forward, backward=backward, size_class=heads.size_class,
    cases=[
        case("77 keys, 40", 1, 128, 77, 2, 40),
        case("77 keys, 80, ragged, batch 3", 3, 70, 77, 1, 80),
        case("77 keys, 160", 1, 33, 77, 1, 160),
        case("one key", 2, 9, 1, 1, 8, scale=0.5),  # dk is zero, but for rounding that grows with q
        case("one query, 20 keys", 1, 1, 20, 2, 64),
        case("128 keys, 72 = 64 + 16", 1, 64, 128, 1, 72),
        case("peaked logits", 1, 64, 77, 1, 40, scale=30.0),
        case("all logits equal", 1, 64, 77, 1, 40, equal=True),
        case("all logits far below zero", 1, 64, 77, 1, 40, apart=5.0),
        case("many tiles: several a program, several splits", 1, 600, 13, 1, 8),
    ],
    timed=[  # at the lowest resolution, self-attention as well
        *(case(f"cross b{b} {n}x77 hd{hd}", b, n, 77, 8, hd) for b, n, hd in attention.SIZES),
        *(case(f"cross b{b} 64x{m} hd160", b, 64, m, 8, 160) for b in (2, 8) for m in (77, 64)),
    ],
    compiled=[case(f"cross 1024x77 hd{hd}", 2, 1024, 77, 8, hd) for hd in (32, 64, 128)],
)  # fmt: skip
