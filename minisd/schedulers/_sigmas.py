"""Noise levels as sigma = sqrt((1 - alpha_bar) / alpha_bar), where x = x_0 + sigma noise, for the schedulers
that count in these. All is computed in fp64 until it meets x."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minisd.noise import NoiseSchedule


class Levels:
    """The sigmas (steps + 1,) and the timesteps (steps,) of a scheduler, from those of training.

    With `karras`, the sigmas are spread evenly in sigma^(1/7) from the first to the last (Karras et al. 2022,
    arXiv 2206.00364, equation 5), over all of training with `entire`. The last is 0, or that of timestep 0.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Tensor, karras: bool, final: str, *, entire: bool = False
    ):
        bars = schedule.alphas_cumprod.double()
        bars = torch.where(bars > 0, bars, 2.0**-24)  # with nothing left of the picture, sigma has no end
        self.table = ((1 - bars) / bars).sqrt()  # (num_train_timesteps,), ascending
        low = timesteps.long().clamp(max=len(bars) - 2)
        sigmas = self.table[low].lerp(self.table[low + 1], timesteps - low)
        self.timesteps = timesteps.tolist()
        if karras:
            first, last = (self.table[-1], self.table[0]) if entire else (sigmas[0], sigmas[-1])
            ramp = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
            sigmas = (first ** (1 / 7)).lerp(last ** (1 / 7), ramp) ** 7
            self.timesteps = [self.timestep(sigma) for sigma in sigmas.tolist()]
        ends = {"zero": 0.0, "sigma_min": self.table[0].item()}
        if final not in ends:
            raise ValueError(f"final_sigmas_type {final!r}: one of {', '.join(ends)}")
        self.sigmas = [*sigmas.tolist(), ends[final]]

    def timestep(self, sigma: float) -> float:
        """Where in training sigma would be, linear in its logarithm between two timesteps."""
        logs, log = self.table.log(), math.log(sigma)
        low = max(0, min(int((logs <= log).sum()) - 1, len(logs) - 2))
        between = (log - logs[low]) / (logs[low + 1] - logs[low])
        return low + between.clamp(0, 1).item()

    def scale(self, spacing: str) -> float:
        """What the noise is multiplied by to begin with: sigma, and that of a picture too where the first
        timestep is far from the last of training."""
        return math.hypot(self.sigmas[0], 1.0 if spacing == "leading" else 0.0)


def predict(denoise: Callable, schedule: NoiseSchedule, x: Tensor, sigma: float, t: float) -> Tensor:
    """x_0 as the network has it for x = x_0 + sigma noise."""
    bar = torch.tensor(1 / (sigma**2 + 1), dtype=torch.float64)
    x = x * bar.sqrt()
    return schedule.denoised(denoise(x, t), x, bar)


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """The step from `sigma` to `after` as one down to less, and the noise that then leads up again: all that
    the process has there with an eta of 1, none with 0."""
    up = eta * after * math.sqrt(max(0.0, 1 - (after / sigma) ** 2))
    return math.sqrt(after**2 - up**2), up
