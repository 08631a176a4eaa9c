"""The kernels in whole networks: SD v1.5 in half precision on a GPU, a tiny UNet in fp32 in the interpreter.

The same tests, so that the second has proven the first by the time there is a GPU.
"""

import pytest
import torch

from minisd import ops
from minisd.models import unet
from minisd.models.layers import to_channels_last
from tests.kernel_helpers import DEVICE, GPU, INTERPRET, TINY, automatic, graph  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or INTERPRET), reason="needs a CUDA device or Triton's interpreter"),
    pytest.mark.usefixtures("automatic"),
]
CONFIG, SIDE, SIZE, STEPS = (unet.SD15, 32, 2, 200) if GPU else (TINY, 2, 1, 2)


def network(config, dtype=torch.float32) -> unet.UNet:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return to_channels_last(unet.UNet(config).to(dtype))


def batch(config, seed: int, dtype=torch.float32, size: int = 1, side: int = 2) -> tuple:
    """Latents, timesteps and a context of 77 tokens, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, side, side + 2, generator=g)  # not square
    context = torch.randn(size, 77, config.cross_attention_dim, generator=g)
    timesteps = torch.randint(1000, (size,), generator=g)
    return x.to(DEVICE, dtype), timesteps.to(DEVICE), context.to(DEVICE, dtype)


def gradients(net: torch.nn.Module, x, timesteps, context) -> list[torch.Tensor]:
    """The prediction, and the gradients of the input and of every parameter."""
    x.requires_grad_()
    pred = net(x, timesteps, context)
    wanted = [x, *net.parameters()]
    return [pred.detach(), *torch.autograd.grad(100 * pred.double().square().mean(), wanted)]


def relative(value, exact) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float32], ids=str)
def test_a_whole_unet_errs_at_most_twice_as_much_as_torch(dtype):
    """Against float64, in the prediction and, on average over the parameters, in the gradients."""

    def found(choice, dtype):
        ops.choose(choice)
        values = gradients(network(CONFIG, dtype), *batch(CONFIG, 0, dtype, side=SIDE))
        return [v.cpu() for v in values]

    exact = [v.double() for v in found("torch", torch.float64)]
    errors = {}
    for choice in ("triton", "torch"):
        off = [relative(a, b) for a, b in zip(found(choice, dtype), exact, strict=True)]
        errors[choice] = off[0], sum(off[1:]) / len(off[1:])
    for ours, theirs in zip(errors["triton"], errors["torch"], strict=True):
        assert ours <= 2 * theirs + 1e-6, errors


def losses(choice: str, rounding: int = 0) -> torch.Tensor:
    """The loss of each step of a short training; `rounding` is a seed for weights off by half a bfloat16."""
    ops.choose(choice)
    net = network(CONFIG)
    g = torch.Generator(DEVICE).manual_seed(rounding)
    with torch.no_grad():
        for p in net.parameters() if rounding else ():
            p.mul_(1 + 2**-9 * (2 * torch.rand(p.shape, generator=g, device=DEVICE) - 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    found = []
    for step in range(STEPS):
        noise, timesteps, context = batch(CONFIG, 1 + step, size=SIZE, side=SIDE)
        angle = (timesteps / 1000 * torch.pi / 2)[:, None, None, None]
        latents = batch(CONFIG, 1000 + step % 8, size=SIZE, side=SIDE)[0]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            pred = net(angle.cos() * latents + angle.sin() * noise, timesteps, context)
        loss = (pred.float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).cpu()


@pytest.mark.slow
def test_training_goes_the_same_way():
    """With and without kernels the losses differ no more than those of two seeds of rounding."""
    theirs, ours = losses("torch"), losses("triton")
    rounding = max((losses("torch", seed) - theirs).abs().mean() for seed in (1, 2))
    assert (ours - theirs).abs().mean() <= 2 * rounding


@pytest.mark.slow
def test_a_whole_unet_compiles_without_a_break():
    """Forward and backward."""
    ops.choose("triton")
    dtype, tolerance = (torch.bfloat16, 3e-2) if GPU else (torch.float32, 1e-4)
    net = network(TINY, dtype)
    compiled = torch.compile(net, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    inputs = batch(TINY, 0, dtype)
    for ours, theirs in zip(gradients(compiled, *inputs), gradients(net, *inputs), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_unet_in_a_cuda_graph():
    """Replayed with other latents it gives the same bits as without a graph."""
    ops.choose("triton")
    dtype = torch.float16 if GPU else torch.float32
    net = network(TINY, dtype).requires_grad_(False)
    x, timesteps, context = batch(TINY, 0, dtype)
    replay = graph(lambda x: net(x, timesteps, context), x)
    other = batch(TINY, 1, dtype)[0]
    ours = replay(other)
    assert torch.equal(ours, net(other, timesteps, context)) and not torch.equal(ours, replay(x))
