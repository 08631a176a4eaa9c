"""DDPM: ancestral sampling from the learned reverse process (Ho et al. 2020, arXiv 2006.11239)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import CLIPPING, TIMESTEPS, Problem

DIFFUSERS = "DDPMScheduler"
A1111 = "DDPM"
SETTINGS = TIMESTEPS | CLIPPING | {"variance_type": "fixed_small"}


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithm 2: the posterior mean of equation 7, and as variance that of equation 7 ("fixed_small") or
    beta_t ("fixed_large")."""
    timesteps = problem.timesteps().round().int().tolist()
    alphas_cumprod = problem.alphas_cumprod()
    bars = alphas_cumprod[timesteps]
    x, steps = problem.begin(bars.sqrt(), (1 - bars).sqrt())
    for step in steps:
        t, previous = [*timesteps, -1][step : step + 2]
        bar, bar_prev = alphas_cumprod[t], alphas_cumprod[previous]
        alpha = bar / bar_prev
        denoised, _ = problem.predict(x, t, bar)
        x = (bar_prev.sqrt() * (1 - alpha) * denoised + alpha.sqrt() * (1 - bar_prev) * x) / (1 - bar)
        if t > 0:
            variance = 1 - alpha
            if problem.settings["variance_type"] == "fixed_small":
                variance = ((1 - bar_prev) / (1 - bar) * variance).clamp(min=1e-20)
            x = x + variance.sqrt() * problem.new_noise()
        x = problem.keep(x, step)
        yield x
