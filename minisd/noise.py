"""The forward process: how much noise there is at each timestep, in fp32 whatever the model runs in.

Ho et al. 2020 (arXiv 2006.11239); v-prediction: Salimans and Ho 2022 (arXiv 2202.00512).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """Shift and stretch sqrt(alphas_cumprod) so that nothing of the image is left at the last timestep
    (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    s = (1 - betas).cumprod(0).sqrt()
    s = (s - s[-1]) * s[0] / (s[0] - s[-1])
    alphas_cumprod = s**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


@dataclass(kw_only=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod (num_train_timesteps,), what the network predicts, and the algebra between the two. The
    fields are keys of scheduler_config.json, with diffusers' defaults.

    `timesteps` is an int64 tensor (b,), one per sample. What is computed of these is fp32.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"

    def __post_init__(self):
        kinds = ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in kinds:
            raise ValueError(f"prediction_type {self.prediction_type!r}: one of {', '.join(kinds)}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: pure noise says nothing"
            )
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float32)
        else:
            betas = make_betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.num_train_timesteps = len(betas)
        self.alphas_cumprod = (1 - betas).cumprod(0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The schedule of a scheduler_config.json, whose other keys are settings of the schedulers."""
        names = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names and value is not None})

    def inference_timesteps(self, steps: int, spacing: str, offset: int) -> Tensor:
        """The timesteps (steps,) that inference visits, descending and in fp64; with spacing "linspace" they
        may lie between two of training (Lin et al. 2023, table 2)."""
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps {steps}: from 1 to {total}")
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            descending = i.flip(0) * (total // steps) + offset
        elif spacing == "linspace":
            descending = i.flip(0) * ((total - 1) / max(1, steps - 1))
        elif spacing == "trailing":  # by the formula of numpy's arange: halves are rounded as in diffusers
            descending = (total + i * ((total - total / steps) - total)).round() - 1
        else:
            raise ValueError(f"timestep_spacing {spacing!r}: one of leading, linspace, trailing")
        return descending.clamp(0, total - 1)

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like` (b, ...)."""
        alphas_cumprod = self.alphas_cumprod[timesteps.cpu()].to(like.device)  # (b,)
        alphas_cumprod = alphas_cumprod.view(-1, *[1] * (like.ndim - 1))  # (b, 1, 1, ...)
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

    def split(self, pred: Tensor, x: Tensor, alpha_cumprod: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and the noise in x as `pred` has them, at the noise level `alpha_cumprod` (a scalar tensor)."""
        pred, x = pred.float(), x.float()
        signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        if self.prediction_type == "epsilon":
            return (x - sigma * pred) / signal, pred
        if self.prediction_type == "v_prediction":
            return signal * x - sigma * pred, signal * pred + sigma * x
        return pred, (x - signal * pred) / sigma


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
