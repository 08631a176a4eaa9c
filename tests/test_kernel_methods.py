"""The kernels in training: gradients of whole methods, as `auto` computes them where kernels are faster."""

from dataclasses import replace

import pytest
import torch

from minisd import ops, testing
from tests.kernel_helpers import automatic, interpreter  # noqa: F401

pytest.importorskip("triton")
from tests.test_kernel_trial import gpu  # noqa: E402
from tests.test_kernel_unet import relative  # noqa: E402
from tests.test_methods import NEEDS  # noqa: E402

pytestmark = [interpreter, pytest.mark.slow, pytest.mark.usefixtures("automatic")]
KERNELS = {"cross_attention", "geglu", "group_norm", "layer_norm"}  # few tokens: all attention is of few keys


@pytest.mark.parametrize("method", ["textual_inversion", "lora", "text_to_image", "controlnet"])
def test_gradients_under_checkpointing_and_autocast(method, short_run, monkeypatch):
    """In fp16 they err at most twice as much as torch's, on average over the parameters, beside fp32."""
    new, flags = testing.new, [*NEEDS.get(method, []), "--gradient_checkpointing", "--resolution", 16]
    o = short_run(method, *flags)

    def gradients(kernels: str, dtype: torch.dtype) -> list[torch.Tensor]:
        def of_dtype(*arguments):
            made = new(*arguments)
            made.dtype = dtype  # --mixed_precision fp16, which a CPU's run leaves out
            return made

        monkeypatch.setattr(testing, "new", of_dtype)
        torch.manual_seed(0)  # as the loop does; LoRA draws from it
        m, trained, batch = testing.built(method, replace(o, kernels=kernels), count=1)
        for p in trained.values():  # what begins as zeros would hide what is behind it
            p.data += 0.02 * torch.randn_like(p)
        loss = m.loss(batch)
        (1024 * loss).backward()  # as the scaler does, so that fp16 holds small ones
        return [loss.detach(), *[p.grad for p in trained.values()]]

    exact = [value.double() for value in gradients("torch", torch.float32)]
    theirs = gradients("torch", torch.float16)
    tried = gpu(monkeypatch, 0.5)
    ours = gradients("auto", torch.float16)
    used = {name for name in ops.verdicts().values() if name != "torch"}
    assert KERNELS <= used and {key.split()[0] for key in tried} >= KERNELS
    assert any("training" in key for key in tried)
    size = [value.square().mean().sqrt() for value in exact[1:]]
    kept = [i for i, s in enumerate(size, 1) if s > 1e-5 * max(size)]  # a bias of keys has none in theory
    assert len(kept) >= 0.9 * len(size)
    errors = [[relative(found[i], exact[i]) for i in (0, *kept)] for found in (ours, theirs)]
    for ours, theirs in ([e[0] for e in errors], [sum(e[1:]) / len(e[1:]) for e in errors]):
        assert ours <= 2 * theirs + 1e-6 and theirs < 0.1, errors
