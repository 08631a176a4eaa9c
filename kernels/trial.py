"""A trial of a kernel on this GPU: does it compile, is it right, how long does it take beside torch?

It works on tensors and generators of its own, so that nothing of a run changes. verdicts.py decides on the
results; its tests replace `BENCH`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import minisd.kernels.checks as checks
import minisd.kernels.launch as L
import minisd.kernels.timing as timing
import torch
from minisd.kernels.checks import step
from minisd.kernels.kernel import Kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda"
TORCH = "torch"  # the name of the other candidate
ROUNDS, REPEATS = 15, 20  # of a timing: rounds, in each of which every candidate makes so many calls in a row
CANARY = 512  # bytes behind each buffer that must stay as they are
FILL = 0xFF  # each byte of a new buffer and of its canary: NaN in all floating types


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Call(NamedTuple):
    """What decides how long a call of an op takes."""

    op: str
    arguments: tuple[Any, ...]  # Spec or None in place of tensors, then constants
    grad: bool  # gradients are on
    autocast: bool
    graph: bool  # a CUDA graph will replay it, so that the host's time does not count

    @property
    def specs(self) -> list[Spec]:
        return [Spec(*a) for a in self.arguments if isinstance(a, tuple)]

    @property
    def training(self) -> bool:
        return self.grad and any(spec.requires_grad for spec in self.specs)


class Bench(NamedTuple):
    """The three parts of a trial."""

    compile: Callable[[Kernel, Call], object]  # raises what the compiler or the launch raises
    check: Callable[[Kernel, Call], list[float]]  # errors as shares of what is allowed; raises Wrong
    time_ms: Callable[[Sequence[Kernel], Call], Mapping[str, list[float]]]  # by name, torch's too


class Wrong(Exception):
    """A kernel's result is wrong."""


# ------------------------------ Tensors


def filled(spec: Spec) -> tuple[Tensor, Tensor]:
    """Return a tensor of NaN, and its canary."""
    last = sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
    size = (last + 1) * spec.dtype.itemsize if math.prod(spec.shape) else 0
    whole = torch.full((size + CANARY,), FILL, dtype=torch.uint8, device=DEVICE)
    return whole[:size].view(spec.dtype).as_strided(spec.shape, spec.stride), whole[size:]


class Filled(TorchDispatchMode):
    """Inside, every new buffer is `filled`; `canaries` lie behind them."""

    NEW = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self):
        super().__init__()
        self.canaries: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.NEW:
            made, canary = filled(Spec(made.shape, made.stride(), made.dtype, False))
            self.canaries.append(canary)
        return made


def inputs(call: Call, seed: int = 0) -> tuple[list, list[Tensor]]:
    """Return standard normal tensors for a call, with its constants, and the canaries."""
    generator, arguments, canaries = torch.Generator(DEVICE).manual_seed(seed), [], []
    for a in call.arguments:
        if isinstance(a, tuple):
            spec = Spec(*a)
            if 0 in spec.stride:  # an expanded tensor cannot be filled
                spec = spec._replace(stride=torch.empty(spec.shape, device="meta").stride())
            a, canary = filled(spec)
            a.normal_(generator=generator).requires_grad_(call.training and spec.requires_grad)
            canaries.append(canary)
        arguments.append(a)
    return arguments, canaries


# ------------------------------ The parts of a trial


def launch(kernel: Kernel, call: Call) -> None:
    """Run the kernel once, compiling what is not compiled, and wait for it."""
    step(kernel, inputs(call)[0])()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(kernel: Kernel, call: Call) -> list[float]:
    """Return the errors of outputs and gradients as shares of what is allowed: twice torch's error beside a
    reference of higher precision. Raise Wrong if one is larger, if two runs differ in a bit, or if the kernel
    writes where it should not."""
    arguments, canaries = inputs(call)
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
    higher = torch.float64 if arguments[0].dtype == torch.float32 else torch.float32
    precise = [a.detach().to(higher).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
               for a in arguments]  # fmt: skip
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # in TF32 it would be no reference
    try:
        with torch.autocast(DEVICE, enabled=False):
            exact, torchs = (step(kernel.reference, given)() for given in (precise, arguments))
            L._tapes.clear()  # so that these are a first call of the launchers, and its repetition
            with Filled() as mode:
                ours, again = step(kernel, arguments)(), step(kernel, arguments)()
    finally:
        torch.set_float32_matmul_precision(matmul)
    if not all(bool((canary == FILL).all()) for canary in canaries + mode.canaries):
        raise Wrong("it writes past the end of a buffer")
    if not all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor)):
        raise Wrong("it changes its input")
    if not all(map(torch.equal, ours, again)):
        raise Wrong("two runs differ, or it computes NaN")
    pairs = [[checks.relative(y, value.double()) for y in (own, theirs)]
             for own, theirs, value in zip(ours, torchs, exact, strict=True)]  # fmt: skip
    for i in checks.wrong(errors := dict(enumerate(pairs))):
        raise Wrong("an error of {:.1e}, where torch's is {:.1e}".format(*errors[i]))
    return [error / (2 * allowed + checks.FLOOR) for error, allowed in pairs]


def time_ms(kernels: Sequence[Kernel], call: Call) -> dict[str, list[float]]:
    """Return the times of all rounds, by name. The candidates take turns, and so do sets of inputs, which
    together exceed the L2 cache."""
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in call.specs)
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sets = [inputs(call, seed)[0] for seed in range(min(REPEATS, 1 + 2 * cache // size))]
    half = call.specs[0].dtype if call.specs[0].dtype != torch.float32 else None
    fns = {TORCH: kernels[0].reference} | {kernel.name: kernel for kernel in kernels}
    stream = torch.cuda.stream(torch.cuda.Stream()) if call.graph else contextlib.nullcontext()
    if call.graph:
        torch.cuda.synchronize()  # before another stream reads the inputs
    with torch.autocast(DEVICE, half, enabled=call.autocast), stream:
        runs = {}
        for name, fn in fns.items():
            steps = itertools.islice(itertools.cycle([step(fn, s) for s in sets]), REPEATS)
            each = [lambda run=run: run() and None for run in steps]  # keeps no results
            runs[name] = timing.captured(each, call.graph)
        times = timing.interleaved(runs, ROUNDS, wait=not call.graph)
    return {name: [ms / REPEATS for ms in found] for name, found in times.items()}


BENCH = Bench(launch, check, time_ms)
