"""DPM-Solver++ 2M: two steps of memory, second order (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn
from minisd.schedulers._sigmas import Levels

A1111 = "DPM++ 2M"


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    eta: float = 0.0,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Tensor]:
    """Exact in x, and in x_0 as far as a line over log sigma through its last two values is (solver_type
    "heun"), or the value in the middle of that line ("midpoint", and whatever else the file says). `eta` is
    how much of the noise is new: 0 for the flow, 1 for the reverse SDE.

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction. Yields x after each step.
    """
    if timestep_spacing == "trailing":
        timesteps = schedule.timesteps(steps, timestep_spacing, steps_offset)
    else:  # one more than there are steps: the last of them is the end
        timesteps = schedule.timesteps(steps + 1, timestep_spacing, steps_offset)[:-1]
    timesteps = torch.tensor(timesteps, dtype=torch.float64)
    levels = Levels(schedule, timesteps, use_karras_sigmas, final_sigmas_type, entire=True)
    bars = [1 / (sigma**2 + 1) for sigma in levels.sigmas]
    signal, noise = [math.sqrt(bar) for bar in bars], [math.sqrt(1 - bar) for bar in bars]
    canvas = Canvas(original, x, signal[:-1], noise[:-1])
    x, previous, h_previous = canvas.x, None, 0.0
    careful = euler_at_final or final_sigmas_type == "zero" or (lower_order_final and steps < 15)
    for step in canvas.steps:
        pred = denoise(x, round(levels.timesteps[step]))
        denoised = schedule.denoised(pred, x, torch.tensor(bars[step], dtype=torch.float64))
        ratio = levels.sigmas[step + 1] / levels.sigmas[step]  # exp(-h), h the step in -log sigma
        shrink = ratio ** (1 + eta)
        x = noise[step + 1] / noise[step] * ratio**eta * x + signal[step + 1] * (1 - shrink) * denoised
        h = -math.log(ratio) if ratio > 0 else math.inf
        if previous is not None and h > 0 and not (careful and step == steps - 1):
            change = (denoised - previous) * (h / h_previous)
            heun = 1 - (1 - shrink) / (h * (1 + eta))
            x = x + signal[step + 1] * (heun if solver_type == "heun" else (1 - shrink) / 2) * change
        up = noise[step + 1] * math.sqrt(max(0.0, 1 - ratio ** (2 * eta)))
        if up > 0:
            x = x + up * randn(x.shape[1:], generators).to(x.device)
        previous, h_previous = denoised, h
        x = canvas.keep(x, step)
        yield x
