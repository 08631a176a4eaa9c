"""DPM-Solver++ 2M: second order, from the last two predictions (Lu et al. 2022, arXiv 2211.01095)."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS, MultistepSchedule

DIFFUSERS = "DPMSolverMultistepScheduler"
A1111 = "DPM++ 2M"
SETTINGS = SIGMAS | {
    "eta": 0.0, "final_sigmas_type": "zero", "solver_type": "midpoint", "lower_order_final": True,
    "euler_at_final": False,
}  # fmt: skip


def sample(problem: Problem, order: int = 2, **fixed: Any) -> Iterator[Tensor]:
    """Algorithm 2. Each step is the exact solution for an x_0 on the line through its last two values over
    log sigma (solver_type "heun"), or for that line's value in the middle of the step ("midpoint", and any
    other name); of order 3, for the parabola through the last three. `eta` is the share of new noise: 0 for
    the probability flow, 1 for the reverse SDE. `fixed` settings replace those of the problem."""
    settings, schedule = problem.settings | fixed, MultistepSchedule(problem)
    eta, final, heun = settings["eta"], settings["final_sigmas_type"], settings["solver_type"] == "heun"
    signal, noise = schedule.signal, schedule.noise
    x, steps = schedule.begin()
    known: list[tuple[Tensor, float]] = []  # the predictions before, newest first, and the steps from them
    lower_order_final = settings["lower_order_final"] and problem.steps < 15
    first_order_at_end = lower_order_final or settings["euler_at_final"] or final == "zero"
    for step in steps:
        denoised, h = schedule.denoised(x, step), schedule.h(step)
        ratio = schedule.ratio(step)
        shrink = ratio ** (1 + eta)
        x = noise[step + 1] / noise[step] * ratio**eta * x + signal[step + 1] * (1 - shrink) * denoised
        if known and h > 0 and not (first_order_at_end and step == problem.steps - 1):
            previous, h_previous = known[0]
            change = (denoised - previous) * (h / h_previous)
            weight = 1 - (1 - shrink) / (h * (1 + eta)) if heun else (1 - shrink) / 2
            if len(known) == 2:
                earlier, h_earlier = known[1]
                bend = (change - (previous - earlier) * (h / h_earlier)) * (h / (h_previous + h_earlier))
                change = change + bend * (h_previous / h)
                x = x - signal[step + 1] * (weight / (h * (1 + eta)) - 1 / 2) * bend
            x = x + signal[step + 1] * weight * change
        up = noise[step + 1] * math.sqrt(max(0.0, 1 - ratio ** (2 * eta)))
        if up > 0:
            x = x + up * problem.new_noise()
        known = [(denoised, h), *known][: order - 1]
        x = problem.keep(x, step)
        yield x
