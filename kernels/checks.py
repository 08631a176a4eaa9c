"""The criterion of correctness: a kernel's outputs and all its gradients, against a higher precision.

The tests, bench.py and trial.py all ask `wrong`, so that they cannot diverge. An error is a relative norm,
|kernel - exact| / |exact|; it may be at most twice that of torch at the same dtype.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from minisd.kernels.kernel import Case, Kernel, as_tuple
from torch import Tensor

FLOOR = 1e-6  # fp32 rounding of a sum in another order; torch's own error can be zero on tiny shapes


def normal() -> Callable[..., Tensor]:
    """Return randn(*shape) in float64 on the CPU with a generator of its own, the same in every call."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def inputs(
    case: Case, dtype=torch.float32, device="cpu", *, randn: Callable | None = None, weights=None
) -> tuple[dict[str, Tensor | None], dict]:
    """Return the case's tensors, requiring gradients, and its constants; by default the same values in every
    call. `weights` is the dtype of 1-d tensors if it is another."""
    tensors, constants = case.make(randn or normal())
    for name, t in tensors.items():
        if t is not None:
            t = t.to(device, weights or dtype if t.ndim == 1 else dtype)
            t = t.contiguous(memory_format=case.layout if t.ndim == 4 else torch.contiguous_format)
            tensors[name] = t.requires_grad_()
    return tensors, constants


def outputs(fn: Callable, tensors: dict, constants: dict) -> tuple[Tensor, ...]:
    """Return the outputs of fn without the empty ones, which stand for an absent input's."""
    return tuple(y for y in as_tuple(fn(*tensors.values(), *constants.values())) if y.numel())


def step(fn: Callable, arguments: Sequence, dys: list[Tensor] | None = None) -> Callable:
    """Return a call of fn, without arguments, for its outputs and the gradients of what requires one. `dys`,
    the outputs' own, are by default random, and the same for every fn but for rounding."""
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    forward = functools.partial(outputs, fn, dict(enumerate(arguments)), {})
    if not wanted:
        return forward
    if dys is None:
        generator = torch.Generator(wanted[0].device).manual_seed(1)
        dys = [torch.randn(y.shape, device=y.device, generator=generator).to(y) for y in forward()]

    def both() -> tuple[Tensor, ...]:
        ys = forward()
        return (*[y.detach() for y in ys], *torch.autograd.grad(ys, wanted, dys))

    return both


def run(fn: Callable, tensors: dict, constants: dict, dys: list[Tensor]) -> dict[str, Tensor]:
    """Return the outputs as y, y1, ... and the gradient of every tensor input."""
    names = [f"y{i or ''}" for i in range(len(dys))] + [f"d{k}" for k, t in tensors.items() if t is not None]
    return dict(zip(names, step(fn, [*tensors.values(), *constants.values()], dys)(), strict=True))


def relative(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; a gradient that is zero in theory is measured against elements of 0.1."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(0.1 * exact.numel() ** 0.5)).item()


def exactly(fn: Callable, tensors: dict, constants: dict, dys: list[Tensor]) -> dict[str, Tensor]:
    """`run` in at most sixteen parts of the batch, one after the other: in float64 the score matrices of a
    whole batch may not fit. Tensors of one dimension belong to all parts, so their gradients are sums."""
    parts = []
    for i in range(count := min(16, len(next(iter(tensors.values()))))):
        piece = {k: t if t is None or t.ndim == 1 else t.detach().tensor_split(count)[i].requires_grad_()
                 for k, t in tensors.items()}  # fmt: skip
        parts.append(run(fn, piece, constants, [dy.tensor_split(count)[i] for dy in dys]))
    shared = {f"d{k}" for k, t in tensors.items() if t is not None and t.ndim == 1}
    return {
        k: sum(p[k] for p in parts) if k in shared else torch.cat([p[k] for p in parts]) for k in parts[0]
    }


def errors(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """Return the errors of the kernel and of torch for every output and gradient."""
    randn = normal()
    rounded, constants = inputs(case, dtype, device, randn=randn)
    double = {k: None if t is None else t.detach().double().requires_grad_() for k, t in rounded.items()}
    dys = [randn(y.shape).to(y) for y in outputs(kernel, rounded, constants)]
    exact = exactly(kernel.reference, double, constants, [dy.double() for dy in dys])
    theirs, ours = (run(fn, rounded, constants, dys) for fn in (kernel.reference, kernel))
    return {name: (relative(ours[name], y), relative(theirs[name], y)) for name, y in exact.items()}


def wrong(errors: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names whose error is more than twice torch's."""
    return [k for k, (ours, theirs) in errors.items() if not ours <= 2 * theirs + FLOOR]  # so also NaN


def faults(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """Return a line for every output and gradient that is wrong."""
    found = errors(kernel, case, dtype, device)
    return ["{}: {:.2e}, torch {:.2e}".format(name, *found[name]) for name in wrong(found)]
