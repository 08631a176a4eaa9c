"""Learning rates over the updates, beside those of diffusers."""

import pytest

from minisd.options import Optimizer
from minisd.training.optim import lr_factor


@pytest.mark.parametrize(
    "name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10)])
def test_learning_rates_equal_diffusers(name, warmup, total):
    import torch
    from diffusers.optimization import get_scheduler

    lr = 0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=2, power=2.0
    )
    o = Optimizer(lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=2, lr_power=2.0)
    for step in range(total):
        if name == "cosine":  # whose number of half waves is another thing under the same name there
            expected = None if step >= warmup else lr * step / warmup
        else:
            expected = optimizer.param_groups[0]["lr"]
        ours = lr * lr_factor(o, step, total, lr)
        assert expected is None or ours == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_is_half_a_wave():
    o = Optimizer(
        lr_scheduler="cosine", lr_warmup_steps=0, lr_num_cycles=2
    )  # of restarts, of which it has none
    factors = [lr_factor(o, step, 10, 1.0) for step in (0, 5, 10)]
    assert factors == pytest.approx([1, 0.5, 0])
