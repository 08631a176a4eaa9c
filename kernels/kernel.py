"""`Kernel`: what the file of one kernel provides, and the torch operators built from it.

A file of this folder that defines `KERNEL = Kernel(...)` is a kernel. There is no other list of kernels:
minisd/ops.py, aot.py, bench.py, verdicts.py and the tests all call `discover`.
"""

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import minisd.kernels.launch as L
import torch
from minisd.kernels.launch import as_tuple
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction  # Function without 5 us of Python in each call

PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Case:
    """A named set of inputs of a kernel, and how much work it is.

    `make(randn)` returns tensors by name (None allowed) and constants by name, both in the order of the
    kernel's parameters; `randn(*shape)` chooses dtype, device and generator.
    """

    name: str
    make: Callable[[Callable[..., Tensor]], tuple[dict[str, Tensor | None], dict]]
    layout: torch.memory_format = torch.contiguous_format  # of the 4-d tensors
    flops: float = 0.0  # of the forward's matrix products (the backward takes 2.5 times); 0: memory-bound
    elements: int = 0  # read and written by the forward
    exps: float = 0.0  # exponentials, if they may limit it, of the forward and again of the backward
    back: float = 2.0  # elements read and written by the backward, relative to the forward

    def inputs(
        self, dtype=torch.float32, device="cpu", *, randn: Callable | None = None, weights=None
    ) -> tuple[dict[str, Tensor | None], dict]:
        """Return the tensors, requiring gradients, and the constants; by default the same values in every
        call. `weights` is the dtype of 1-d tensors if it is another."""
        own = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        tensors, constants = self.make(randn or own)
        for name, t in tensors.items():
            if t is not None:
                t = t.to(device, weights or dtype if t.ndim == 1 else dtype)
                t = t.contiguous(memory_format=self.layout if t.ndim == 4 else torch.contiguous_format)
                tensors[name] = t.requires_grad_()
        return tensors, constants


