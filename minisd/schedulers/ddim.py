"""DDIM: deterministic sampling in few steps (Song et al. 2020, arXiv 2010.02502)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn

A1111 = "DDIM"


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    eta: float = 0.0,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
) -> Iterator[Tensor]:
    """Equation 12, with sigma of equation 16 times `eta`: 0 is DDIM, 1 is DDPM's noise.

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction. Yields x after each step.
    """
    timesteps = schedule.timesteps(steps, timestep_spacing, steps_offset)
    alphas_cumprod = schedule.alphas_cumprod.to(x.device)
    bars = alphas_cumprod[timesteps]
    canvas = Canvas(original, x, bars.sqrt(), (1 - bars).sqrt())
    x = canvas.x
    final = torch.ones((), device=x.device) if set_alpha_to_one else alphas_cumprod[0]
    for step in canvas.steps:
        t = timesteps[step]
        previous = t - schedule.num_train_timesteps // steps
        alpha, alpha_prev = alphas_cumprod[t], alphas_cumprod[previous] if previous >= 0 else final
        pred = denoise(x, t)
        denoised = schedule.denoised(pred, x, alpha)
        noise = schedule.noise_in(denoised, pred, x, alpha)
        if clip_sample:
            denoised = denoised.clamp(-clip_sample_range, clip_sample_range)
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        x = alpha_prev.sqrt() * denoised + (1 - alpha_prev - sigma**2).sqrt() * noise
        if eta > 0:
            x = x + sigma * randn(x.shape[1:], generators).to(x.device)
        x = canvas.keep(x, step)
        yield x
