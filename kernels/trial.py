"""A trial of a kernel on this GPU: does it compile and is it right, how long does it take beside torch?

It works on tensors and generators of its own, so that nothing of a run changes. verdicts.py decides on the
results of `check` and `time_ms`. The tests and bench.py ask for the same `errors`, so that they cannot
diverge: relative norms, |kernel - exact| / |exact|, at most twice those of torch at the same dtype.
"""

import contextlib
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import minisd.kernels.launch as L
import torch
from minisd.kernels.kernel import Case, Kernel
from minisd.kernels.launch import as_tuple
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda"
TORCH = "torch"  # the name of the other candidate
ROUNDS, REPEATS = 15, 20  # of a timing: rounds, in each of which every candidate makes so many calls in a row
CANARY = 512  # bytes behind each buffer that must stay as they are
FLOOR = 1e-6  # fp32 rounding of a sum in another order; torch's own error can be zero on tiny shapes
FILL = 0xFF  # each byte of a new buffer and of its canary: NaN in all floating types


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    device: torch.device | None = None


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


# ------------------------------ The criterion


def outputs(fn: Callable, tensors: dict, constants: dict) -> tuple[Tensor, ...]:
    """Return the outputs of fn without the empty ones, which stand for an absent input's."""
    return tuple(y for y in as_tuple(fn(*tensors.values(), *constants.values())) if y.numel())


def random_like(ys: Sequence[Tensor]) -> list[Tensor]:
    """Return normal tensors, the same in every call but for rounding."""
    generator = torch.Generator(ys[0].device).manual_seed(1)
    return [torch.randn(y.shape, device=y.device, generator=generator).to(y) for y in ys]


def step(fn: Callable, arguments: Sequence, dys: Sequence[Tensor] = ()) -> Callable:
    """Return a call of fn, without arguments, for its outputs and the gradients of what requires one. `dys`,
    the outputs' own, are by default `random_like` them."""
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    forward = functools.partial(outputs, fn, dict(enumerate(arguments)), {})
    if not wanted:
        return forward
    dys = dys or random_like(forward())

    def both() -> tuple[Tensor, ...]:
        ys = forward()
        return (*[y.detach() for y in ys], *torch.autograd.grad(ys, wanted, dys))

    return both


def relative(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; a gradient that is zero in theory is measured against elements of 0.1."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(0.1 * exact.numel() ** 0.5)).item()


def errors(ours: Sequence[Tensor], reference: Callable, arguments: Sequence, dtype: torch.dtype) -> list:
    """Return the error of each result of a `step`, and that of torch, beside the reference in `dtype`."""
    precise = [a.detach().to(dtype).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
               for a in arguments]  # fmt: skip
    dys = random_like(outputs(reference, dict(enumerate(arguments)), {}))
    theirs = step(reference, arguments, dys)()
    exact = [x.double() for x in step(reference, precise, [dy.to(dtype) for dy in dys])()]
    return [(relative(a, x), relative(b, x)) for a, b, x in zip(ours, theirs, exact, strict=True)]


def by_name(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[float, float]]:
    """Return the `errors` of outputs (y, y1) and gradients (dx, ...) beside float64."""
    tensors, constants = case.inputs(dtype, device)
    arguments = [*tensors.values(), *constants.values()]
    found = errors(step(kernel, arguments)(), kernel.reference, arguments, torch.float64)
    names = [f"d{name}" for name, t in tensors.items() if t is not None]
    return dict(zip(["y", "y1"][: len(found) - len(names)] + names, found, strict=True))


def wrong(errors: dict) -> list:
    """Return the names whose error is more than twice torch's."""
    return [k for k, (ours, theirs) in errors.items() if not ours <= 2 * theirs + FLOOR]  # so also NaN


# ------------------------------ Times


def captured(each: list[Callable], graph: bool) -> Callable:
    """The calls as one CUDA graph, captured on the current stream; without `graph`, one after the other."""

    def run():
        return [call() for call in each]

    if not graph:
        return run
    run()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graphed = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which would empty the caches; other threads, as of a data loader, may go on
    graphed.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graphed.capture_end()
    return lambda kept=each: graphed.replay()  # a graph does not keep the tensors that it reads


def interleaved(runs: dict[str, Callable], rounds: int = 30, *, wait: bool = False) -> dict[str, list[float]]:
    """The times of each in ms, sorted. They take turns, so that clocks and heat are the same for all. With
    `wait` each begins on an idle GPU, so that its time is the host's or the GPU's, whichever is longer."""
    events: dict[str, list] = {name: [] for name in runs}
    for name in list(runs) * (rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[name]()
        end.record()
        events[name].append((start, end))
        if wait:
            end.synchronize()
    end.synchronize()
    return {name: sorted(a.elapsed_time(b) for a, b in pairs[3:]) for name, pairs in events.items()}


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of sorted times."""
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


# ------------------------------ The parts of a trial


def check(kernel: Kernel, call: Call) -> list[float]:
    """Return the errors of outputs and gradients as shares of what is allowed: twice torch's error beside a
    reference of higher precision. Raise Wrong if one is larger, if two runs differ in a bit, or if the kernel
    writes where it should not."""
    arguments, canaries = inputs(call)
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
    higher = torch.float64 if arguments[0].dtype == torch.float32 else torch.float32
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # in TF32 it would be no reference
    try:
        with torch.autocast(DEVICE, enabled=False):
            L._tapes.clear()  # so that these are a first call of the launchers, and its repetition
            with Filled() as mode:
                ours, again = step(kernel, arguments)(), step(kernel, arguments)()
            found = errors(ours, kernel.reference, arguments, higher)
    finally:
        torch.set_float32_matmul_precision(matmul)
    if not all(bool((canary == FILL).all()) for canary in canaries + mode.canaries):
        raise Wrong("it writes past the end of a buffer")
    if not all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor)):
        raise Wrong("it changes its input")
    if not all(map(torch.equal, ours, again)):
        raise Wrong("two runs differ, or it computes NaN")
    for i in wrong(dict(enumerate(found))):
        raise Wrong("an error of {:.1e}, where torch's is {:.1e}".format(*found[i]))
    return [error / (2 * allowed + FLOOR) for error, allowed in found]


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
            runs[name] = captured(each, call.graph)
        times = interleaved(runs, ROUNDS, wait=not call.graph)
    return {name: [ms / REPEATS for ms in found] for name, found in times.items()}
