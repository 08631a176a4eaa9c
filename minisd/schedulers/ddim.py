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


def invert(problem: Problem, iterations: int = 1) -> Iterator[Tensor]:
    """The way back from x_0, which the problem has in the place of its noise: at each step the x from which
    `sample` with an eta of 0 comes. It is on both sides of an equation, which is solved by a fixed-point
    iteration from the x that is known. One iteration is DDIM inversion (Dhariwal and Nichol 2021, arXiv
    2105.05233, appendix F); more make it exact (Pan et al. 2023, arXiv 2309.04907)."""
    alphas_cumprod = problem.alphas_cumprod(to_one=problem.settings["set_alpha_to_one"])
    x = problem.noise
    for t in reversed(problem.timesteps().round().int().tolist()):
        previous = t - problem.schedule.num_train_timesteps // problem.steps
        alpha, alpha_prev = alphas_cumprod[t], alphas_cumprod[max(previous, -1)]
        before = x
        for _ in range(iterations):
            noise = problem.predict(before, t, alpha)[1]
            denoised = (x - (1 - alpha_prev).sqrt() * noise) / alpha_prev.sqrt()
            before = alpha.sqrt() * denoised + (1 - alpha).sqrt() * noise
        x = before
        yield x
