"""The forward process: how much noise there is at each timestep, in fp32 whatever the model runs in.

Ho et al. 2020 (arXiv 2006.11239); v-prediction: Salimans and Ho 2022 (arXiv 2202.00512).
"""

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def make_betas(kind: str, start: float, end: float, steps: int) -> Tensor:
    """The variances that each of `steps` steps adds, (steps,)."""
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":  # linear in the square root: Stable Diffusion's
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17

        def bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)]
        return torch.tensor(betas, dtype=torch.float32)
    raise ValueError(f"beta_schedule {kind!r} is unknown; one of: linear, scaled_linear, squaredcos_cap_v2")


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch sqrt(alphas_cumprod) so that nothing of the picture is left at the last timestep
    (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    s = (1 - betas).cumprod(0).sqrt()
    s = (s - s[-1]) * s[0] / (s[0] - s[-1])
    alphas_cumprod = s**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, ...) on the device of `like`."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


class NoiseSchedule:
    """alphas_cumprod (num_train_timesteps,), what the network predicts, and the algebra between the two.

    `timesteps` is an int64 tensor (b,), one per sample. Every method computes and returns fp32.
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
    ):
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {prediction_type!r}: one of epsilon, v_prediction, sample")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: pure noise says nothing"
            )
        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
        else:
            betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(betas)
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def spaced(self, steps: int, spacing: str, offset: int) -> Tensor:
        """The timesteps that inference in `steps` steps visits, descending and in fp64; those of "linspace"
        may lie between two of training (Lin et al. 2023, table 2)."""
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps {steps}: from 1 to {total}")
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            descending = i.flip(0) * (total // steps) + offset
        elif spacing == "linspace":
            descending = i.flip(0) * ((total - 1) / max(1, steps - 1))
        elif spacing == "trailing":  # in numpy's words, so that halves are rounded as they were elsewhere
            descending = (total + i * ((total - total / steps) - total)).round() - 1
        else:
            raise ValueError(f"timestep_spacing {spacing!r}: one of leading, linspace, trailing")
        return descending.clamp(0, total - 1)

    def timesteps(self, steps: int, spacing: str, offset: int) -> list[int]:
        """These, rounded to those of training."""
        return self.spaced(steps, spacing, offset).round().long().tolist()

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like` (b, ...)."""
        alphas_cumprod = _column(self.alphas_cumprod[timesteps.cpu()], like)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM, equation 4)."""
        signal, sigma = self.levels(timesteps, latents)
        return signal * latents.float() + sigma * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, x_0, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return latents.float()
        signal, sigma = self.levels(timesteps, latents)
        return signal * noise.float() - sigma * latents.float()

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), (b,)."""
        alphas_cumprod = self.alphas_cumprod[timesteps.cpu()]
        return alphas_cumprod / (1 - alphas_cumprod)

    def denoised(self, pred: Tensor, x: Tensor, alpha_cumprod: Tensor) -> Tensor:
        """x_0 as `pred` has it for x at the noise level `alpha_cumprod` (a scalar tensor)."""
        if self.prediction_type == "sample":
            return pred.float()
        signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        if self.prediction_type == "epsilon":
            return (x.float() - sigma * pred.float()) / signal
        return signal * x.float() - sigma * pred.float()

    def noise_in(self, denoised: Tensor, pred: Tensor, x: Tensor, alpha_cumprod: Tensor) -> Tensor:
        """The noise as `pred` has it for x at the noise level `alpha_cumprod`; `denoised` is its x_0."""
        if self.prediction_type == "epsilon":
            return pred.float()
        signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        if self.prediction_type == "v_prediction":
            return signal * pred.float() + sigma * x.float()
        return (x.float() - signal * denoised) / sigma


@dataclass(kw_only=True)
class Original:
    """A picture to begin with instead of noise alone (Meng et al. 2021, arXiv 2108.01073), and the part of it
    to keep (Lugmayr et al. 2022, arXiv 2201.09865, equation 8)."""

    latents: Tensor  # (b, c, h, w)
    start: int = 0  # so many steps are left out
    mask: Tensor | None = None  # (b or 1, 1, h, w): 1 is drawn anew, 0 is kept


class Canvas:
    """What a scheduler draws on: `x` to begin with, the numbers of the `steps` to take, `keep` after each.

    `noise` (b, c, h, w) is standard normal. Step i of n begins at signal[i] x_0 + sigma[i] noise, (n,) each;
    without an original, or with a mask and no step left out, the first begins at `scale` times the noise.
    """

    def __init__(
        self,
        original: Original | None,
        noise: Tensor,
        signal: Sequence[float] | Tensor,
        sigma: Sequence[float] | Tensor,
        scale: float = 1.0,
    ):
        self.original, self.noise = original, noise
        self.levels = [*zip(map(float, signal), map(float, sigma), strict=True), (1.0, 0.0)]
        start = original.start if original else 0
        if not 0 <= start < len(signal):
            raise ValueError(f"--strength leaves none of the {len(signal)} steps")
        self.steps = range(start, len(signal))
        alone = original is None or (original.mask is not None and start == 0)
        self.x = noise * scale if alone else self._noised(start)

    def _noised(self, step: int) -> Tensor:
        signal, sigma = self.levels[step]
        return signal * self.original.latents.to(self.noise) + sigma * self.noise

    def keep(self, x: Tensor, step: int) -> Tensor:
        """x after `step`, with the original outside the mask, as noisy as the next step wants it."""
        if self.original is None or self.original.mask is None:
            return x
        mask = self.original.mask.to(x)
        return mask * x + (1 - mask) * self._noised(step + 1)


def settings_for(function, config: dict) -> dict:
    """The entries of a scheduler_config.json that `function` has keywords for; the rest is for others."""
    known = inspect.signature(function).parameters
    return {k: v for k, v in config.items() if k in known and v is not None}


def generator(*names: object) -> torch.Generator:
    """A CPU generator whose stream depends on `names` alone, such as (seed, "noise", number of the sample).

    Every draw of a run comes from one of these, so that nothing random has to be stored to resume a run, and
    nothing depends on the batch size, on the workers or on the number of devices.
    """
    digest = hashlib.blake2b(",".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def randn(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Standard normal (b, *shape) in fp32 on the CPU, sample i from generators[i]."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with that probability."""
    return torch.rand((), generator=generator).item() < probability


def choice(options: Sequence[Any], generator: torch.Generator) -> Any:
    """One of the options, each equally likely."""
    return options[torch.randint(len(options), (), generator=generator).item()]


def between(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (), generator=generator).item()


def subset(total: int, count: int | None, generator: torch.Generator) -> list[int]:
    """`count` of the numbers below `total`, ascending; all of them if `count` is None."""
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())
