"""Euler: steps along the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn
from minisd.schedulers._sigmas import Levels, ancestral, predict

A1111 = "Euler"


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    eta: float = 0.0,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
) -> Iterator[Tensor]:
    """dx / dsigma = (x - x_0) / sigma, where x = x_0 + sigma noise; `eta` of the noise of each step is new.

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction for x / sqrt(sigma^2 + 1). Yields
    x after each step.
    """
    timesteps = schedule.spaced(steps, timestep_spacing, steps_offset)
    levels = Levels(schedule, timesteps, use_karras_sigmas, final_sigmas_type)
    canvas = Canvas(original, x, [1.0] * steps, levels.sigmas[:-1], levels.scale(timestep_spacing))
    x = canvas.x
    for step in canvas.steps:
        sigma, after = levels.sigmas[step : step + 2]
        denoised = predict(denoise, schedule, x, sigma, levels.timesteps[step])
        down, up = ancestral(sigma, after, eta)
        x = denoised + down / sigma * (x - denoised)
        if up > 0:
            x = x + up * randn(x.shape[1:], generators).to(x.device)
        x = canvas.keep(x, step)
        yield x