@dataclass(kw_only=True, eq=False)
class Kernel:
    """One operation: call it with the parameters of `reference`, tensors (or None) first, then constants."""

    name: str
    reference: Callable  # the same operation in plain torch
    forward: Callable  # launcher; outputs after the first `differentiable` are for the backward alone
    backward: Callable  # launcher; takes the gradients of differentiable outputs, then what `save` returned
    save: Callable = lambda inputs, outputs: (*inputs, *outputs)  # tensors, then constants, for the backward
    constants: int = 0  # the number of these constants
    gradients: Callable = lambda *results: results  # backward's results as one gradient per tensor parameter
    differentiable: int = 1  # number of outputs that the caller gets
    unsupported: Callable = lambda *arguments: ""  # why this kernel cannot run, or an empty string
    dtypes: tuple[torch.dtype, ...] = L.FLOAT

    cases: Sequence[Case]  # small ones, each checked against float64 in the tests
    timed: Sequence[Case]  # Stable Diffusion's shapes, timed by bench.py and compiled by aot.py
    compiled: Sequence[Case] = ()  # compiled as well
    size_class: Callable[..., str]  # sizes that share a verdict; takes tensors' shapes in place of tensors
    variants: Sequence["Kernel"] = ()  # other kernels of the same operation, each with a name of its own

    def __post_init__(self):
        self.forward, self.backward = L.remembered(self.forward), L.remembered(self.backward)
        self.operator = operator(self.name, self.forward)
        self.operator.register_autograd(self._backward, setup_context=self._setup_context)
        self._backward_operator = operator(f"{self.name}_bwd", self.backward)
        pieces = dict(forward=staticmethod(self._forward), backward=staticmethod(self._backward))
        self._function = type(self.name, (_SingleLevelFunction,), pieces)

    def __call__(self, *arguments, key: tuple | None = None):
        """Return the differentiable output, or a tuple of them. `key` is as in `launch.remembered`."""
        # Three ways to the same launchers: an operator costs 10 us more a call, autograd for it 80 us, and
        # autograd for plain tensors 10 us. There are 150 calls in a UNet.
        if torch.compiler.is_compiling() or type(arguments[0]) not in PLAIN:
            outputs = self.operator(*arguments)
        elif torch.is_grad_enabled() and any([getattr(a, "requires_grad", False) for a in arguments]):
            return self._function.apply(*arguments, key)
        else:
            outputs = self.forward(*arguments, key=key)
        return self._shown(as_tuple(outputs))

    def _shown(self, outputs: tuple) -> Tensor | tuple[Tensor, ...]:
        return outputs[: self.differentiable] if self.differentiable > 1 else outputs[0]

    def _forward(self, ctx, *arguments):
        *arguments, key = arguments
        outputs = as_tuple(self.forward(*arguments, key=key))
        self._setup_context(ctx, arguments, outputs, key)
        return self._shown(outputs)

    def _setup_context(self, ctx, inputs, output, key: tuple | None = None):
        outputs, ctx.key = as_tuple(output), key
        absent = [y for y in outputs[: self.differentiable] if not y.numel()]
        ctx.mark_non_differentiable(*absent, *outputs[self.differentiable :])
        ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient: each would be a launch
        saved = self.save(inputs, outputs)
        tensors = len(saved) - self.constants
        ctx.save_for_backward(*saved[:tensors])
        ctx.constants = saved[tensors:]

    def _backward(self, ctx, *grads):
        # Under gradient checkpointing it is an error to read saved_tensors twice
        tensors = (*grads[: self.differentiable], *ctx.saved_tensors)
        # The operator is what compilers trace, and what says that there is no second derivative
        if type(tensors[self.differentiable]) in PLAIN and not torch.is_grad_enabled():
            # The forward's key tells all but how autograd, and hooks of what is saved, lay out tensors
            key = ctx.key and (ctx.key, *[t is not None and t.stride() for t in tensors])
            results = self.backward(*tensors, *ctx.constants, key=key)
        else:
            results = self._backward_operator(*tensors, *ctx.constants)
        results = self.gradients(*as_tuple(results))
        return tuple([g if needed else None for g, needed in zip_longest(results, ctx.needs_input_grad)])

    def launch(self, *arguments) -> None:
        """Run the forward and the backward without autograd."""
        outputs = as_tuple(self.forward(*arguments))
        self.backward(*outputs[: self.differentiable], *self.save(arguments, outputs))

    def why_not(self, *arguments) -> str:
        """Return why the kernel cannot run on these arguments, or an empty string."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        return self.unsupported(*arguments) or L.why_not(*tensors, dtypes=self.dtypes)


def operator(name: str, launcher: Callable):
    """Return a torch operator that calls `launcher`. A compiler sees what it allocates, and no launch."""

    def fake(*arguments):
        with L.record(80):
            return launcher(*arguments)

    options = dict(mutates_args=(), device_types=("cuda", "cpu"))
    made = torch.library.custom_op(f"minisd::{name}", launcher, **options)
    made.register_fake(fake)
    return made


@functools.cache
def discover() -> dict[str, Kernel]:
    """Return the kernels of this folder by name: the files that define KERNEL."""
    L.survey()
    files = sorted(Path(__file__).parent.glob("*.py"))
    names = [p.stem for p in files if re.search(r"^KERNEL = ", p.read_text(encoding="utf-8"), re.MULTILINE)]
    return {name: importlib.import_module(f"minisd.kernels.{name}").KERNEL for name in names}


def select(only: str, *kinds: str) -> list[tuple[Kernel, Case]]:
    """Return all kernels' `cases`, `timed` or `compiled` whose kernel or case name contains `only`."""
    pairs = [(k, case) for k in discover().values() for kind in kinds for case in getattr(k, kind)]
    return [(k, case) for k, case in pairs if only in f"{k.name} {case.name}"]
