"""GroupNorm with an optional addition per (sample, channel) before and an optional SiLU after it.

    y = silu(group_norm(x + add[:, :, None, None]))

Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494. Letters: b batch, c channels, n = h*w
pixels, g groups, s splits of the pixels. Channels-last and contiguous tensors run through the same kernels,
which see only strides: no tensor is copied into the other layout.

Large images take three launches: means and squared deviations per (b, split, channel), a merge from channels
to groups, and the normalisation itself. Partial results are per channel, so that a group of 10 or 20 channels
never cuts through a memory transaction; they are merged in a fixed order (Chan et al. 1979), exact for a mean
far from zero and bit-equal in every run. Groups that fit the registers of one program take one launch. The
backward recomputes xhat and SiLU from x, so a training step keeps x and two numbers per group.
"""

import math

import minisd.kernels.group_norm_kernels as device
import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
from minisd.kernels.kernel import Case, Kernel
from minisd.kernels.partial_sums import add_up
from torch import Tensor

# ------------------------------ Reference


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


# ------------------------------ Launchers

# Elements of a padded group that 8 warps hold in registers: of one tensor forward, of two backward
MAX_GROUP_ELEMENTS = dict(forward=16384, backward=8192)


def sizes(x: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """Return b, c, n and the strides (b, n, c) of a dense x."""
    b, c = x.shape[:2]
    n = x[0, 0].numel()
    return b, c, n, (c * n, c, 1) if L.layout(x) == "channels_last" else (c * n, 1, n)


def tiling(x: Tensor, num_groups: int, most: int, tiles: L.Tiles) -> tuple[dict, tuple, int, int, dict]:
    """Return the tile and the grid of a pass over x. Unless a program holds a whole group, of at most `most`
    padded elements, also return the number of splits, the pixels in each (a whole number of tiles), and the
    tile of the merge, which holds (splits, channels of a group) in one program."""
    b, c, n, _ = sizes(x)
    block_n, block_c = L.power_of_two(n, 16), L.power_of_two(c // num_groups)
    if block_n * block_c <= most:
        return dict(BLOCK_N=block_n, BLOCK_C=block_c, num_warps=8), (num_groups, b), 0, 0, {}
    tile = tiles.pick(L.layout(x), x.device)
    down = L.cdiv(n, tile["BLOCK_N"])
    split_rows = tile["BLOCK_N"] * L.cdiv(down, max(1, min(256, 4096 // block_c)))
    splits = L.cdiv(n, split_rows)
    merge = dict(BLOCK_S=L.power_of_two(splits), BLOCK_C=block_c, num_warps=4)
    return tile, (L.cdiv(c, tile["BLOCK_C"]) * down, b), splits, split_rows, merge


@L.remembered
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y in the layout and dtype of x, and the groups' mean and rstd (2, b, g) in fp32."""
    x, weight, bias = L.dense(x), weight.contiguous(), bias.contiguous()
    y, stats = L.empty(x), L.empty(x, 2, len(x), num_groups, dtype=torch.float32)
    _launch(False, x, x, y, add, weight, bias, stats, stats, stats, num_groups, eps, silu)
    return y, stats


@L.remembered
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
    add_up(sums, dbias, dweight)
    return dx, dweight, dbias, dadd


def _launch(back: bool, x, dy, out, add, weight, bias, stats, sums, dadd, num_groups, eps, silu) -> None:
    b, c, n, strides = sizes(x)
    most, tiles = MAX_GROUP_ELEMENTS["backward" if back else "forward"], BWD_TILES if back else FWD_TILES
    tile, grid, splits, split_rows, merge = tiling(x, num_groups, most, tiles)
    has_add, add = add is not None, x if add is None else add.contiguous()
    image, coef = (n, c, num_groups, num_groups / (c * n), *strides), stats
    if splits:
        part = L.empty(x, 3 if back else 2, b, splits, c, dtype=torch.float32)
        coef = L.empty(stats) if back else stats
        args = (x, dy, add, weight, bias, stats, part, split_rows, *image)
        split_grid, flags = (L.cdiv(c, tile["BLOCK_C"]), splits, b), dict(HAS_ADD=has_add, SILU=back and silu)
        L.launch(device.split_kernel, split_grid, *args, BACKWARD=back, **flags, **tile)
        args = (part, weight, stats, sums, coef, dadd, splits, split_rows, eps, *image[:4])
        merge |= dict(BACKWARD=back, HAS_ADD=back and has_add)
        L.launch(device.merge_kernel, (num_groups, b), *args, **merge)
    args = (x, dy, out, add, weight, bias, stats, coef, sums, dadd, eps, *image)
    flags = dict(GROUP_C=0 if splits else c // num_groups, BACKWARD=back, HAS_ADD=has_add, SILU=silu)
    L.launch(device.pass_kernel, grid, *args, **flags, **tile)


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


# ------------------------------ Tiles and cases


def Tile(BLOCK_N: int, BLOCK_C: int, num_warps: int = 4) -> dict:
    """BLOCK_N pixels, BLOCK_C channels; a warp should read whole 128-byte lines in either layout."""
    return dict(BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=num_warps)


FWD_TILES = L.Tiles({"channels_last": {80: Tile(64, 64)}, "contiguous": {80: Tile(512, 8)}})
BWD_TILES = L.Tiles({"channels_last": {80: Tile(32, 64)}, "contiguous": {80: Tile(256, 8)}})


def case(
    name: str, b: int, c: int, h: int, w: int, groups: int,
    *, silu=True, add=True, eps=1e-5, shift=0.0, layout="channels_last",
) -> Case:  # fmt: skip
    def make(randn):
        x = randn(b, c, h, w) * 0.5 + shift * randn(1, c, 1, 1)
        weight, bias = randn(c), randn(c)
        tensors = dict(x=x, weight=weight, bias=bias, add=randn(b, c) if add else None)
        return tensors, dict(num_groups=groups, eps=eps, silu=silu)

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return Case(name, make, memory_format, elements=2 * b * c * h * w, back=1.5)


def square(b: int, c: int, side: int, *, layout: str = "channels_last", add: bool = True) -> Case:
    """32 groups, as in SD."""
    name = f"b{b} {c} at {side}{' contiguous' if layout == 'contiguous' else ''}"
    return case(name, b, c, side, side, 32, add=add, layout=layout)


KERNEL = Kernel(
    name="group_norm", reference=reference, unsupported=unsupported,
    forward=forward, backward=backward, size_class=size_class,
    save=lambda inputs, outputs: (*inputs[:4], outputs[1], inputs[4], inputs[6]),
    tiles=(FWD_TILES, BWD_TILES),
    cases=[
        case("small, batch 3", 3, 64, 4, 4, 4),
        case("small, 10 channels a group", 1, 80, 4, 4, 8, eps=1e-6, silu=False, add=False),
        case("small, one pixel", 2, 32, 1, 1, 4),
        case("small, contiguous", 1, 64, 5, 3, 4, layout="contiguous"),
        case("small, mean 100 deviations", 1, 64, 8, 8, 4, shift=50.0),
        case("large", 1, 32, 33, 17, 1, add=False),
    ],
    timed=[
        *(square(b, c, side) for b in (2, 8)
          for c, side in ((320, 64), (960, 64), (640, 32), (1280, 16), (1280, 8))),
        square(2, 320, 96), square(8, 320, 64, layout="contiguous"),
        *(square(1, c, side, add=False) for c, side in ((512, 64), (256, 256), (128, 512))),  # the VAE's
    ],
    compiled=[
        *(square(2, c, side) for c, side in ((320, 64), (640, 32), (1280, 16), (1280, 8), (2560, 8))),
        square(2, 320, 64, layout="contiguous"), square(2, 128, 512, add=False),
    ],
)  # fmt: skip
