from dataclasses import replace

import pytest
import torch

from tests.kernel_helpers import INTERPRET, faults, interpreter

pytest.importorskip("triton")
from minisd.kernels import attention, cross_attention, heads, launch  # noqa: E402

kernel, cross = attention.KERNEL, cross_attention.KERNEL


def late(randn):
    """Keys that are much larger after the first hundred, beyond what fp16 holds."""
    k = randn(1, 192, 1, 40)
    k[:, 100:] *= 300
    return dict(q=randn(1, 64, 1, 40), k=k, v=randn(1, 192, 1, 40)), {}


LATE = replace(kernel.cases[0], name="much larger keys late", make=late)


@interpreter
def test_much_larger_keys_late():
    assert faults(kernel, LATE) == []


@interpreter
@pytest.mark.parametrize("case", [*kernel.cases[:2], *kernel.cases[-2:], LATE], ids=lambda c: c.name)
def test_anchored_softmax(case):
    """The bf16 variant, in fp32; `much larger keys late` overflows, and the rows are computed again."""
    (anchored,) = kernel.variants
    assert anchored.dtypes == (torch.bfloat16,) and faults(anchored, case) == []


@interpreter
def test_many_tiles_of_cross_attention(monkeypatch):
    """Several tiles of queries in each program."""
    monkeypatch.setattr(cross_attention, "BUSY_PROGRAMS", 4)
    assert faults(cross, cross.cases[-1]) == []


@interpreter
def test_log_sum_exp():
    q, k, v = kernel.cases[1].inputs()[0].values()
    lse = kernel.forward(q, k, v)[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1) * heads.LOG2E, atol=1e-5, rtol=1e-5)


@interpreter
def test_slices_of_a_fused_product_and_expanded_gradient():
    """q, k and v as slices of one tensor, a gradient that is a broadcast number, heads that lie apart."""
    qkv = torch.randn(2, 20, 3 * 2 * 40, requires_grad=True)
    q, k, v = (t.unflatten(-1, (2, 40)) for t in qkv.chunk(3, dim=-1))
    o, ref = kernel(q, k, v), attention.reference(q, k, v)
    torch.testing.assert_close(o, ref)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), qkv), torch.autograd.grad(ref.sum(), qkv))
    apart = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(kernel(*apart), ref.detach())


@interpreter
def test_one_input_as_queries_keys_and_values():
    x = torch.randn(1, 17, 2, 40, requires_grad=True)
    o, ref = kernel(x, x, x), attention.reference(x, x, x)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (o, ref)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


@interpreter
def test_text_keys_expanded_over_the_batch():
    """One prompt for a whole batch: the gradient of the text is the sum over the samples."""
    q = torch.randn(3, 20, 2, 40)
    text = torch.randn(1, 77, 2, 40, requires_grad=True)
    k = text.expand(3, -1, -1, -1)
    o, ref = cross(q, k, k), attention.reference(q, k, k)
    torch.testing.assert_close(o, ref)
    grads = [torch.autograd.grad(y.sum(), text)[0] for y in (o, ref)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


def test_head_widths():
    """Two tiles only where they are shorter than one, and never fewer columns than the head has."""
    for hd in range(8, 161, 8):
        tiles = heads.two_tiles(hd)
        assert hd <= sum(tiles) <= launch.power_of_two(hd, 16)
        assert all(d == 0 or (d >= 16 and d & (d - 1) == 0) for d in tiles)
    assert [heads.two_tiles(hd)[1] for hd in (40, 64, 80, 160)] == [16, 0, 16, 32]


def test_why_not():
    q = torch.randn(1, 4, 2, 36, dtype=torch.float16)
    assert "head width 36" in kernel.why_not(q, q, q)
    q = torch.randn(1, 4, 2, 512, dtype=torch.float16)
    assert "head width 512" in kernel.why_not(q, q, q)
    q = torch.randn(1, 4, 2, 40, dtype=torch.bfloat16)
    assert ("interpreter" if INTERPRET else "on cpu") in kernel.why_not(q, q, q)
    q, k = torch.randn(1, 4, 2, 40), torch.randn(1, 129, 2, 40)
    assert "129 keys" in cross.why_not(q, k, k)
