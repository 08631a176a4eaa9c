"""GroupNorm with an optional per-(sample, channel) add in front and an optional SiLU behind.

    y = silu(group_norm(x + add[:, :, None, None]))

Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494. Letters: b batch, c channels, n = h*w
pixels, g groups, s splits of the pixels. Channels-last and contiguous tensors run through the same kernels,
which see only strides: nothing is ever copied into the other layout.

Large images take three grids: per-(b, split, channel) means and squared deviations, a merge from channels to
groups, and the map itself. The partial results belong to channels, so a group of 10 or 20 channels never cuts
through a memory transaction; they are merged in a fixed order (Chan et al. 1979), exact for a mean
far from zero and bit-equal in every run. Groups that fit the registers of one program take one grid. The
backward recomputes xhat and SiLU from x, so a training step keeps x and two numbers a group.
"""

import minisd.kernels.group_norm_small as small
import minisd.kernels.launch as L
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minisd.kernels.group_norm_small import grad_affine, load_row, load_tile, sigmoid, store_tile
from torch import Tensor

# ------------------------------ Reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
):
    """What the kernels compute, in plain torch: x (b, c, ...), weight and bias (c,), add (b, c) or None."""
    x = x if add is None else x + _column(add, x)
    y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y) if silu else y


# ------------------------------ Forward


