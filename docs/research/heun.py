"""Heun: Euler with a second prediction at the end of each step (Karras et al. 2022, arXiv 2206.00364).

    python sample.py --scheduler docs/research/heun.py --steps 15 --prompt "3d emoji of a red apple"

SETTINGS are the keys of scheduler_config.json that it reads, with their defaults; A1111 is its name there.
"""

from collections.abc import Iterator

from torch import Tensor

from minisd import SIGMAS, Problem, SigmaSchedule

A1111 = "Heun"
SETTINGS = SIGMAS


def sample(problem: Problem) -> Iterator[Tensor]:
    """dx / dsigma = (x - x_0) / sigma by the trapezoidal rule; the step to sigma = 0 is Euler's."""
    schedule = SigmaSchedule(problem, problem.timesteps())
    x, steps = schedule.begin()
    for step in steps:
        sigma, after = schedule.sigmas[step : step + 2]
        slope = (x - schedule.predict(x, sigma, schedule.timesteps[step])) / sigma
        if after > 0:
            end = x + (after - sigma) * slope
            denoised = schedule.predict(end, after, schedule.timesteps[step + 1])
            slope = (slope + (end - denoised) / after) / 2
        x = problem.keep(x + (after - sigma) * slope, step)
        yield x
