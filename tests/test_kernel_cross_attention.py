import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import attention, checks, cross_attention, launch  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
reference_path = pytest.mark.skipif(
    launch.INTERPRET, reason="the reference is what runs without an interpreter"
)
ac = checks.attention_case

CASES = [
    ac("77 keys, 40", 1, 128, 77, 2, 40),
    ac("77 keys, 80, ragged, batch 3", 3, 70, 77, 1, 80),
    ac("77 keys, 160", 1, 33, 77, 1, 160),
    ac("one key", 2, 9, 1, 1, 8),
    ac("one query, 20 keys", 1, 1, 20, 2, 64),
    ac("128 keys, 72 = 64 + 16", 1, 64, 128, 1, 72),
    ac("peaked logits", 1, 64, 77, 1, 40, scale=30.0),
    ac("all logits equal", 1, 64, 77, 1, 40, equal=True),
    ac("all logits far below zero", 1, 64, 77, 1, 40, apart=5.0),
]
MANY = ac("many tiles: several a program, several splits", 1, 600, 13, 1, 8)


kernel = cross_attention.cross_attention


def inputs(case):
    return checks.place(case.make(torch.Generator().manual_seed(0))[0], torch.float32, "cpu")


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case, dtype):
    assert checks.verdict(checks.errors(kernel, attention.reference, case, dtype, "cpu")) == []


@interpreter
def test_many_tiles(monkeypatch):
    monkeypatch.setattr(cross_attention, "PLENTY", 4)
    assert checks.verdict(checks.errors(kernel, attention.reference, MANY, torch.float32, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", launch.HALF, ids=str)
@pytest.mark.parametrize("case", [*CASES, MANY], ids=lambda c: c.name)
def test_outputs_and_gradients_on_the_gpu(case, dtype):
    assert checks.verdict(checks.errors(kernel, attention.reference, case, dtype, "cuda")) == []


@interpreter
def test_same_bits_again_and_nothing_written():
    tensors = inputs(CASES[1])
    before = {k: t.detach().clone() for k, t in tensors.items()}
    o = kernel(**tensors)
    assert torch.equal(o, kernel(**tensors))
    do = torch.randn_like(o)
    first = torch.autograd.grad(o, list(tensors.values()), do, retain_graph=True)
    second = torch.autograd.grad(o, list(tensors.values()), do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(tensors[k], before[k]) for k in before)


def test_text_keys_expanded_over_the_batch():
    """One prompt for a whole batch: the gradient of the text is the sum over the samples."""
    q = torch.randn(3, 20, 2, 40)
    text = torch.randn(1, 77, 2, 40, requires_grad=True)
    k = text.expand(3, -1, -1, -1)
    o, ref = kernel(q, k, k), attention.reference(q, k, k)
    torch.testing.assert_close(o, ref)
    grads = [torch.autograd.grad(y.sum(), text)[0] for y in (o, ref)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


@reference_path
def test_operator():
    assert checks.verdict(checks.errors(kernel, attention.reference, CASES[1], torch.float32, "cpu")) == []
    torch.library.opcheck(cross_attention.cross_attention_op, tuple(inputs(CASES[0]).values()))


def test_why_not():
    q, k = torch.randn(1, 4, 2, 40), torch.randn(1, 129, 2, 40)
    assert "129 keys" in cross_attention.why_not(q, k, k)
    assert ("on cpu" in cross_attention.why_not(q, q, q)) == (not launch.INTERPRET)
