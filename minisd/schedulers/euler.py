"""Euler's method on the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS, SigmaSchedule, ancestral

DIFFUSERS = "EulerDiscreteScheduler"
A1111 = "Euler"
SETTINGS = SIGMAS | {"eta": 0.0, "final_sigmas_type": "zero"}


def sample(problem: Problem) -> Iterator[Tensor]:
    """dx / dsigma = (x - x_0) / sigma, where x = x_0 + sigma noise; `eta` is the share of new noise."""
    schedule = SigmaSchedule(problem, problem.timesteps(), final=problem.settings["final_sigmas_type"])
    x, steps = schedule.begin()
    for step in steps:
        sigma, after = schedule.sigmas[step : step + 2]
        denoised = schedule.predict(x, sigma, schedule.timesteps[step])
        down, up = ancestral(sigma, after, problem.settings["eta"])
        x = denoised + down / sigma * (x - denoised)
        if up > 0:
            x = x + up * problem.new_noise()
        x = problem.keep(x, step)
        yield x
