"""The sum of partial sums over their first dimension, in a fixed order: what the backwards of several kernels end
with, where others would add with atomics."""

import minisd.kernels.launch as L
import triton
import triton.language as tl
from torch import Tensor

TILE = dict(BLOCK_S=32, BLOCK_N=32, num_warps=4)


@triton.jit
def _sum_kernel(
    part_ptr,  # (splits, size) fp32
    sum_ptr,  # (size,)
    splits, size,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        ok = (s < splits)[:, None] & (at < size)[None, :]
        rows = part_ptr + s.to(tl.int64)[:, None] * size
        total += tl.load(rows + at[None, :], mask=ok, other=0.0)
    tl.store(sum_ptr + at, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=at < size)


def launch(splits: int, size: int) -> L.Launch:
    """Return the launch for part (splits, ...) in fp32 and sum (...), of `size` elements."""
    tile = TILE | dict(BLOCK_S=min(TILE["BLOCK_S"], L.power_of_two(splits)))
    tile["BLOCK_N"] = TILE["BLOCK_S"] * TILE["BLOCK_N"] // tile["BLOCK_S"]
    return L.Launch(_sum_kernel, (L.cdiv(size, tile["BLOCK_N"]),), (splits, size), **tile)
