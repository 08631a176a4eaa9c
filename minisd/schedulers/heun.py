"""Heun: Euler with a second prediction at the end of each step (Karras et al. 2022, arXiv 2206.00364)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import CLIPPING, Problem
from minisd.schedulers._sigmas import SIGMAS, SigmaSchedule

DIFFUSERS = "HeunDiscreteScheduler"
A1111 = "Heun"
SETTINGS = SIGMAS | CLIPPING | {"clip_sample": False}


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithm 1: dx / dsigma = (x - x_0) / sigma by the trapezoidal rule; the step to a sigma of 0 is
    Euler's. Each other step takes two predictions."""
    schedule = SigmaSchedule(problem, problem.timesteps())
    x, steps = schedule.begin()
    for step in steps:
        sigma, after = schedule.sigmas[step : step + 2]
        slope = schedule.slope(x, sigma, schedule.timesteps[step])
        if after > 0:
            end = x + (after - sigma) * slope
            slope = (slope + schedule.slope(end, after, schedule.timesteps[step + 1])) / 2
        x = problem.keep(x + (after - sigma) * slope, step)
        yield x
