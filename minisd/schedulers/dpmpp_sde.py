"""DPM-Solver++ SDE: two predictions for each step, at its start and in its middle (arXiv 2211.01095)."""

import math
from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS, SigmaSchedule, ancestral

DIFFUSERS = "DPMSolverSDEScheduler"
A1111 = "DPM++ SDE"
SETTINGS = SIGMAS | {"eta": 1.0}


def sample(problem: Problem) -> Iterator[Tensor]:
    """The second-order single-step solver, with r = 1/2 and the ancestral noise of k-diffusion: a step to the
    middle in log sigma, then the whole step with the x_0 predicted there. Both draw their noise from one
    Brownian path over sigma. The step to a sigma of 0 ends at x_0."""
    eta = problem.settings["eta"]
    schedule = SigmaSchedule(problem, problem.timesteps())
    x, steps = schedule.begin()
    for step in steps:
        sigma, after = schedule.sigmas[step : step + 2]
        denoised = schedule.predict(x, sigma, schedule.timesteps[step])
        if after == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * after)
            first, second = problem.new_noise(), problem.new_noise()
            down, up = ancestral(sigma, middle, eta)
            halfway = denoised + down / sigma * (x - denoised) + up * first
            denoised = schedule.predict(halfway, middle, schedule.timestep(middle))
            share = (sigma - middle) / (sigma - after)
            noise = math.sqrt(share) * first + math.sqrt(1 - share) * second
            down, up = ancestral(sigma, after, eta)
            x = denoised + down / sigma * (x - denoised) + up * noise
        x = problem.keep(x, step)
        yield x
