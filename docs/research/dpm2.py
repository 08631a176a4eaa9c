"""DPM2: Euler with a second prediction in the middle of each step (Karras et al. 2022, arXiv 2206.00364).

    python sample.py --scheduler docs/research/dpm2.py --steps 15 --prompt "3d emoji of a red apple"

SETTINGS are the keys of scheduler_config.json that it reads, with their defaults; A1111 is its name there.
"""

import math
from collections.abc import Iterator

from torch import Tensor

from minisd import SIGMAS, Problem, SigmaSchedule

A1111 = "DPM2"
SETTINGS = SIGMAS


def sample(problem: Problem) -> Iterator[Tensor]:
    """dx / dsigma = (x - x_0) / sigma by the midpoint rule, with the middle in log sigma; the step to
    sigma = 0 is Euler's."""
    schedule = SigmaSchedule(problem, problem.timesteps())
    x, steps = schedule.begin()
    for step in steps:
        sigma, after = schedule.sigmas[step : step + 2]
        slope = schedule.slope(x, sigma, schedule.timesteps[step])
        if after > 0:
            middle = math.sqrt(sigma * after)
            half = x + (middle - sigma) * slope
            slope = schedule.slope(half, middle, schedule.timestep(middle))
        x = problem.keep(x + (after - sigma) * slope, step)
        yield x