@triton.jit
def _stats_kernel(
    x_ptr,  # (b, n, c) by strides
    add_ptr,  # (b, c), read if HAS_ADD
    mean_ptr,  # (b, s, c) fp32: mean of this split's pixels
    m2_ptr,  # (b, s, c) fp32: sum of squared deviations from it
    N, C, split_rows, stride_b, stride_n, stride_c,
    HAS_ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, b = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for start in range(split * split_rows, tl.minimum(N, (split + 1) * split_rows), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
        # Two passes over registers, then Chan's merge with what came before: sum(x^2) - sum(x)^2 / n would
        # lose every digit of the variance when the mean is large.
        rows = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        tile_mean = tl.sum(tl.where(ok, x, 0.0), 0) / rows
        d = tl.where(ok, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        m2 += tl.sum(d * d, 0) + delta * delta * (count * rows / (count + rows))
        mean += delta * (rows / (count + rows))
        count += rows
    at = (b * tl.num_programs(1) + split) * C + c
    tl.store(mean_ptr + at, mean, mask=c_ok)
    tl.store(m2_ptr + at, m2, mask=c_ok)


@triton.jit
def _merge_kernel(
    part_mean_ptr,  # (b, s, c) fp32
    part_m2_ptr,  # (b, s, c) fp32
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    N, C, splits, split_rows, inv_total, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, b, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    s, k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    ok = (s < splits)[:, None] & (k < C // G)[None, :]
    at = (b * splits + s)[:, None] * C + g * (C // G) + k[None, :]
    rows = tl.minimum(N - s * split_rows, split_rows).to(tl.float32)[:, None]
    part_mean = tl.load(part_mean_ptr + at, mask=ok, other=0.0)
    # Averaged about a value of its own size, so that a large common offset costs no digits
    pivot = tl.load(part_mean_ptr + b * splits * C + g * (C // G))
    mean = pivot + tl.sum(tl.where(ok, (part_mean - pivot) * rows, 0.0)) * inv_total
    d = part_mean - mean
    var = tl.sum(tl.where(ok, tl.load(part_m2_ptr + at, mask=ok, other=0.0) + rows * d * d, 0.0)) * inv_total
    tl.store(mean_ptr + b * G + g, mean)
    tl.store(rstd_ptr + b * G + g, 1.0 / tl.sqrt(var + eps))


@triton.jit
def _apply_kernel(
    x_ptr,  # (b, n, c) by strides
    y_ptr,  # as x
    add_ptr,  # (b, c), read if HAS_ADD
    weight_ptr,  # (c,)
    bias_ptr,  # (c,)
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    N, C, G, stride_b, stride_n, stride_c,
    HAS_ADD: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
    group = b * G + c // (C // G)
    mean = load_row(mean_ptr, group, c_ok)
    rstd = load_row(rstd_ptr, group, c_ok)
    weight = load_row(weight_ptr, c, c_ok)
    bias = load_row(bias_ptr, c, c_ok)
    # mean is subtracted before anything is scaled: x * scale + shift cancels digits when the mean is large
    y = (x - mean) * (rstd * weight) + bias
    if SILU:
        y = y * sigmoid(y)
    store_tile(y_ptr, y, b, n, c, ok, stride_b, stride_n, stride_c)


# ------------------------------ Backward


@triton.jit
def _bwd_sums_kernel(
    x_ptr,  # (b, n, c) by strides
    dy_ptr,  # as x
    add_ptr,  # (b, c), read if HAS_ADD
    weight_ptr,  # (c,)
    bias_ptr,  # (c,)
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    part_ptr,  # (3, b, s, c) fp32: sums over a split's pixels of dz, dz * xhat and (if HAS_ADD) xhat
    N, C, G, split_rows, stride_b, stride_n, stride_c,
    HAS_ADD: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, b = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    group = b * G + c // (C // G)
    mean = load_row(mean_ptr, group, c_ok)
    rstd = load_row(rstd_ptr, group, c_ok)
    weight = load_row(weight_ptr, c, c_ok)
    bias = load_row(bias_ptr, c, c_ok)
    sum_dz = tl.zeros((BLOCK_C,), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_C,), tl.float32)
    sum_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(split * split_rows, tl.minimum(N, (split + 1) * split_rows), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
        dy, _ = load_tile(dy_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, False)
        xhat, dz = grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU)
        sum_dz += tl.sum(dz, 0)
        sum_dz_xhat += tl.sum(dz * xhat, 0)
        if HAS_ADD:
            sum_xhat += tl.sum(xhat, 0)
    at = (b * tl.num_programs(1) + split) * C + c
    plane = tl.num_programs(2) * tl.num_programs(1) * C
    tl.store(part_ptr + at, sum_dz, mask=c_ok)
    tl.store(part_ptr + plane + at, sum_dz_xhat, mask=c_ok)
    if HAS_ADD:
        tl.store(part_ptr + 2 * plane + at, sum_xhat, mask=c_ok)


@triton.jit
def _bwd_merge_kernel(
    part_ptr,  # (3, b, s, c) fp32
    weight_ptr,  # (c,)
    rstd_ptr,  # (b, g) fp32
    sums_ptr,  # (2, b, c) fp32: sums over the pixels of dz and dz * xhat: each sample's dbias, dweight
    coef_ptr,  # (2, b, g) fp32: means over the group of weight * dz and weight * dz * xhat
    dadd_ptr,  # (b, c), written if HAS_ADD
    N, C, splits, inv_total,
    HAS_ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, b, G, B = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    s, k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    here = k < C // G
    ok = (s < splits)[:, None] & here[None, :]
    c = g * (C // G) + k
    at = (b * splits + s)[:, None] * C + c[None, :]
    plane = B * splits * C
    dz = tl.sum(tl.load(part_ptr + at, mask=ok, other=0.0), 0)
    dz_xhat = tl.sum(tl.load(part_ptr + plane + at, mask=ok, other=0.0), 0)
    weight = tl.load(weight_ptr + c, mask=here, other=0.0).to(tl.float32)
    mean_dz = tl.sum(weight * dz) * inv_total
    mean_dz_xhat = tl.sum(weight * dz_xhat) * inv_total
    tl.store(sums_ptr + b * C + c, dz, mask=here)
    tl.store(sums_ptr + (B + b) * C + c, dz_xhat, mask=here)
    tl.store(coef_ptr + b * G + g, mean_dz)
    tl.store(coef_ptr + (B + b) * G + g, mean_dz_xhat)
    if HAS_ADD:
        # the sum of dx over the pixels, in closed form: no pass over the image
        xhat = tl.sum(tl.load(part_ptr + 2 * plane + at, mask=ok, other=0.0), 0)
        dadd = tl.load(rstd_ptr + b * G + g) * (weight * dz - N * mean_dz - xhat * mean_dz_xhat)
        tl.store(dadd_ptr + b * C + c, dadd.to(dadd_ptr.dtype.element_ty), mask=here)


@triton.jit
def _bwd_dx_kernel(
    x_ptr,  # (b, n, c) by strides
    dy_ptr,  # as x
    dx_ptr,  # as x
    add_ptr,  # (b, c), read if HAS_ADD
    weight_ptr,  # (c,)
    bias_ptr,  # (c,)
    mean_ptr,  # (b, g) fp32
    rstd_ptr,  # (b, g) fp32
    coef_ptr,  # (2, b, g) fp32
    N, C, G, stride_b, stride_n, stride_c,
    HAS_ADD: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, B = tl.program_id(2), tl.num_programs(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, ok = load_tile(x_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, HAS_ADD)
    dy, _ = load_tile(dy_ptr, add_ptr, b, n, c, n < N, c_ok, C, stride_b, stride_n, stride_c, False)
    group = b * G + c // (C // G)
    mean = load_row(mean_ptr, group, c_ok)
    rstd = load_row(rstd_ptr, group, c_ok)
    mean_dz = load_row(coef_ptr, group, c_ok)
    mean_dz_xhat = load_row(coef_ptr, B * G + group, c_ok)
    weight = load_row(weight_ptr, c, c_ok)
    bias = load_row(bias_ptr, c, c_ok)
    xhat, dz = grad_affine(x, dy, ok, mean, rstd, weight, bias, SILU)
    dx = rstd * (weight * dz - mean_dz - xhat * mean_dz_xhat)
    store_tile(dx_ptr, dx, b, n, c, ok, stride_b, stride_n, stride_c)


# ------------------------------ Launchers


def _forward(x, weight, bias, add, num_groups: int, eps: float, silu: bool):
    x, weight, bias = L.dense(x), weight.contiguous(), bias.contiguous()
    b, c, n, strides = small.sizes(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(b, num_groups, dtype=torch.float32) for _ in range(2))
    add_arg, flags = (x if add is None else add.contiguous()), dict(HAS_ADD=add is not None)
    inv_total = num_groups / (c * n)
    tile, *blocks = small.blocks(x, num_groups, small.FWD)
    if "BLOCK_N" not in tile:
        meta = dict(GROUP_C=c // num_groups, SILU=silu, BLOCK_N=blocks[0], BLOCK_C=blocks[1], **flags, **tile)
        args = (x, y, add_arg, weight, bias, mean, rstd, n, c, inv_total, eps, *strides)
        L.launch(small.small_fwd_kernel, (num_groups, b), *args, **meta)
        return y, mean, rstd
    splits, split_rows = blocks
    part_mean, part_m2 = (x.new_empty(b, splits, c, dtype=torch.float32) for _ in range(2))
    grid = L.cdiv(c, tile["BLOCK_C"])
    args = (x, add_arg, part_mean, part_m2, n, c, split_rows, *strides)
    L.launch(_stats_kernel, (grid, splits, b), *args, **flags, **tile)
    merge = dict(BLOCK_S=L.power_of_two(splits), BLOCK_C=L.power_of_two(c // num_groups), num_warps=4)
    args = (part_mean, part_m2, mean, rstd, n, c, splits, split_rows, inv_total, eps)
    L.launch(_merge_kernel, (num_groups, b), *args, **merge)
    args = (x, y, add_arg, weight, bias, mean, rstd, n, c, num_groups, *strides)
    L.launch(_apply_kernel, (grid, L.cdiv(n, tile["BLOCK_N"]), b), *args, SILU=silu, **flags, **tile)
    return y, mean, rstd


def _backward(dy, x, weight, bias, add, mean, rstd, num_groups: int, silu: bool):
    x, weight, bias = L.dense(x), weight.contiguous(), bias.contiguous()
    dy = L.dense(dy, like=x)
    b, c, n, strides = small.sizes(x)
    dx = torch.empty_like(x)
    sums = x.new_empty(2, b, c, dtype=torch.float32)
    dadd = x.new_empty(0) if add is None else add.new_empty(add.shape)
    add_arg, flags = (x if add is None else add.contiguous()), dict(HAS_ADD=add is not None)
    inv_total = num_groups / (c * n)
    tile, *blocks = small.blocks(x, num_groups, small.BWD)
    if "BLOCK_N" not in tile:
        meta = dict(GROUP_C=c // num_groups, SILU=silu, BLOCK_N=blocks[0], BLOCK_C=blocks[1], **flags, **tile)
        args = (x, dy, dx, add_arg, weight, bias, mean, rstd, sums, dadd, n, c, inv_total, *strides)
        L.launch(small.small_bwd_kernel, (num_groups, b), *args, **meta)
    else:
        splits, split_rows = blocks
        part = x.new_empty(3, b, splits, c, dtype=torch.float32)
        coef = x.new_empty(2, b, num_groups, dtype=torch.float32)
        grid = L.cdiv(c, tile["BLOCK_C"])
        args = (x, dy, add_arg, weight, bias, mean, rstd, part, n, c, num_groups, split_rows, *strides)
        L.launch(_bwd_sums_kernel, (grid, splits, b), *args, SILU=silu, **flags, **tile)
        merge = dict(BLOCK_S=L.power_of_two(splits), BLOCK_C=L.power_of_two(c // num_groups), num_warps=4)
        args = (part, weight, rstd, sums, coef, dadd, n, c, splits, inv_total)
        L.launch(_bwd_merge_kernel, (num_groups, b), *args, **flags, **merge)
        args = (x, dy, dx, add_arg, weight, bias, mean, rstd, coef, n, c, num_groups, *strides)
        grid = (grid, L.cdiv(n, tile["BLOCK_N"]), b)
        L.launch(_bwd_dx_kernel, grid, *args, SILU=silu, **flags, **tile)
    return dx, sums.sum(1), dadd


# ------------------------------ The torch operator


@torch.library.custom_op("minisd::group_norm", mutates_args=(), device_types="cuda")
def group_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout and type of x, and the groups' mean and rstd (b, g) in fp32 for the backward."""
    return _forward(x, weight, bias, add, num_groups, eps, silu)


@group_norm_op.register_kernel("cpu")
def _(x, weight, bias, add, num_groups, eps, silu):
    if L.INTERPRET:
        return _forward(x, weight, bias, add, num_groups, eps, silu)
    y = L.dense(reference(x, weight, bias, add, num_groups, eps, silu), like=x)
    z = (x if add is None else x + _column(add, x)).float().reshape(len(x), num_groups, -1)
    return y, z.mean(-1), (z.var(-1, unbiased=False) + eps).rsqrt()


@group_norm_op.register_fake
def _(x, weight, bias, add, num_groups, eps, silu):
    stat = x.new_empty(len(x), num_groups, dtype=torch.float32)
    return torch.empty_like(L.dense(x)), stat, torch.empty_like(stat)


@torch.library.custom_op("minisd::group_norm_bwd", mutates_args=(), device_types="cuda")
def group_norm_bwd_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, mean: Tensor, rstd: Tensor,
    num_groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(dy, x, weight, bias, add, mean, rstd, num_groups, silu)


@group_norm_bwd_op.register_kernel("cpu")
def _(dy, x, weight, bias, add, mean, rstd, num_groups, silu):
    if L.INTERPRET:
        return _backward(dy, x, weight, bias, add, mean, rstd, num_groups, silu)
    b, c, n, _ = small.sizes(x)
    z = (x if add is None else x + _column(add, x)).float().contiguous()
    dz, w = dy.float().contiguous(), weight.float()
    if silu:
        xhat = (z.view(b, num_groups, -1) - mean[:, :, None]) * rstd[:, :, None]
        dz = torch.ops.aten.silu_backward(dz, xhat.view_as(z) * _column(w[None], x) + _column(bias[None], x))
    sizes = (b, c, n, num_groups, [True] * 3)
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(dz, z, mean, rstd, w, *sizes)
    dadd = x.new_empty(0) if add is None else dx.reshape(b, c, n).sum(-1).to(add.dtype)
    return L.dense(dx.to(x.dtype), like=x), torch.stack((dbias, dweight)), dadd


@group_norm_bwd_op.register_fake
def _(dy, x, weight, bias, add, mean, rstd, num_groups, silu):
    dadd = x.new_empty(0) if add is None else add.new_empty(add.shape)
    return torch.empty_like(L.dense(x)), x.new_empty(2, x.shape[1], dtype=torch.float32), dadd


def _column(t: Tensor, x: Tensor) -> Tensor:
    """(b, c) as (b, c, 1, 1) beside x."""
    return t.reshape(*t.shape, *[1] * (x.ndim - 2))


def _setup_context(ctx, inputs, output):
    x, weight, bias, add, ctx.num_groups, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd: each would be a launch
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, add, *output[1:])


def _autograd(ctx, dy, dmean, drstd):
    _, weight, bias, add, _, _ = ctx.saved_tensors
    dx, (dbias, dweight), dadd = group_norm_bwd_op(dy, *ctx.saved_tensors, ctx.num_groups, ctx.silu)
    dadd = None if add is None else dadd
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dadd, None, None, None


group_norm_op.register_autograd(_autograd, setup_context=_setup_context)
_eager = L.function(_forward, _setup_context, _autograd)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, num_groups: int, eps: float, silu: bool
):
    """The reference's operation by the kernels; y in the layout and type of x."""
    return L.call(group_norm_op, _eager, x, weight, bias, add, num_groups, eps, silu)[0]


def why_not(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, add: Tensor | None = None) -> str:
    """An empty string if the kernels take these, else the reason."""
    if x.shape[1] % num_groups:
        return f"{x.shape[1]} channels do not divide into {num_groups} groups"
    if add is not None and add.shape != x.shape[:2]:
        return f"add has shape {tuple(add.shape)} beside {tuple(x.shape)}"
    return L.why_not(x, weight, bias, *(() if add is None else (add,)), dtypes=L.FLOAT)
