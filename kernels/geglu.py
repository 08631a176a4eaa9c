"""GEGLU: a * gelu(g) with the exact gelu, for x = [a, g] in the last dimension, forward and backward.

Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202. Eager torch writes gelu(g), the
largest tensor of a transformer block, and reads it back; here x is read once, and only x is kept.
"""

import dataclasses
import math

import minisd.kernels.launch as L
import torch.nn.functional as F
import triton
import triton.language as tl
from minisd.kernels.kernel import Case, Kernel
from torch import Tensor


def reference(x: Tensor) -> Tensor:
    """The same operation in plain torch: x (..., 2 d) -> (..., d)."""
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


@triton.jit
def geglu_kernel(
    x_ptr,  # (rows, 2 d)
    dy_ptr,  # (rows, d), read if BACKWARD
    out_ptr,  # y (rows, d), or dx (rows, 2 d): never the memory of x, which another backward may still need
    d,
    BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = col < d
    x_ptr += row * 2 * d
    a = tl.load(x_ptr + col, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + d + col, mask=ok, other=0.0).to(tl.float32)
    phi = 0.5 * tl.erf(g * 0.7071067811865476) + 0.5  # the standard normal distribution function
    if BACKWARD:
        dy = tl.load(dy_ptr + row * d + col, mask=ok, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp2(g * g * -0.7213475204444817)  # exp(-g^2 / 2) / sqrt(2 pi)
        out_ptr += row * 2 * d
        tl.store(out_ptr + col, (dy * g * phi).to(out_ptr.dtype.element_ty), mask=ok)
        dg = dy * a * (phi + g * density)
        tl.store(out_ptr + d + col, dg.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(out_ptr + row * d + col, (a * g * phi).to(out_ptr.dtype.element_ty), mask=ok)


def launchers(**tile: int) -> dict:
    """Return the launchers `forward` and `backward` with this tile."""

    def launch(x: Tensor, dy: Tensor, out: Tensor, **flags) -> Tensor:
        d = x.shape[-1] // 2
        grid = x.numel() // (2 * d), L.cdiv(d, tile["BLOCK_N"])
        L.launch(geglu_kernel, grid, x, dy, out, d, **flags, **tile)
        return out

    def forward(x: Tensor) -> Tensor:
        x = x.contiguous()
        return launch(x, x, L.empty(x, *x.shape[:-1], x.shape[-1] // 2), BACKWARD=False)

    def backward(dy: Tensor, x: Tensor) -> Tensor:
        x = x.contiguous()
        return launch(x, dy.contiguous(), L.empty(x), BACKWARD=True)

    return dict(forward=forward, backward=backward)


def unsupported(x: Tensor) -> str:
    if x.shape[-1] % 2:
        return f"{x.shape[-1]} columns do not divide in two"
    large = x.numel() > L.INT32 * x.shape[-1] or x.shape[-1] > 512 * L.GRID_YZ
    return "more than 2^31 rows, or rows too long for the grid" if large else ""


def case(name: str, *shape: int, scale: float = 1.0) -> Case:
    elements = 3 * math.prod(shape) // 2
    return Case(name, lambda randn: (dict(x=randn(*shape) * scale), {}), elements=elements, back=5 / 3)


KERNEL = Kernel(
    name="geglu", reference=reference, unsupported=unsupported, **launchers(BLOCK_N=1024, num_warps=4),
    save=lambda inputs, outputs: inputs,
    size_class=lambda x: f"{x[-1] // 2} x{L.power_of_two(math.prod(x[:-1]))}",
    cases=[
        case("tokens", 2, 5, 128),
        case("wider than a tile, ragged", 3, 2 * 1300),
        case("one row of one", 1, 2),
        case("far out on both sides", 4, 64, scale=6.0),
    ],
    timed=[
        case(f"b{b} {n}x{d}", b, n, 2 * d)
        for b in (2, 8) for n, d in ((4096, 1280), (1024, 2560), (256, 5120))
    ],
)  # fmt: skip
# Divides every width of Stable Diffusion, so that no lane idles; but takes more registers a thread
narrow = dict(name="geglu_narrow", **launchers(BLOCK_N=256, num_warps=1))
KERNEL.variants = (dataclasses.replace(KERNEL, **narrow),)
