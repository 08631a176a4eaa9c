"""Noise levels as sigma = sqrt((1 - alpha_bar) / alpha_bar), with x = x_0 + sigma noise, for the schedulers
that are written in sigmas. They are computed in fp64."""

import math

import torch
from torch import Tensor

from minisd.schedulers._problem import TIMESTEPS, Problem

SIGMAS = TIMESTEPS | {
    "timestep_spacing": "linspace", "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "schedule_type": None,
}  # fmt: skip  # the settings read here; schedule_type is the flag, the others are diffusers'


class SigmaSchedule:
    """The sigmas (steps + 1,) and the timesteps (steps,) of a scheduler.

    With the schedule type "karras", the sigmas are evenly spaced in sigma^(1/7) from the first to the last
    (Karras et al. 2022, arXiv 2206.00364, equation 5), with "exponential" in log sigma, or with `entire` over
    the whole range of training. With "sgm_uniform", the timesteps divide that range evenly, the last step
    included. The `final` sigma, after the last step, is 0 ("zero") or that of timestep 0 ("sigma_min").
    """

    def __init__(self, problem: Problem, timesteps: Tensor, *, final: str = "zero", entire: bool = False):
        self.problem = problem
        bars = problem.schedule.alphas_cumprod.double()
        bars = torch.where(bars > 0, bars, 2.0**-24)  # where there is no signal, sigma would be infinite
        self.table = ((1 - bars) / bars).sqrt()  # (num_train_timesteps,), ascending
        settings, count = problem.settings, len(timesteps)
        kinds = [name for name in ("karras", "exponential") if settings[f"use_{name}_sigmas"]]
        self.kind = settings["schedule_type"] or (kinds[0] if kinds else "uniform")
        if self.kind == "sgm_uniform":
            timesteps = problem.schedule.inference_timesteps(count + 1, "linspace", 0)[:-1]
        low = timesteps.long().clamp(max=len(bars) - 2)
        sigmas = self.table[low].lerp(self.table[low + 1], timesteps - low)
        self.timesteps = timesteps.tolist()
        if self.kind in ("karras", "exponential"):
            first, last = (self.table[-1], self.table[0]) if entire else (sigmas[0], sigmas[-1])
            ramp = torch.linspace(0, 1, count, dtype=torch.float64)
            if self.kind == "karras":
                sigmas = (first ** (1 / 7)).lerp(last ** (1 / 7), ramp) ** 7
            else:
                sigmas = first.log().lerp(last.log(), ramp).exp()
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

    def slope(self, x: Tensor, sigma: float, t: float) -> Tensor:
        """dx / dsigma = (x - x_0) / sigma, by the prediction at this sigma and its timestep."""
        return (x - self.predict(x, sigma, t)) / sigma


class MultistepSchedule(SigmaSchedule):
    """The same for the multistep solvers, with x = signal x_0 + noise times standard normal noise, where
    signal^2 + noise^2 = 1; `signal` and `noise` are (steps + 1,). Except with the spacing "trailing", the
    last timestep of the spacing is the end of the last step."""

    def __init__(self, problem: Problem):
        count = problem.steps + (problem.settings["timestep_spacing"] != "trailing")
        timesteps = problem.timesteps(count).round()[: problem.steps]
        super().__init__(problem, timesteps, final=problem.settings["final_sigmas_type"], entire=True)
        self.bars = [1 / (sigma**2 + 1) for sigma in self.sigmas]
        self.signal = [math.sqrt(bar) for bar in self.bars]
        self.noise = [math.sqrt(1 - bar) for bar in self.bars]
        self.timesteps = [*map(round, self.timesteps)]

    def begin(self) -> tuple[Tensor, range]:
        return self.problem.begin(self.signal[:-1], self.noise[:-1])

    def denoised(self, x: Tensor, step: int) -> Tensor:
        """The network's x_0 for x at the start of `step`."""
        bar = torch.tensor(self.bars[step], dtype=torch.float64)
        return self.problem.predict(x, self.timesteps[step], bar)[0]

    def ratio(self, step: int) -> float:
        """exp(-h) of a step."""
        return self.sigmas[step + 1] / self.sigmas[step]

    def h(self, step: int) -> float:
        """The length of a step in log(signal / noise)."""
        return -math.log(self.ratio(step)) if self.ratio(step) > 0 else math.inf


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """Split the step from `sigma` to `after` into a step down to a lower sigma and new noise that leads up
    again; return both sigmas. With an eta of 1 the noise is that of DDPM, with 0 there is none."""
    up = eta * after * math.sqrt(max(0.0, 1 - (after / sigma) ** 2))
    return math.sqrt(after**2 - up**2), up
