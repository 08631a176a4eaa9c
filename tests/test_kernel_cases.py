"""Every kernel of the folder on every case that its file names; what only one kernel has is elsewhere."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernel_helpers import INTERPRET, faults, interpreter, needs_gpu

pytest.importorskip("triton")
from minisd.kernels import aot, kernel, launch, trial  # noqa: E402

KERNELS = list(kernel.discover().values())


def cases(count: int | None = None, ordinary: int | None = None):
    """Parametrize by the first `count` cases of each kernel; those behind the first `ordinary` are slow."""
    return pytest.mark.parametrize(
        "kernel, case",
        [
            pytest.param(k, case, marks=() if ordinary is None or i < ordinary else pytest.mark.slow)
            for k in KERNELS
            for i, case in enumerate(k.cases[:count])
        ],
        ids=lambda value: value.name,
    )


few_cases = cases(2, ordinary=1)
norms_first = pytest.mark.parametrize(  # attention takes torch's tools seconds in the interpreter
    "kernel, case",
    [pytest.param(k, k.cases[0], marks=pytest.mark.slow if "attention" in k.name else ()) for k in KERNELS],
    ids=lambda value: value.name,
)


def gradients(ys, tensors, dys=None, **more) -> tuple[torch.Tensor, ...]:
    """The gradients of all tensors that there are, for outputs that there are; dys is ones if not given."""
    dys = [torch.ones_like(y) for y in ys] if dys is None else dys
    return torch.autograd.grad(ys, [t for t in tensors.values() if t is not None], dys, **more)


def equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@interpreter
@cases(ordinary=4)
def test_outputs_and_gradients(kernel, case):
    assert faults(kernel, case, torch.float32, "cpu") == []


@interpreter
@cases(ordinary=1)
def test_outputs_and_gradients_in_half_precision(kernel, case):
    assert faults(kernel, case, torch.float16, "cpu") == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", launch.FLOAT, ids=str)
@cases()
def test_outputs_and_gradients_on_the_gpu(kernel, case, dtype):
    if dtype not in kernel.dtypes:
        pytest.skip(f"the kernel does not take {dtype}")
    assert faults(kernel, case, dtype, "cuda") == []


@interpreter
@few_cases
def test_same_bits_again_and_nothing_written(kernel, case):
    """Twice forward, twice backward through one graph: equal bits, and the inputs stay as they were."""
    tensors, constants = case.inputs()
    before = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    ys = trial.outputs(kernel, tensors, constants)
    assert equal(ys, trial.outputs(kernel, tensors, constants))
    dys = [torch.randn_like(y) for y in ys]
    assert equal(gradients(ys, tensors, dys, retain_graph=True), gradients(ys, tensors, dys))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@interpreter
@few_cases
def test_gradient_in_any_layout(kernel, case):
    """An expanded gradient (a mean behind the op) gives the bits of a dense one; so does a transposed one."""
    tensors, constants = case.inputs()
    ys = trial.outputs(kernel, tensors, constants)
    expanded = [torch.ones(()).expand_as(y) for y in ys]
    transposed = [torch.randn_like(y.mT.contiguous()).mT for y in ys]
    for dys in (expanded, transposed):
        dense = [launch.dense(dy.clone(), like=y) for dy, y in zip(dys, ys, strict=True)]
        ours = gradients(ys, tensors, dys, retain_graph=True)
        assert equal(ours, gradients(ys, tensors, dense, retain_graph=True))


@interpreter
@few_cases
def test_under_gradient_checkpointing(kernel, case):
    tensors, constants = case.inputs()
    ys = trial.outputs(kernel, tensors, constants)
    again = trial.outputs(
        lambda *arguments: checkpoint(kernel, *arguments, use_reentrant=False), tensors, constants
    )
    assert equal(gradients(again, tensors), gradients(ys, tensors))


@interpreter
@pytest.mark.slow
@norms_first
def test_operator(kernel, case):
    """The operator keeps every rule of torch.library."""
    tensors, constants = case.inputs()
    torch.library.opcheck(kernel.operator, (*tensors.values(), *constants.values()))


@interpreter
@norms_first
def test_compiles_without_a_break(kernel, case):
    tensors, constants = case.inputs()

    def step(x, *arguments):
        return [y.square() for y in trial.outputs(kernel, dict(x=x * 2), dict(enumerate(arguments)))]

    torch.compiler.reset()  # each kernel is another graph, and their number is limited
    arguments = (*tensors.values(), *constants.values())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments)
    ys = step(*arguments)
    torch.testing.assert_close(ys, compiled)
    torch.testing.assert_close(gradients(ys, tensors), gradients(compiled, tensors))


@few_cases
def test_why_not(kernel, case):
    tensors, constants = case.inputs()
    reason = kernel.why_not(*tensors.values(), *constants.values())
    assert reason == ("" if INTERPRET else "the tensors are on cpu, the kernels run on CUDA")


@pytest.mark.parametrize("name", kernel.discover())
def test_every_file_is_complete(name):
    """A kernel is called like its file; it has cases for every tool; each row of a table has a tile for the
    oldest GPU family, and no other than those that aot compiles for."""
    found = kernel.discover()[name]
    assert found.name == name and found.cases and found.timed
    module = importlib.import_module(f"minisd.kernels.{name}")
    for tiles in (value for key, value in vars(module).items() if key.endswith("_TILES")):
        for size, row in tiles.items():
            assert 80 in row and set(row) <= set(aot.SHARED_LIMIT), (found.name, size)
