"""DDPM: ancestral sampling from the learned reverse process (Ho et al. 2020, arXiv 2006.11239)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn

A1111 = "DDPM"


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
    variance_type: str = "fixed_small",
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
) -> Iterator[Tensor]:
    """Algorithm 2: the posterior mean of equation 7, the variance of equation 7 ("fixed_small") or beta_t
    ("fixed_large").

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction. Yields x after each step.
    """
    if variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance_type {variance_type!r}: one of fixed_small, fixed_large")
    timesteps = schedule.timesteps(steps, timestep_spacing, steps_offset)
    alphas_cumprod = schedule.alphas_cumprod.to(x.device)
    bars = alphas_cumprod[timesteps]
    canvas = Canvas(original, x, bars.sqrt(), (1 - bars).sqrt())
    x = canvas.x
    one = torch.ones((), device=x.device)
    for step in canvas.steps:
        t, previous = [*timesteps, -1][step : step + 2]
        bar, bar_prev = alphas_cumprod[t], alphas_cumprod[previous] if previous >= 0 else one
        alpha = bar / bar_prev
        denoised = schedule.denoised(denoise(x, t), x, bar)
        if clip_sample:
            denoised = denoised.clamp(-clip_sample_range, clip_sample_range)
        x = (bar_prev.sqrt() * (1 - alpha) * denoised + alpha.sqrt() * (1 - bar_prev) * x) / (1 - bar)
        if t > 0:
            variance = 1 - alpha
            if variance_type == "fixed_small":
                variance = ((1 - bar_prev) / (1 - bar) * variance).clamp(min=1e-20)
            x = x + variance.sqrt() * randn(x.shape[1:], generators).to(x.device)
        x = canvas.keep(x, step)
        yield x
