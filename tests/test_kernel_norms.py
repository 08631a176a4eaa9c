"""What GroupNorm, LayerNorm and GEGLU have of their own."""

import pytest
import torch

from tests.helpers import mostly_slow
from tests.kernel_helpers import faults, interpreter, needs_gpu

pytest.importorskip("triton")
from minisd.kernels import geglu, group_norm, launch, layer_norm  # noqa: E402

kernel, gn = group_norm.KERNEL, group_norm.case
MANY_TURNS = layer_norm.case("five turns", 37, 512, residual=False)  # of two programs, four rows a turn

# The path of large images, which would make them slow here, at any size
SPLIT = [
    gn("ragged rows and channels", 1, 48, 9, 15, 3),
    gn("10 channels a group", 1, 80, 9, 8, 8, eps=1e-6, silu=False, add=False),
    gn("several tiles a split", 1, 1280, 11, 13, 1),
    gn("contiguous", 1, 20, 25, 23, 4, layout=torch.contiguous_format),
    gn("batch 2, one group", 2, 32, 9, 8, 1),
    gn("mean 100 deviations", 1, 64, 12, 13, 4, shift=50.0),
]


@pytest.fixture
def split(monkeypatch):
    monkeypatch.setattr(group_norm, "MAX_GROUP_ELEMENTS", dict(forward=0, backward=0))


@interpreter
@pytest.mark.parametrize("case", mostly_slow(SPLIT, *SPLIT[:2]), ids=lambda c: c.name)
def test_split_images(case, split):
    for dtype in (torch.float32, torch.float16) if case in SPLIT[1:4:2] else (torch.float32,):
        assert faults(kernel, case, dtype, "cpu") == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", launch.FLOAT, ids=str)
@pytest.mark.parametrize("case", SPLIT, ids=lambda c: c.name)
def test_split_images_on_the_gpu(case, dtype, split):
    assert faults(kernel, case, dtype, "cuda") == []


@interpreter
def test_split_images_have_the_same_bits_again(split):
    tensors, constants = SPLIT[0].inputs()
    ys = [kernel(*tensors.values(), *constants.values()) for _ in range(2)]
    assert torch.equal(*ys)
    dy = torch.randn_like(ys[0])
    first, second = (torch.autograd.grad(y, list(tensors.values()), dy) for y in ys)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreter
@pytest.mark.parametrize("case", [kernel.cases[0], kernel.cases[3]], ids=lambda c: c.name)
def test_output_in_the_layout_of_the_input(case):
    tensors, constants = case.inputs()
    y = kernel(*tensors.values(), *constants.values())
    assert launch.layout(y) == launch.layout(tensors["x"])


@interpreter
def test_input_with_gaps_and_double_use():
    """A slice is made dense; an input that is used twice gets the sum of both gradients."""
    x = torch.randn(2, 32, 6, 9, requires_grad=True)
    rest = torch.randn(32), torch.randn(32), None, 8, 1e-5, True
    y, ref = (f(x[:, :, :, 1:8], *rest) + f(x[:, :, :, :7], *rest) for f in (kernel, group_norm.reference))
    torch.testing.assert_close(y, ref)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(ref.sum(), x))


@interpreter
def test_geglu_twice():
    """The backward never writes over x: a second use gives the same gradient again."""
    x = torch.randn(3, 40, requires_grad=True)
    once = torch.autograd.grad(geglu.KERNEL(x).sum(), x)[0]
    twice = torch.autograd.grad(geglu.KERNEL(x).sum() + geglu.KERNEL(x).sum(), x)[0]
    torch.testing.assert_close(twice, 2 * once)


@interpreter
@pytest.mark.parametrize("used", [0, 1], ids=["only the norm", "only the sum"])
def test_one_output_of_layer_norm_used(used):
    tensors, constants = layer_norm.KERNEL.cases[0].inputs()
    arguments = (*tensors.values(), *constants.values())
    ours, theirs = (f(*arguments)[used].sum() for f in (layer_norm.KERNEL, layer_norm.reference))
    grads = [torch.autograd.grad(y, arguments[: 2 if used else 4]) for y in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@interpreter
def test_weights_of_another_type():
    """As in mixed-precision training: the weights' gradients come in their own type."""
    tensors, constants = kernel.cases[0].inputs()
    x, add = (tensors[name].detach().half().requires_grad_() for name in ("x", "add"))
    arguments = (x, tensors["weight"], tensors["bias"], add)
    ours, theirs = (f(*arguments, *constants.values()) for f in (kernel, group_norm.reference))
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    ours, theirs = (torch.autograd.grad(y.float().sum(), arguments) for y in (ours, theirs))
    assert [g.dtype for g in ours] == [torch.float16, torch.float32, torch.float32, torch.float16]
    torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


def test_why_not():
    x, w = torch.randn(1, 30, 4, 4), torch.ones(30)
    assert "divide" in kernel.why_not(x, w, w, None, 4, 1e-5, True)
    assert "add has shape" in kernel.why_not(x, w, w, torch.ones(1, 29), 3, 1e-5, True)
    assert "divide" in geglu.KERNEL.why_not(torch.randn(3, 5))
    x, w = torch.randn(2, 9000), torch.ones(9000)
    assert "9000" in layer_norm.KERNEL.why_not(x, None, w, w, 1e-5)
    assert "differ" in layer_norm.KERNEL.why_not(x[:, :8], x[:1, :8], w[:8], w[:8], 1e-5)


@interpreter
@pytest.mark.parametrize(
    "case",
    [*(c for c in layer_norm.KERNEL.cases if c.name != "more rows than programs"), MANY_TURNS],
    ids=lambda c: c.name,
)
def test_programs_of_layer_norm_s_backward_that_take_several_turns(case, monkeypatch):
    monkeypatch.setattr(layer_norm, "PROGRAMS", 2)
    assert faults(layer_norm.KERNEL, case, torch.float32, "cpu") == []
