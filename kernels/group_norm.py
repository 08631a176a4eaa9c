"""GroupNorm with an optional addition per (sample, channel) before and an optional SiLU after it.

    y = silu(group_norm(x + add[:, :, None, None]))

Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494. Letters: b batch, c channels, n = h*w
pixels, g groups, s splits of the pixels. Channels-last and contiguous tensors run through the same kernels,
which see only strides: no tensor is copied into the other layout.

A large image takes three launches: of each split of the pixels the mean and the squared deviations of every
channel, a merge from channels to groups, and the normalisation itself. Partial results are per channel, so
that a group of 10 or 20 channels never cuts through a memory transaction; they are merged in a fixed order
(Chan et al. 1979), exact for a mean far from zero and bit-equal in every run. A group that fits the registers
of one program, at 8x8 and 16x16 pixels, takes one launch: `pass_kernel` then holds its GROUP_C channels from
load to store and computes the statistics itself; with GROUP_C = 0 it reads them. With BACKWARD the same three
kernels compute gradients. They recompute xhat and SiLU from x, so a training step keeps x and two numbers per
group.

Pointers, the same in every kernel:

    x, dy, out      (b, n, c) by strides; out is y or dx
    add, dadd       (b, c), read and written if HAS_ADD
    weight, bias    (c,)
    stats           (2, b, g) fp32: mean and rstd
    part            forward (2, b, s, c) fp32: mean of a split's pixels, sum of squared deviations from it
                    backward (3, b, s, c) fp32: sums over a split's pixels of dz, dz * xhat, xhat (if HAS_ADD)
    sums            (b, 2, c) fp32: sums over the pixels of dz and dz * xhat: each sample's dbias and dweight
    coef            (2, b, g) fp32: means over the group of weight * dz and weight * dz * xhat

All tiles of an image are on the grid's first axis, which alone takes more than 65,535. Offsets to the corner
of a tile are 64-bit: an image in the VAE may have 2^31 elements.
"""

import math

import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minisd.kernels.kernel import Case, Kernel
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
) -> Tensor:
    """The same operation in plain torch: x (b, c, ...), weight and bias (c,), add (b, c) or None."""
    if add is not None:
        x = x + add.reshape(*add.shape, *[1] * (x.ndim - 2))
    if not torch.is_autocast_enabled(x.device.type):  # which casts by itself
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


# ------------------------------ Kernels


@triton.jit
def tile_at(b, n, c, N, end, stride_b, stride_n, stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the offset of pixel n and channel c of sample b, the offsets (n, c) of a tile from there, and
    which of its pixels and channels there are, up to N and `end`."""
    rows, cols = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_C)[None, :]
    corner = b.to(tl.int64) * stride_b + tl.cast(n, tl.int64) * stride_n + tl.cast(c, tl.int64) * stride_c
    return corner, rows * stride_n + cols * stride_c, (n + rows < N) & (c + cols < end)


@triton.jit
def load_tile(ptr, at, ok):
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_row(ptr, c, ok):
    """Load one value per channel, (1, c) fp32: weight, bias, or a statistic of the channel's group."""
    return load_tile(ptr, c, ok)[None, :]


@triton.jit
def load_pair(ptr, b, B, c, c_ok, C, G):
    """Load from (2, b, g) what belongs to the channels' groups, twice (1, c) fp32."""
    group = b * G + c // (C // G)
    return load_row(ptr, group, c_ok), load_row(ptr, B * G + group, c_ok)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) by exp2 and rsqrt; exp and division would add six instructions for special cases."""
    r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return r * r


@triton.jit
def grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Return xhat and the gradient of xhat * weight + bias, both (n, c) and 0 outside; recomputes SiLU."""
    xhat = tl.where(ok, (x - mean) * rstd, 0.0)
    if SILU:
        z = xhat * weight + bias
        s = sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return xhat, dy


