"""Partial sums added up in a fixed order: what backwards end with, where others would use atomics."""

import minisd.kernels.launch as L
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(
    part_ptr,  # (splits, 2, size) fp32
    first_ptr, second_ptr,  # (size,)
    splits, size,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    half, at = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = part_ptr + (s.to(tl.int64) * 2 + half)[:, None] * size
        total += tl.load(rows + at[None, :], mask=(s < splits)[:, None] & (at < size)[None, :], other=0.0)
    sum_ptr = second_ptr if half else first_ptr
    tl.store(sum_ptr + at, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=at < size)


def add_up(part: Tensor, first: Tensor, second: Tensor) -> None:
    """Write the sum over the first dimension of part (splits, 2, ...) to `first` and `second`."""
    splits, size = len(part), first.numel()
    block = min(32, L.power_of_two(splits))
    tile = dict(BLOCK_S=block, BLOCK_N=1024 // block, num_warps=4)
    L.launch(_sum_kernel, (L.cdiv(size, tile["BLOCK_N"]), 2), part, first, second, splits, size, **tile)
