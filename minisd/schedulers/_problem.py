"""The input of every scheduler: the network, the noise, the noise schedule and the initial image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minisd.device import send
from minisd.noise import NoiseSchedule, Philox, randn

# Settings that `Problem` reads, with diffusers' defaults; parts of the schedulers' SETTINGS.
TIMESTEPS = {"timestep_spacing": "leading", "steps_offset": 0}
CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}


@dataclass(kw_only=True)
class InitImage:
    """An image to start from instead of pure noise (img2img: Meng et al. 2021, arXiv 2108.01073), and the
    part of it to keep (inpainting: Lugmayr et al. 2022, arXiv 2201.09865, equation 8)."""

    latents: Tensor  # (b, c, h, w)
    first_step: int = 0  # earlier steps are skipped
    mask: Tensor | None = None  # (b or 1, 1, h, w): 1 is redrawn, 0 is kept


@dataclass(kw_only=True)
class Problem:
    """What a scheduler solves. It takes its timesteps from here, calls `begin` with its noise levels, and
    calls `keep` after each step; img2img and inpainting need nothing else."""

    denoise: Callable[[Tensor, float], Tensor]  # the network's prediction for x (b, c, h, w) at t
    noise: Tensor  # (b, c, h, w), standard normal
    schedule: NoiseSchedule
    steps: int
    generators: list[torch.Generator | Philox]  # one per sample, for the noise that is added during sampling
    settings: dict[str, Any]  # see `read_settings`
    init_image: InitImage | None = None
    levels: list[tuple[float, float]] = field(init=False)  # signal and sigma, before and after each step

    def timesteps(self, count: int | None = None) -> Tensor:
        """The timesteps (steps,), or (count,), descending and in fp64: not all are whole numbers."""
        spacing, offset = self.settings["timestep_spacing"], self.settings["steps_offset"]
        return self.schedule.inference_timesteps(count or self.steps, spacing, offset)

    def alphas_cumprod(self, *, to_one: bool = True) -> Tensor:
        """alphas_cumprod of training and, at index -1, the level after the last step: 1, or, unless `to_one`,
        that of timestep 0."""
        alphas_cumprod = self.schedule.alphas_cumprod.to(self.noise.device)
        end = torch.ones_like(alphas_cumprod[:1]) if to_one else alphas_cumprod[:1]
        return torch.cat([alphas_cumprod, end])  # (num_train_timesteps + 1,)

    def begin(
        self, signal: Sequence[float] | Tensor, sigma: Sequence[float] | Tensor, scale: float = 1.0
    ) -> tuple[Tensor, range]:
        """Return the first x (b, c, h, w) and the numbers of the steps to take.

        Step i of n starts from signal[i] x_0 + sigma[i] noise, (n,) each. Without an initial image, or if it
        has a mask and no step is skipped, the first step starts from `scale` times the noise.
        """
        self.levels = [*zip(map(float, signal), map(float, sigma), strict=True), (1.0, 0.0)]
        init, steps = self.init_image, len(signal)
        first = init.first_step if init else 0
        if not 0 <= first < steps:
            raise ValueError(f"--strength leaves none of the {steps} steps")
        from_noise = init is None or (init.mask is not None and first == 0)
        return self.noise * scale if from_noise else self._noised_image(first), range(first, steps)

    def keep(self, x: Tensor, step: int) -> Tensor:
        """x after `step`, with the initial image, at the next step's noise level, outside the mask."""
        if self.init_image is None or self.init_image.mask is None:
            return x
        mask = self.init_image.mask.to(x)
        return mask * x + (1 - mask) * self._noised_image(step + 1)

    def _noised_image(self, step: int) -> Tensor:
        signal, sigma = self.levels[step]
        return signal * self.init_image.latents.to(self.noise) + sigma * self.noise

    def predict(self, x: Tensor, t: float, alpha_cumprod: Tensor) -> tuple[Tensor, Tensor]:
        """The network's x_0 and noise for x at timestep t; x_0 is clipped if clip_sample is set."""
        denoised, noise = self.schedule.split(self.denoise(x, t), x, alpha_cumprod)
        if self.settings.get("clip_sample"):
            limit = self.settings["clip_sample_range"]
            denoised = denoised.clamp(-limit, limit)
        return denoised, noise

    def new_noise(self) -> Tensor:
        """Standard normal (b, c, h, w)."""
        return send(randn(self.noise.shape[1:], self.generators), self.noise.device)


def read_settings(scheduler: ModuleType, config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's SETTINGS, the values of scheduler_config.json replacing the defaults."""
    known = {key: value for key, value in config.items() if key in scheduler.SETTINGS and value is not None}
    return scheduler.SETTINGS | known
