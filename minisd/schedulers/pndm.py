"""PNDM: DDIM steps with a multistep prediction, PLMS (Liu et al. 2022, arXiv 2202.09778)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original

A1111 = "PLMS"

# Of the newest predictions, newest first (Adams and Bashforth).
WEIGHTS = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
) -> Iterator[Tensor]:
    """Without Runge-Kutta steps to begin with: the first step is taken twice, the second time with the mean
    of the predictions at both its ends. That is one prediction more than there are steps.

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction. Yields x after each step.
    """
    timesteps = schedule.timesteps(steps, timestep_spacing, steps_offset)
    timesteps = timesteps[:2] + timesteps[1:]
    jump = schedule.num_train_timesteps // steps
    alphas_cumprod = schedule.alphas_cumprod.to(x.device)
    final = torch.ones((), device=x.device) if set_alpha_to_one else alphas_cumprod[0]
    bars = alphas_cumprod[timesteps]
    canvas = Canvas(original, x, bars.sqrt(), (1 - bars).sqrt())
    x, start, preds = canvas.x, canvas.x, []
    for step in canvas.steps:
        t = timesteps[step]
        pred, after = denoise(x, t), t - jump
        if step == canvas.steps.start + 1:
            pred, x, t, after = (pred + preds[0]) / 2, start, t + jump, t
        else:
            preds = [pred, *preds[:3]]
            pred = sum(weight * p for weight, p in zip(WEIGHTS[len(preds) - 1], preds, strict=True))
        alpha, alpha_after = alphas_cumprod[t], alphas_cumprod[after] if after >= 0 else final
        denoised = schedule.denoised(pred, x, alpha)
        noise = schedule.noise_in(denoised, pred, x, alpha)
        x = alpha_after.sqrt() * denoised + (1 - alpha_after).sqrt() * noise
        x = canvas.keep(x, step)
        if step > canvas.steps.start or len(canvas.steps) == 1:  # the first attempt is not a step
            yield x
