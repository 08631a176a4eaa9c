"""DPM-Solver++ SDE: two predictions for each step, at its start and in its middle (arXiv 2211.01095)."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn
from minisd.schedulers._sigmas import Levels, ancestral, predict

A1111 = "DPM++ SDE"


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    eta: float = 1.0,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
) -> Iterator[Tensor]:
    """The single-step solver of second order, with r = 1/2 and the ancestral noise of k-diffusion: a step to
    the middle in log sigma, and the whole step with x_0 from there. The noise of both is one Brownian path
    over sigma. The step to 0 ends at x_0.

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction for x / sqrt(sigma^2 + 1). Yields
    x after each step.
    """
    timesteps = schedule.spaced(steps, timestep_spacing, steps_offset)
    levels = Levels(schedule, timesteps, use_karras_sigmas, "zero")
    canvas = Canvas(original, x, [1.0] * steps, levels.sigmas[:-1], levels.scale(timestep_spacing))
    x = canvas.x
    for step in canvas.steps:
        sigma, after = levels.sigmas[step : step + 2]
        denoised = predict(denoise, schedule, x, sigma, levels.timesteps[step])
        if after == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * after)
            first, second = (randn(x.shape[1:], generators).to(x.device) for _ in range(2))
            down, up = ancestral(sigma, middle, eta)
            halfway = denoised + down / sigma * (x - denoised) + up * first
            denoised = predict(denoise, schedule, halfway, middle, levels.timestep(middle))
            share = (sigma - middle) / (sigma - after)
            noise = math.sqrt(share) * first + math.sqrt(1 - share) * second
            down, up = ancestral(sigma, after, eta)
            x = denoised + down / sigma * (x - denoised) + up * noise
        x = canvas.keep(x, step)
        yield x
