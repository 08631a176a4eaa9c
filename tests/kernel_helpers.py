"""What the tests of the kernels share: where they can run, and a tiny UNet."""

import os

import pytest
import torch

from minisd import ops
from minisd.models import unet

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"

interpreter = pytest.mark.skipif(not INTERPRET, reason="test_kernels.py runs it in the interpreter")
ordinary = pytest.mark.skipif(INTERPRET, reason="the ordinary session runs it")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.fixture
def automatic():
    """Leave the choice of kernels as it was found."""
    yield
    ops.choose("auto")


def faults(kernel, case, dtype=torch.float32, device="cpu") -> list[str]:
    """A line for every output and gradient that is wrong."""
    from minisd.kernels import trial

    found = trial.by_name(kernel, case, dtype, device)
    return ["{}: {:.2e}, torch {:.2e}".format(name, *found[name]) for name in trial.wrong(found)]


TINY = unet.UNetConfig(
    in_channels=4, out_channels=4, block_out_channels=(32, 64), attention=(True, False), num_heads=(1, 2),
    layers_per_block=1, cross_attention_dim=24, norm_num_groups=2, norm_eps=1e-5, sample_size=4,
)  # fmt: skip


def graph(run, x):
    """run(x) as a CUDA graph: a function that copies its argument in and replays. On a CPU, run itself."""
    if not GPU:
        return run
    static = x.clone()
    run(static)  # compiles what is not compiled yet
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run(static)

    def replay(x):
        static.copy_(x)
        captured.replay()
        return out.clone()

    return replay
