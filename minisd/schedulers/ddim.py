"""DDIM: deterministic sampling in few steps (Song et al. 2020, arXiv 2010.02502)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import CLIPPING, TIMESTEPS, Problem

DIFFUSERS = "DDIMScheduler"
A1111 = "DDIM"
SETTINGS = TIMESTEPS | CLIPPING | {"eta": 0.0, "set_alpha_to_one": True}


def sample(problem: Problem) -> Iterator[Tensor]:
    """Equation 12, with the sigma of equation 16 times `eta`: 0 is DDIM, 1 adds as much noise as DDPM."""
    eta = problem.settings["eta"]
    timesteps = problem.timesteps().round().int().tolist()
    alphas_cumprod = problem.alphas_cumprod(to_one=problem.settings["set_alpha_to_one"])
    bars = alphas_cumprod[timesteps]
    x, steps = problem.begin(bars.sqrt(), (1 - bars).sqrt())
    for step in steps:
        t = timesteps[step]
        previous = t - problem.schedule.num_train_timesteps // problem.steps
        alpha, alpha_prev = alphas_cumprod[t], alphas_cumprod[max(previous, -1)]
        denoised, noise = problem.predict(x, t, alpha)
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        x = alpha_prev.sqrt() * denoised + (1 - alpha_prev - sigma**2).sqrt() * noise
        if eta > 0:
            x = x + sigma * problem.new_noise()
        x = problem.keep(x, step)
        yield x
