"""The dispatcher: what auto takes, what a forced choice refuses, the kernels behind the models' names."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minisd import ops
from tests.kernel_helpers import automatic, interpreter, ordinary  # noqa: F401

pytestmark = pytest.mark.usefixtures("automatic")


def sdpa(q, k):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2)


def every_op():
    """Each op once: name, what ops gives, plain torch, and the input that wants a gradient."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 4, 4, generator=g).requires_grad_()
    w, b, add = (torch.randn(s, generator=g) for s in ((32,), (32,), (2, 32)))
    tokens = x.flatten(2).mT  # (2, 16, 32)
    q = tokens.unflatten(-1, (1, 32))  # (2, 16, 1, 32)
    text, long = (torch.randn(2, m, 1, 32, generator=g) for m in (77, 130))
    norm = F.layer_norm(tokens * 2, (32,), w, b)
    theirs = F.silu(F.group_norm(x + add[:, :, None, None], 8, w, b, 1e-5))
    yield "group_norm", ops.group_norm(x, 8, w, b, 1e-5, silu=True, add=add), theirs, x
    yield "attention", ops.attention(q, long, long), sdpa(q, long), x
    yield "cross_attention", ops.attention(q, text, text), sdpa(q, text), x
    yield "layer_norm", ops.layer_norm(tokens * 2, w, b, 1e-5), norm, x
    yield "add_layer_norm", ops.add_layer_norm(tokens, tokens, w, b, 1e-5)[0], norm, x
    yield "geglu", ops.geglu(tokens), tokens[..., :16] * F.gelu(tokens[..., 16:]), x


def compare():
    for _, ours, theirs, x in every_op():
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*grads, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_on_a_cpu_torch_computes(choice):
    ops.choose(choice)
    compare()


@interpreter
def test_forced_kernels_agree_with_torch():
    ops.choose("triton")
    compare()


@interpreter
def test_autocast():
    """Attention runs in the low type, as torch's own does; gradients return in the input's."""
    ops.choose("triton")
    q = torch.randn(1, 9, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        o = ops.attention(q, q, q)
    assert o.dtype == torch.float16
    assert torch.autograd.grad(o.float().sum(), q)[0].dtype == torch.float32


@interpreter
def test_autocast_product_beside_a_full_sum():
    """The fused add takes both, as torch's own add does."""
    x, residual = torch.randn(3, 32).half().requires_grad_(), torch.randn(3, 32, requires_grad=True)
    found = {}
    for choice in ("triton", "torch"):
        ops.choose(choice)
        y, total = ops.add_layer_norm(x, residual, torch.ones(32), torch.zeros(32), 1e-5)
        grads = torch.autograd.grad((y * residual.detach()).sum() + total.square().sum(), (x, residual))
        found[choice] = y, total, *grads
    torch.testing.assert_close(found["triton"], found["torch"])


@ordinary
def test_a_forced_choice_that_cannot_run_says_why():
    pytest.importorskip("triton")
    ops.choose("triton")
    with pytest.raises(ValueError, match="--kernels triton: group norm cannot run: the tensors are on cpu"):
        ops.group_norm(torch.randn(1, 8, 2, 2), 2, torch.ones(8), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="choose from auto, triton, torch"):
        ops.choose("cuda")


@ordinary
def test_auto_says_once_what_it_chose(capsys):
    ops.choose("auto")
    for _ in range(2):
        list(every_op())
    assert capsys.readouterr().err == "kernels: torch, the tensors are on cpu\n"


@ordinary
def test_without_triton():
    """Where triton cannot be imported everything works, a CPU run does not import the kernels, and asking for
    them is an error with the reason."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from minisd import ops
        ops.geglu(torch.randn(2, 8))
        assert "minisd.kernels" not in sys.modules
        try:
            ops.choose("triton")
        except ValueError as error:
            assert "triton cannot be imported" in str(error), error
        else:
            raise SystemExit("no error")
    """
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
