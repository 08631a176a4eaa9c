"""DPM-Solver++ 2M: second order, from the last two predictions (Lu et al. 2022, arXiv 2211.01095)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS, SigmaSchedule

DIFFUSERS = "DPMSolverMultistepScheduler"
A1111 = "DPM++ 2M"
SETTINGS = SIGMAS | {
    "eta": 0.0, "final_sigmas_type": "zero", "solver_type": "midpoint", "lower_order_final": True,
    "euler_at_final": False,
}  # fmt: skip


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithm 2. Each step is the exact solution for an x_0 on the line through its last two values over
    log sigma (solver_type "heun"), or for that line's value in the middle of the step ("midpoint", and any
    other name). `eta` is the share of new noise: 0 for the probability flow, 1 for the reverse SDE."""
    settings = problem.settings
    eta, final, heun = settings["eta"], settings["final_sigmas_type"], settings["solver_type"] == "heun"
    # Except with "trailing", the last of these timesteps is the end of the last step.
    count = problem.steps + (settings["timestep_spacing"] != "trailing")
    timesteps = problem.timesteps(count).round()[: problem.steps]
    schedule = SigmaSchedule(problem, timesteps, final=final, entire=True)
    sigmas = schedule.sigmas
    bars = [1 / (sigma**2 + 1) for sigma in sigmas]
    signal, noise = [math.sqrt(bar) for bar in bars], [math.sqrt(1 - bar) for bar in bars]
    x, steps = problem.begin(signal[:-1], noise[:-1])
    previous, h_previous = None, 0.0
    lower_order_final = settings["lower_order_final"] and problem.steps < 15
    first_order_at_end = lower_order_final or settings["euler_at_final"] or final == "zero"
    for step in steps:
        bar = torch.tensor(bars[step], dtype=torch.float64)
        denoised, _ = problem.predict(x, round(schedule.timesteps[step]), bar)
        ratio = sigmas[step + 1] / sigmas[step]  # exp(-h), h the step in -log sigma
        shrink = ratio ** (1 + eta)
        x = noise[step + 1] / noise[step] * ratio**eta * x + signal[step + 1] * (1 - shrink) * denoised
        h = -math.log(ratio) if ratio > 0 else math.inf
        if previous is not None and h > 0 and not (first_order_at_end and step == problem.steps - 1):
            change = (denoised - previous) * (h / h_previous)
            weight = 1 - (1 - shrink) / (h * (1 + eta)) if heun else (1 - shrink) / 2
            x = x + signal[step + 1] * weight * change
        up = noise[step + 1] * math.sqrt(max(0.0, 1 - ratio ** (2 * eta)))
        if up > 0:
            x = x + up * problem.new_noise()
        previous, h_previous = denoised, h
        x = problem.keep(x, step)
        yield x
