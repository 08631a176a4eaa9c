import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import checks, group_norm, group_norm_small, launch  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
reference_path = pytest.mark.skipif(
    launch.INTERPRET, reason="the reference is what runs without an interpreter"
)
gn = checks.group_norm_case

CASES = [
    gn("small, batch 3", 3, 64, 4, 4, 4),
    gn("small, 10 channels a group", 1, 80, 4, 4, 8, eps=1e-6, silu=False, add=False),
    gn("small, one pixel", 2, 32, 1, 1, 4),
    gn("small, contiguous", 1, 64, 5, 3, 4, nhwc=False),
    gn("small, mean 100 deviations", 1, 64, 8, 8, 4, shift=50.0),
    gn("tiles, ragged rows and channels", 1, 48, 9, 15, 3),
    gn("tiles, 10 channels a group", 1, 80, 9, 8, 8, eps=1e-6, silu=False, add=False),
    gn("tiles, several tiles a split", 1, 1280, 11, 13, 1),
    gn("tiles, contiguous", 1, 20, 25, 23, 4, nhwc=False),
    gn("tiles, batch 2, one group", 2, 32, 9, 8, 1),
    gn("tiles, mean 100 deviations", 1, 64, 12, 13, 4, shift=50.0),
    gn("large enough for tiles", 1, 32, 33, 17, 1, add=False),
]


kernel = group_norm.group_norm


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    """The cases called tiles take the path of large images, which would make them slow here, at any size."""
    if "tiles" in request.node.name and "large" not in request.node.name:
        monkeypatch.setattr(group_norm_small, "FWD", 0)
        monkeypatch.setattr(group_norm_small, "BWD", -1)


def inputs(case, dtype=torch.float32, device="cpu"):
    tensors, constants = case.make(torch.Generator().manual_seed(0))
    return checks.place(tensors, dtype, device, case.layout), constants


@interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case):
    for dtype in (torch.float32, torch.float16) if case in CASES[:9:2] else (torch.float32,):
        assert checks.verdict(checks.errors(kernel, group_norm.reference, case, dtype, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", launch.FLOAT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients_on_the_gpu(case, dtype):
    assert checks.verdict(checks.errors(kernel, group_norm.reference, case, dtype, "cuda")) == []


@interpreter
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=lambda c: c.name)
def test_same_bits_again_and_nothing_written(case):
    """Twice forward, twice backward through one graph: equal bits, and the inputs stay as they were."""
    tensors, constants = inputs(case)
    before = {k: t.detach().clone() for k, t in tensors.items()}
    y, again = kernel(**tensors, **constants), kernel(**tensors, **constants)
    assert torch.equal(y, again)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(tensors.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(tensors[k], before[k]) for k in before)


@pytest.mark.parametrize("case", [CASES[3], CASES[5]], ids=lambda c: c.name)
def test_gradients_in_any_layout(case):
    """A gradient that arrives expanded (a mean behind it) or in the other layout gives the same result."""
    tensors, constants = inputs(case)
    wanted = [t for t in tensors.values() if t is not None]
    y = kernel(**tensors, **constants)
    assert launch.layout(y) == launch.layout(tensors["x"])
    for dy in (
        torch.ones(()).expand_as(y),
        torch.randn(y.shape).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        grads = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        dense = torch.autograd.grad(y, wanted, launch.dense(dy, like=y), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, dense, strict=True))


def test_input_with_gaps_and_double_use():
    """A slice is made dense; an input that is used twice gets the sum of both gradients."""
    x = torch.randn(2, 32, 6, 9, requires_grad=True)
    weight, bias = torch.randn(32), torch.randn(32)
    constants = dict(add=None, num_groups=8, eps=1e-5, silu=True)
    y = kernel(x[:, :, :, 1:8], weight, bias, **constants) + kernel(x[:, :, :, :7], weight, bias, **constants)
    ref = group_norm.reference(x[:, :, :, 1:8], weight, bias, **constants)
    ref = ref + group_norm.reference(x[:, :, :, :7], weight, bias, **constants)
    torch.testing.assert_close(y, ref)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(ref.sum(), x))


@reference_path
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[8]], ids=lambda c: c.name)
def test_operator(case):
    """The CPU registration agrees with torch, and the operator keeps every rule of torch.library."""
    assert checks.verdict(checks.errors(kernel, group_norm.reference, case, torch.float32, "cpu")) == []
    tensors, constants = inputs(case)
    torch.library.opcheck(group_norm.group_norm_op, (*tensors.values(), *constants.values()))


@reference_path
def test_compiles_without_a_break():
    tensors, constants = inputs(CASES[0])
    wanted = list(tensors.values())

    def step(x, weight, bias, add):
        return kernel(x * 2, weight, bias, add, **constants).square()

    y, compiled = step(**tensors), torch.compile(step, backend="aot_eager", fullgraph=True)(**tensors)
    torch.testing.assert_close(y, compiled)
    grads = [torch.autograd.grad(out.sum(), wanted) for out in (y, compiled)]
    torch.testing.assert_close(*grads)


def test_why_not():
    x, w = torch.randn(1, 30, 4, 4), torch.ones(30)
    assert "divide" in group_norm.why_not(x, 4, w, w)
    assert ("on cpu" in group_norm.why_not(x, 3, w, w)) == (not launch.INTERPRET)
