import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import checks, launch, layer_norm  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
reference_path = pytest.mark.skipif(
    launch.INTERPRET, reason="the reference is what runs without an interpreter"
)
ln = checks.layer_norm_case

CASES = [
    ln("320, tokens", 2, 7, 320),
    ln("no residual", 5, 64, residual=False),
    ln("one row", 1, 1, 640),
    ln("odd width", 9, 77),
    ln("more rows than programs", 300, 16, residual=False),
    ln("mean 100 deviations", 6, 128, residual=False, shift=100.0),
]


def kernel(x, residual, weight, bias, eps):
    y, s = layer_norm.layer_norm(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)


def reference(x, residual, weight, bias, eps):
    y, s = layer_norm.reference(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)


def inputs(case):
    tensors, constants = case.make(torch.Generator().manual_seed(0))
    return checks.place(tensors, torch.float32, "cpu"), constants


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case, dtype):
    assert checks.verdict(checks.errors(kernel, reference, case, dtype, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", launch.FLOAT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients_on_the_gpu(case, dtype):
    assert checks.verdict(checks.errors(kernel, reference, case, dtype, "cuda")) == []


@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_one_output_used(used):
    tensors, constants = inputs(CASES[0])
    wanted = list(tensors.values())[: 2 if used else 4]
    ours, theirs = (f(**tensors, **constants)[used].sum() for f in (kernel, reference))
    grads = [torch.autograd.grad(y, wanted) for y in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_same_bits_again_and_nothing_written():
    tensors, constants = inputs(CASES[3])
    before = {k: t.detach().clone() for k, t in tensors.items()}
    y, s = kernel(**tensors, **constants)
    dy = torch.randn(y.shape[1], y.shape[0]).t()
    first, second = (
        torch.autograd.grad((y, s), list(tensors.values()), (dy, dy), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(tensors[k], before[k]) for k in before)


@reference_path
@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
def test_operator(case):
    assert checks.verdict(checks.errors(kernel, reference, case, torch.float32, "cpu")) == []
    tensors, constants = inputs(case)
    torch.library.opcheck(layer_norm.layer_norm_op, (*tensors.values(), *constants.values()))
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors, **constants), kernel(**tensors, **constants))


def test_why_not():
    x, w = torch.randn(2, 9000), torch.ones(9000)
    assert "9000" in layer_norm.why_not(x, w, w)
    assert "differ" in layer_norm.why_not(x[:, :8], w[:8], w[:8], x[:1, :8])
