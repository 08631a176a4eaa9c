"""The measure of right: a kernel on a case, outputs and all gradients against float64.

Tests and the correctness half of bench.py call `faults`, so the two cannot drift apart. An error is a
relative norm, |kernel - exact| / |exact|, beside torch's own at the same dtype: ours may be twice as large.
"""

import functools
from collections.abc import Callable

import torch
from minisd.kernels.kernel import Case, Kernel, as_tuple
from torch import Tensor

FLOOR = 1e-6  # fp32 rounding of a sum in another order; torch's own error can be zero on tiny shapes


def normal(seed: int = 0) -> Callable[..., Tensor]:
    """randn(*shape) in float64 on the CPU, from a generator of its own."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def place(
    tensors: dict,
    dtype: torch.dtype,
    device: str,
    layout: torch.memory_format,
    weights: torch.dtype | None = None,
) -> dict:
    """Copies at dtype and device, 4-d ones in the layout, that want gradients; `weights` is the type of 1-d
    tensors, if another."""
    out = {}
    for name, t in tensors.items():
        if t is not None:
            t = t.to(device, weights or dtype if t.ndim == 1 else dtype, copy=True)
            t = t.contiguous(memory_format=layout if t.ndim == 4 else torch.contiguous_format)
            t.requires_grad_()
        out[name] = t
    return out


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[dict, dict]:
    """The case's tensors, which want gradients, and its constants; the same values in every call."""
    tensors, constants = case.make(normal())
    return place(tensors, dtype, device, case.layout), constants


def outputs(fn: Callable, tensors: dict, constants: dict) -> tuple[Tensor, ...]:
    """What fn returns, without outputs that are empty: they stand for what was not asked for."""
    return tuple(y for y in as_tuple(fn(*tensors.values(), *constants.values())) if y.numel())


def run(fn: Callable, tensors: dict, constants: dict, dys: list[Tensor]) -> dict[str, Tensor]:
    """Outputs as y, y1, ... and a gradient for every tensor input."""
    ys = outputs(fn, tensors, constants)
    present = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(
        ys, list(present.values()), [g.to(y.dtype) for y, g in zip(ys, dys, strict=True)]
    )
    out = {f"y{i or ''}": y.detach() for i, y in enumerate(ys)}
    return out | {f"d{name}": g for name, g in zip(present, grads, strict=True)}


def relative(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; a gradient that is zero in theory is measured against elements of 0.1."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(0.1 * exact.numel() ** 0.5)).item()


def errors(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """name -> (error of the kernel, error of torch), for every output and gradient."""
    randn = normal()
    tensors, constants = case.make(randn)
    rounded = place(tensors, dtype, device, case.layout)
    double = {k: None if t is None else t.detach().double().requires_grad_() for k, t in rounded.items()}
    with torch.no_grad():
        ys = outputs(kernel.reference, double, constants)
    dys = [randn(y.shape).to(dtype).double().to(device) for y in ys]
    exact = run(kernel.reference, double, constants, dys)
    theirs = run(kernel.reference, place(tensors, dtype, device, case.layout), constants, dys)
    ours = run(kernel, rounded, constants, [g.to(dtype) for g in dys])
    return {name: (relative(ours[name], exact[name]), relative(theirs[name], exact[name])) for name in exact}


def faults(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """What errs more than twice torch's own error, in words; empty when all is well."""
    # "not <=" so that a NaN is caught
    return [
        f"{name}: {ours:.2e}, torch {theirs:.2e}"
        for name, (ours, theirs) in errors(kernel, case, dtype, device).items()
        if not ours <= 2 * theirs + FLOOR
    ]
