"""The measure of right: each op on named shapes, outputs and all gradients against float64.

Tests and the correctness half of bench.py call `errors`, so the two cannot drift apart. An error is a
relative norm, |kernel - exact| / |exact|, beside torch's own at the same dtype: ours may be twice as large.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6  # fp32 rounding of a sum in another order; torch's own error can be zero on tiny shapes


@dataclass(frozen=True)
class Case:
    """Named inputs: `make(generator)` gives float64 tensors by name (None allowed) and keyword constants."""

    name: str
    make: Callable[[torch.Generator], tuple[dict[str, Tensor | None], dict]]
    layout: torch.memory_format = torch.contiguous_format


def place(tensors: dict, dtype: torch.dtype, device: str, layout=torch.contiguous_format) -> dict:
    """Copies at dtype and device, 4-d ones in the layout, that want gradients."""
    out = {}
    for name, t in tensors.items():
        if t is not None:
            t = t.to(device, dtype, copy=True)
            t = t.contiguous(
                memory_format=layout if t.ndim == 4 else torch.contiguous_format
            ).requires_grad_()
        out[name] = t
    return out


def run(fn: Callable, inputs: dict, constants: dict, dys: list[Tensor]) -> dict[str, Tensor]:
    """Outputs as y, y1, ... and a gradient for every tensor input."""
    ys = fn(**inputs, **constants)
    ys = (ys,) if isinstance(ys, Tensor) else ys
    wanted = {name: t for name, t in inputs.items() if t is not None}
    grads = torch.autograd.grad(
        ys, list(wanted.values()), [g.to(y.dtype) for y, g in zip(ys, dys, strict=True)]
    )
    out = {f"y{i or ''}": y.detach() for i, y in enumerate(ys)}
    return out | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def relative(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; a gradient that is zero in theory is measured against elements of 0.1."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(0.1 * exact.numel() ** 0.5)).item()


def errors(
    kernel: Callable, reference: Callable, case: Case, dtype: torch.dtype, device: str
) -> dict[str, tuple[float, float]]:
    """name -> (error of the kernel, error of torch), for every output and gradient."""
    generator = torch.Generator().manual_seed(0)
    tensors, constants = case.make(generator)
    rounded = place(tensors, dtype, device, case.layout)
    double = {k: None if t is None else t.detach().double().requires_grad_() for k, t in rounded.items()}
    with torch.no_grad():
        ys = reference(**double, **constants)
    ys = (ys,) if isinstance(ys, Tensor) else ys
    dys = [
        torch.randn(y.shape, generator=generator, dtype=torch.double).to(dtype).double().to(device)
        for y in ys
    ]
    exact = run(reference, double, constants, dys)
    theirs = run(reference, place(tensors, dtype, device, case.layout), constants, dys)
    ours = run(kernel, rounded, constants, [g.to(dtype) for g in dys])
    return {name: (relative(ours[name], exact[name]), relative(theirs[name], exact[name])) for name in exact}


def verdict(found: dict[str, tuple[float, float]]) -> list[str]:
    """What errs more than twice torch's own error, in words; empty when all is well."""
    # "not <=" so that a NaN is caught
    return [
        f"{name}: {ours:.2e}, torch {theirs:.2e}"
        for name, (ours, theirs) in found.items()
        if not ours <= 2 * theirs + FLOOR
    ]


# ------------------------------ The cases, by op


def randn(generator, *shape, scale=1.0, shift=0.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.double) * scale + shift


def group_norm_case(name, b, c, h, w, groups, *, silu=True, add=True, eps=1e-5, shift=0.0, nhwc=True) -> Case:
    def make(g):
        x = randn(g, b, c, h, w, scale=0.5) + shift * randn(g, 1, c, 1, 1)
        weight, bias = randn(g, c), randn(g, c)
        tensors = dict(x=x, weight=weight, bias=bias, add=randn(g, b, c) if add else None)
        return tensors, dict(num_groups=groups, eps=eps, silu=silu)

    return Case(name, make, torch.channels_last if nhwc else torch.contiguous_format)


def attention_case(name, b, n, m, nh, hd, *, scale=1.0, equal=False, late=1.0, apart=0.0) -> Case:
    """`equal`: all logits the same; `late`: keys after the first hundred are this much larger; `apart`:
    queries and keys point away from each other, so that all logits are far below zero."""

    def make(g):
        q, k, v = randn(g, b, n, nh, hd, scale=scale), randn(g, b, m, nh, hd), randn(g, b, m, nh, hd)
        k[:, 100:] *= late
        q, k = q + apart, k - apart
        return dict(q=q, k=k[:, :1].expand_as(k) if equal else k, v=v), {}

    return Case(name, make)


def geglu_case(name, *shape, scale=1.0) -> Case:
    return Case(name, lambda g: (dict(x=randn(g, *shape, scale=scale)), {}))


def layer_norm_case(name, *shape, residual=True, shift=0.0, eps=1e-5) -> Case:
    def make(g):
        tensors = dict(x=randn(g, *shape) + shift, residual=randn(g, *shape) if residual else None)
        return tensors | dict(weight=randn(g, shape[-1]), bias=randn(g, shape[-1])), dict(eps=eps)

    return Case(name, make)