@triton.jit
def split_kernel(
    x_ptr, dy_ptr, add_ptr, weight_ptr, bias_ptr, stats_ptr, part_ptr,
    split_rows, N, C, G, inv_total, stride_b, stride_n, stride_c,
    BACKWARD: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write part: for each channel what a split of the pixels adds to the statistics or to the gradients."""
    first, split, b = tl.program_id(0) * BLOCK_C, tl.program_id(1), tl.program_id(2)
    c = first + tl.arange(0, BLOCK_C)
    c_ok = c < C
    add = load_row(add_ptr + b * C, c, c_ok) if HAS_ADD else 0.0
    if BACKWARD:
        mean, rstd = load_pair(stats_ptr, b, tl.num_programs(2), c, c_ok, C, G)
        weight, bias = load_row(weight_ptr, c, c_ok), load_row(bias_ptr, c, c_ok)
    part0 = tl.zeros((BLOCK_C,), tl.float32)
    part1 = tl.zeros((BLOCK_C,), tl.float32)
    part2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for start in range(split * split_rows, tl.minimum(N, (split + 1) * split_rows), BLOCK_N):
        corner, at, ok = tile_at(b, start, first, N, C, stride_b, stride_n, stride_c, BLOCK_N, BLOCK_C)
        x = load_tile(x_ptr + corner, at, ok) + add
        if BACKWARD:
            dy = load_tile(dy_ptr + corner, at, ok)
            xhat, dz = grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU)
            part0 += tl.sum(dz, 0)
            part1 += tl.sum(dz * xhat, 0)
            if HAS_ADD:
                part2 += tl.sum(xhat, 0)
        else:
            # Two passes over registers, then Chan's merge with what came before: sum(x^2) - sum(x)^2 / n
            # would lose every digit of the variance when the mean is large.
            rows = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            tile_mean = tl.sum(tl.where(ok, x, 0.0), 0) / rows
            d = tl.where(ok, x - tile_mean[None, :], 0.0)
            delta = tile_mean - part0
            part1 += tl.sum(d * d, 0) + delta * delta * (count * rows / (count + rows))
            part0 += delta * (rows / (count + rows))
            count += rows
    plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * C
    part_ptr += (b.to(tl.int64) * tl.num_programs(1) + split) * C
    tl.store(part_ptr + c, part0, mask=c_ok)
    tl.store(part_ptr + plane + c, part1, mask=c_ok)
    if BACKWARD and HAS_ADD:
        tl.store(part_ptr + 2 * plane + c, part2, mask=c_ok)


@triton.jit
def merge_kernel(
    part_ptr, weight_ptr, stats_ptr, sums_ptr, coef_ptr, dadd_ptr,
    splits, split_rows, eps, N, C, G, inv_total,
    BACKWARD: tl.constexpr, HAS_ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the splits: write stats, or with BACKWARD sums, coef and dadd."""
    g, b, B = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s, k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    here = k < C // G
    ok = (s < splits)[:, None] & here[None, :]
    plane = B.to(tl.int64) * splits * C
    part_ptr += b.to(tl.int64) * splits * C + g * (C // G)
    at = s[:, None] * C + k[None, :]
    part0 = tl.load(part_ptr + at, mask=ok, other=0.0)
    part1 = tl.load(part_ptr + plane + at, mask=ok, other=0.0)
    if BACKWARD:
        c = g * (C // G) + k
        dz, dz_xhat = tl.sum(part0, 0), tl.sum(part1, 0)
        weight = tl.load(weight_ptr + c, mask=here, other=0.0).to(tl.float32)
        mean_dz = tl.sum(weight * dz) * inv_total
        mean_dz_xhat = tl.sum(weight * dz_xhat) * inv_total
        sums_ptr += 2 * b * C
        tl.store(sums_ptr + c, dz, mask=here)
        tl.store(sums_ptr + C + c, dz_xhat, mask=here)
        tl.store(coef_ptr + b * G + g, mean_dz)
        tl.store(coef_ptr + (B + b) * G + g, mean_dz_xhat)
        if HAS_ADD:
            # the sum of dx over the pixels in closed form, without a pass over the image
            xhat = tl.sum(tl.load(part_ptr + 2 * plane + at, mask=ok, other=0.0), 0)
            dadd = tl.load(stats_ptr + (B + b) * G + g) * (weight * dz - N * mean_dz - xhat * mean_dz_xhat)
            tl.store(dadd_ptr + b * C + c, dadd.to(dadd_ptr.dtype.element_ty), mask=here)
    else:
        rows = tl.minimum(N - s * split_rows, split_rows).to(tl.float32)[:, None]
        # Subtract a value of similar size before averaging, so that a large common offset costs no digits
        pivot = tl.load(part_ptr)
        mean = pivot + tl.sum(tl.where(ok, (part0 - pivot) * rows, 0.0)) * inv_total
        d = part0 - mean
        var = tl.sum(tl.where(ok, part1 + rows * d * d, 0.0)) * inv_total
        tl.store(stats_ptr + b * G + g, mean)
        tl.store(stats_ptr + (B + b) * G + g, 1.0 / tl.sqrt(var + eps))


@triton.jit
def pass_kernel(
    x_ptr, dy_ptr, out_ptr, add_ptr, weight_ptr, bias_ptr, stats_ptr, coef_ptr, sums_ptr, dadd_ptr,
    eps, N, C, G, inv_total, stride_b, stride_n, stride_c,
    GROUP_C: tl.constexpr, BACKWARD: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y, or with BACKWARD dx. With GROUP_C = 0 read stats and coef; otherwise write stats, or with
    BACKWARD read them, and write sums and dadd."""
    i, b, B = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    across = 1 if GROUP_C > 0 else tl.cdiv(C, BLOCK_C)  # tiles of channels, of which a group is one
    start = i * 0 if GROUP_C > 0 else i // across * BLOCK_N
    first = i * GROUP_C if GROUP_C > 0 else i % across * BLOCK_C
    end = first + GROUP_C if GROUP_C > 0 else C
    c = first + tl.arange(0, BLOCK_C)
    c_ok = c < end
    corner, at, ok = tile_at(b, start, first, N, end, stride_b, stride_n, stride_c, BLOCK_N, BLOCK_C)
    x = load_tile(x_ptr + corner, at, ok) + (load_row(add_ptr + b * C, c, c_ok) if HAS_ADD else 0.0)
    group = stats_ptr + b * G + i  # if GROUP_C > 0
    if GROUP_C == 0:
        mean, rstd = load_pair(stats_ptr, b, B, c, c_ok, C, G)
        d = x - mean
    elif BACKWARD:
        mean, rstd = tl.load(group), tl.load(group + B * G)
    else:
        mean = tl.sum(tl.where(ok, x, 0.0)) * inv_total
        d = tl.where(ok, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(d * d) * inv_total + eps)
        tl.store(group, mean)
        tl.store(group + B * G, rstd)
    weight, bias = load_row(weight_ptr, c, c_ok), load_row(bias_ptr, c, c_ok)
    if BACKWARD:
        dy = load_tile(dy_ptr + corner, at, ok)
        xhat, dz = grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU)
        if GROUP_C > 0:
            sums_ptr += 2 * b * C
            tl.store(sums_ptr + c, tl.sum(dz, 0), mask=c_ok)
            tl.store(sums_ptr + C + c, tl.sum(dz * xhat, 0), mask=c_ok)
            mean_dz = tl.sum(weight * dz) * inv_total
            mean_dz_xhat = tl.sum(weight * dz * xhat) * inv_total
        else:
            mean_dz, mean_dz_xhat = load_pair(coef_ptr, b, B, c, c_ok, C, G)
        out = rstd * (weight * dz - mean_dz - xhat * mean_dz_xhat)
        if GROUP_C > 0 and HAS_ADD:
            dadd = tl.sum(tl.where(ok, out, 0.0), 0)
            tl.store(dadd_ptr + b * C + c, dadd.to(dadd_ptr.dtype.element_ty), mask=c_ok)
    else:
        # Subtract the mean before scaling: x * scale + shift would lose digits when the mean is large
        out = d * (rstd * weight) + bias
        if SILU:
            out = out * sigmoid(out)
    tl.store(out_ptr + corner + at, out.to(out_ptr.dtype.element_ty), mask=ok)


# ------------------------------ Launchers

# Elements of a padded group that 8 warps hold in registers: of one tensor forward, of two backward
MAX_GROUP_ELEMENTS = dict(forward=16384, backward=8192)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y in the layout and dtype of x, and the groups' mean and rstd (2, b, g) in fp32."""
    x, weight, bias = L.dense(x), weight.contiguous(), bias.contiguous()
    y, stats = L.empty(x), L.empty(x, 2, len(x), num_groups, dtype=torch.float32)
    _launch(False, x, x, y, add, weight, bias, stats, stats, stats, num_groups, eps, silu)
    return y, stats


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, stats: Tensor,
    num_groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dweight and dbias in fp32, and dadd, which is empty without `add`."""
    x, weight, bias = L.dense(x), weight.contiguous(), bias.contiguous()
    dy, c = L.dense(dy, like=x), x.shape[1]
    dx, dweight, dbias = L.empty(x), *(L.empty(x, c, dtype=torch.float32) for _ in range(2))
    dadd = L.empty(x, 0) if add is None else L.empty(add, *add.shape)
    sums = L.empty(x, len(x), 2, c, dtype=torch.float32)
    _launch(True, x, dy, dx, add, weight, bias, stats, sums, dadd, num_groups, 0.0, silu)
    L.add_up(sums, dbias, dweight)
    return dx, dweight, dbias, dadd


def _launch(back: bool, x, dy, out, add, weight, bias, stats, sums, dadd, num_groups, eps, silu) -> None:
    """Launch the forward (then dy, sums and dadd are not used) or the backward, for dense tensors."""
    (b, c), n = x.shape[:2], x[0, 0].numel()
    strides = (c * n, c, 1) if L.layout(x) == torch.channels_last else (c * n, 1, n)  # of b, n and c
    image, coef = (n, c, num_groups, num_groups / (c * n), *strides), stats
    has_add, add = add is not None, x if add is None else add.contiguous()
    group_c, grid = c // num_groups, (num_groups, b)  # a program for each group
    tile = dict(BLOCK_N=L.power_of_two(n, 16), BLOCK_C=L.power_of_two(group_c), num_warps=8)
    if tile["BLOCK_N"] * tile["BLOCK_C"] > MAX_GROUP_ELEMENTS["backward" if back else "forward"]:
        merge = dict(BLOCK_C=tile["BLOCK_C"])
        tile = dict(BLOCK_N=32 if back else 64, BLOCK_C=64)  # whole 128-byte lines in either layout
        group_c, across, down = 0, L.cdiv(c, tile["BLOCK_C"]), L.cdiv(n, tile["BLOCK_N"])
        # A program of the merge holds (splits, channels of a group); a split is a whole number of tiles
        split_rows = tile["BLOCK_N"] * L.cdiv(down, max(1, min(256, 4096 // merge["BLOCK_C"])))
        splits, grid = L.cdiv(n, split_rows), (across * down, b)
        part = L.empty(x, 3 if back else 2, b, splits, c, dtype=torch.float32)
        coef = L.empty(stats) if back else stats
        args = (x, dy, add, weight, bias, stats, part, split_rows, *image)
        flags = dict(BACKWARD=back, HAS_ADD=has_add, SILU=back and silu)
        L.launch(split_kernel, (across, splits, b), *args, **flags, **tile)
        args = (part, weight, stats, sums, coef, dadd, splits, split_rows, eps, *image[:4])
        merge |= dict(BACKWARD=back, HAS_ADD=back and has_add, BLOCK_S=L.power_of_two(splits))
        L.launch(merge_kernel, (num_groups, b), *args, **merge)
    args = (x, dy, out, add, weight, bias, stats, coef, sums, dadd, eps, *image)
    flags = dict(GROUP_C=group_c, BACKWARD=back, HAS_ADD=has_add, SILU=silu)
    L.launch(pass_kernel, grid, *args, **flags, **tile)


def unsupported(x: Tensor, weight, bias, add: Tensor | None, num_groups: int, eps, silu) -> str:
    if x.shape[1] % num_groups:
        return f"{x.shape[1]} channels do not divide into {num_groups} groups"
    if x.shape[0] > L.GRID_YZ or x[0, 0].numel() > L.INT32 // 64:
        return f"more than {L.GRID_YZ} images or {L.INT32 // 64} pixels"
    if add is not None and add.shape != x.shape[:2]:
        return f"add has shape {tuple(add.shape)} beside {tuple(x.shape)}"
    return ""


def size_class(x: tuple, weight, bias, add: tuple | None, num_groups: int, eps, silu: bool) -> str:
    pixels, batch = math.prod(x[2:]), L.power_of_two(x[0])
    return f"{x[1]}/{num_groups} at {pixels} x{batch}{' add' if add else ''}{' silu' if silu else ''}"


# ------------------------------ Cases


def case(
    name: str, b: int, c: int, h: int, w: int, groups: int,
    *, silu=True, add=True, eps=1e-5, shift=0.0, layout=torch.channels_last,
) -> Case:  # fmt: skip
    def make(randn):
        x = randn(b, c, h, w) * 0.5 + shift * randn(1, c, 1, 1)
        weight, bias = randn(c), randn(c)
        tensors = dict(x=x, weight=weight, bias=bias, add=randn(b, c) if add else None)
        return tensors, dict(num_groups=groups, eps=eps, silu=silu)

    return Case(name, make, layout, elements=2 * b * c * h * w, back=1.5)


KERNEL = Kernel(
    name="group_norm", reference=reference, unsupported=unsupported,
    forward=forward, backward=backward, size_class=size_class,
    save=lambda inputs, outputs: (*inputs[:4], outputs[1], inputs[4], inputs[6]), constants=2,
    cases=[
        case("small, batch 3", 3, 64, 4, 4, 4),
        case("small, 10 channels a group", 1, 80, 4, 4, 8, eps=1e-6, silu=False, add=False),
        case("small, one pixel", 2, 32, 1, 1, 4),
        case("small, contiguous", 1, 64, 5, 3, 4, layout=torch.contiguous_format),
        case("small, mean 100 deviations", 1, 64, 8, 8, 4, shift=50.0),
        case("large", 1, 32, 33, 17, 1, add=False),
    ],
    timed=[  # those of one image are the VAE's
        *(case(f"b{b} {c} at {side}", b, c, side, side, 32, add=b > 1)
          for b, c, side in ((2, 320, 64), (2, 960, 64), (2, 640, 32), (2, 1280, 16), (2, 1280, 8),
                             (8, 320, 64), (8, 960, 64), (8, 640, 32), (8, 1280, 16), (8, 1280, 8),
                             (2, 320, 96), (1, 512, 64), (1, 256, 256), (1, 128, 512))),
        case("b8 320 at 64 contiguous", 8, 320, 64, 64, 32, layout=torch.contiguous_format),
    ],
    compiled=[case("b2 2560 at 8", 2, 2560, 8, 8, 32)],
)  # fmt: skip
