import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import checks, geglu, launch  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
reference_path = pytest.mark.skipif(
    launch.INTERPRET, reason="the reference is what runs without an interpreter"
)

CASES = [
    checks.geglu_case("tokens", 2, 5, 128),
    checks.geglu_case("wider than a tile, ragged", 3, 2 * 1300),
    checks.geglu_case("one row of one", 1, 2),
    checks.geglu_case("far out on both sides", 4, 64, scale=6.0),
]


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case, dtype):
    assert checks.verdict(checks.errors(geglu.geglu, geglu.reference, case, dtype, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", launch.FLOAT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients_on_the_gpu(case, dtype):
    assert checks.verdict(checks.errors(geglu.geglu, geglu.reference, case, dtype, "cuda")) == []


def test_second_backward_expanded_gradient_and_double_use():
    """The backward never writes over x: a second one gives the same bits."""
    x = torch.randn(3, 40, requires_grad=True)
    before = x.detach().clone()
    y = geglu.geglu(x)
    dy = torch.ones(()).expand_as(y)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, before)
    twice = torch.autograd.grad(geglu.geglu(x).sum() + geglu.geglu(x).sum(), x)[0]
    torch.testing.assert_close(twice, 2 * first)


@reference_path
def test_operator():
    assert checks.verdict(checks.errors(geglu.geglu, geglu.reference, CASES[0], torch.float32, "cpu")) == []
    x = torch.randn(3, 40, requires_grad=True)
    torch.library.opcheck(geglu.geglu_op, (x,))
    y = torch.compile(lambda t: geglu.geglu(t * 2), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, geglu.reference(x * 2))


def test_why_not():
    assert "divide" in geglu.why_not(torch.randn(3, 5))
