"""Noise levels as sigma = sqrt((1 - alpha_bar) / alpha_bar), with x = x_0 + sigma noise, for the schedulers
that are written in sigmas. They are computed in fp64."""

import math

import torch
from torch import Tensor

from minisd.schedulers._problem import TIMESTEPS, Problem

SIGMAS = TIMESTEPS | {"timestep_spacing": "linspace", "use_karras_sigmas": False}  # the settings read here


class SigmaSchedule:
    """The sigmas (steps + 1,) and the timesteps (steps,) of a scheduler.

    With `use_karras_sigmas`, the sigmas are evenly spaced in sigma^(1/7) from the first to the last (Karras
    et al. 2022, arXiv 2206.00364, equation 5), or with `entire` over the whole range of training. The `final`
    sigma, after the last step, is 0 ("zero") or that of timestep 0 ("sigma_min").
    """

    def __init__(self, problem: Problem, timesteps: Tensor, *, final: str = "zero", entire: bool = False):
        self.problem = problem
        bars = problem.schedule.alphas_cumprod.double()
        bars = torch.where(bars > 0, bars, 2.0**-24)  # where there is no signal, sigma would be infinite
        self.table = ((1 - bars) / bars).sqrt()  # (num_train_timesteps,), ascending
        low = timesteps.long().clamp(max=len(bars) - 2)
        sigmas = self.table[low].lerp(self.table[low + 1], timesteps - low)
        self.timesteps = timesteps.tolist()
        if problem.settings["use_karras_sigmas"]:
            first, last = (self.table[-1], self.table[0]) if entire else (sigmas[0], sigmas[-1])
            ramp = torch.linspace(0, 1, len(timesteps), dtype=torch.float64)
            sigmas = (first ** (1 / 7)).lerp(last ** (1 / 7), ramp) ** 7
            self.timesteps = [self.timestep(sigma) for sigma in sigmas.tolist()]
        self.sigmas = [*sigmas.tolist(), {"zero": 0.0, "sigma_min": self.table[0].item()}[final]]

    def timestep(self, sigma: float) -> float:
        """The timestep at which training has this sigma, interpolated linearly in log sigma."""
        logs, log = self.table.log(), math.log(sigma)
        low = max(0, min(int((logs <= log).sum()) - 1, len(logs) - 2))
        between = (log - logs[low]) / (logs[low + 1] - logs[low])
        return low + between.clamp(0, 1).item()

    def begin(self) -> tuple[Tensor, range]:
        """As `Problem.begin`. Pure noise is scaled to the first sigma, or, with the spacing "leading", whose
        first timestep is far from the last of training, to the standard deviation of a noisy image."""
        sigmas = self.sigmas[:-1]
        leading = self.problem.settings["timestep_spacing"] == "leading"
        return self.problem.begin([1.0] * len(sigmas), sigmas, math.hypot(sigmas[0], float(leading)))

    def predict(self, x: Tensor, sigma: float, t: float) -> Tensor:
        """The network's x_0 for x = x_0 + sigma noise; the network is given x / sqrt(sigma^2 + 1)."""
        bar = torch.tensor(1 / (sigma**2 + 1), dtype=torch.float64)
        return self.problem.predict(x * bar.sqrt(), t, bar)[0]


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """Split the step from `sigma` to `after` into a step down to a lower sigma and new noise that leads up
    again; return both sigmas. With an eta of 1 the noise is that of DDPM, with 0 there is none."""
    up = eta * after * math.sqrt(max(0.0, 1 - (after / sigma) ** 2))
    return math.sqrt(after**2 - up**2), up
