import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import attention, checks, heads, launch  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
reference_path = pytest.mark.skipif(
    launch.INTERPRET, reason="the reference is what runs without an interpreter"
)
ac = checks.attention_case

CASES = [
    ac("40 = 32 + 16, two heads", 1, 64, 128, 2, 40),
    ac("80 = 64 + 16, ragged, batch 3", 3, 33, 70, 1, 80),
    ac("160 = 128 + 32", 1, 64, 64, 1, 160),
    ac("64, one tile", 1, 128, 64, 1, 64),
    ac("32", 1, 64, 100, 2, 32),
    ac("8, padded to 16", 1, 70, 9, 2, 8),
    ac("96 = 64 + 32", 1, 20, 77, 1, 96),
    ac("128", 1, 64, 33, 1, 128),
    ac("one query, one key", 2, 1, 1, 3, 40),
    ac("one query row", 1, 1, 130, 2, 40),
    ac("peaked logits", 1, 64, 128, 1, 40, scale=30.0),
    ac("all logits equal", 1, 64, 100, 1, 40, equal=True),
    ac("all logits far below zero", 1, 70, 77, 1, 40, apart=5.0),
    ac("much larger keys late", 1, 64, 192, 1, 40, late=300.0),
]


kernel = attention.attention


def inputs(case, dtype=torch.float32, device="cpu"):
    return checks.place(case.make(torch.Generator().manual_seed(0))[0], dtype, device)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case, dtype):
    if dtype == torch.float16 and "late" in case.name:
        pytest.skip("scores beyond what fp16 holds in torch itself")
    assert checks.verdict(checks.errors(kernel, attention.reference, case, dtype, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", launch.HALF, ids=str)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda c: c.name)
def test_outputs_and_gradients_on_the_gpu(case, dtype):
    assert checks.verdict(checks.errors(kernel, attention.reference, case, dtype, "cuda")) == []


@interpreter
@pytest.mark.parametrize("case", [CASES[0], CASES[1], *CASES[-3:]], ids=lambda c: c.name)
def test_anchored_softmax(case, monkeypatch):
    """The bf16 variant, in fp32; `much larger keys late` overflows, and the rows are computed again."""
    tile = launch.T(64, 64, 4, ANCHOR=True)
    monkeypatch.setitem(launch.TILES, "attention_fwd", {40: {80: tile}, 80: {80: tile}})
    assert checks.verdict(checks.errors(kernel, attention.reference, case, torch.float32, "cpu")) == []


@interpreter
def test_log_sum_exp():
    q, k, v = inputs(CASES[1]).values()
    lse = attention.attention_op(q, k, v)[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1) * heads.LOG2E, atol=1e-5, rtol=1e-5)


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


def test_slices_of_a_fused_product_and_expanded_gradient():
    """q, k and v as slices of one tensor, a gradient that is a broadcast number, heads that lie apart."""
    qkv = torch.randn(2, 20, 3 * 2 * 40, requires_grad=True)
    q, k, v = (t.unflatten(-1, (2, 40)) for t in qkv.chunk(3, dim=-1))
    o, ref = kernel(q, k, v), attention.reference(q, k, v)
    torch.testing.assert_close(o, ref)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), qkv), torch.autograd.grad(ref.sum(), qkv))
    apart = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(kernel(*apart), ref.detach())


def test_one_input_as_queries_keys_and_values():
    x = torch.randn(1, 17, 2, 40, requires_grad=True)
    o, ref = kernel(x, x, x), attention.reference(x, x, x)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (o, ref)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


@reference_path
@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
def test_operator(case):
    assert checks.verdict(checks.errors(kernel, attention.reference, case, torch.float32, "cpu")) == []
    torch.library.opcheck(attention.attention_op, tuple(inputs(case).values()))


@reference_path
def test_compiles_without_a_break():
    tensors = list(inputs(CASES[0]).values())

    def step(q, k, v):
        return kernel(q * 2, k, v).square()

    y, compiled = step(*tensors), torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(y, compiled)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), tensors) for out in (y, compiled)))


def test_head_widths():
    """Two tiles only where they are shorter than one, and never fewer columns than the head has."""
    for hd in range(8, 161, 8):
        tiles = heads.split(hd)
        assert hd <= tiles["D0"] + tiles["D1"] <= launch.power_of_two(hd, 16)
        assert all(d == 0 or (d >= 16 and d & (d - 1) == 0) for d in (tiles["D0"], tiles["D1"]))
    assert [heads.split(hd)["D1"] for hd in (40, 64, 80, 160)] == [16, 0, 16, 32]


def test_why_not():
    q = torch.randn(1, 4, 2, 36, dtype=torch.float16)
    assert "head width 36" in attention.why_not(q, q, q)
    q = torch.randn(1, 4, 2, 512, dtype=torch.float16)
    assert "head width 512" in attention.why_not(q, q, q)
    q = torch.randn(1, 4, 2, 40, dtype=torch.bfloat16)
    assert ("interpreter" if launch.INTERPRET else "on cpu") in attention.why_not(q, q, q)
