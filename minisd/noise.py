"""The forward process: the noise level at each timestep (in fp32, whatever the model's dtype), and all random
draws of a run.

Ho et al. 2020 (arXiv 2006.11239); v-prediction: Salimans and Ho 2022 (arXiv 2202.00512).
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

ROUNDS = 6  # of a Feistel network


def make_betas(kind: str, start: float, end: float, steps: int) -> Tensor:
    """The variance that each step adds, (steps,), for a `kind` that a config's beta_schedule can have."""
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":  # linear in the square root: Stable Diffusion's
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    if kind != "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17
        raise ValueError(f"beta_schedule {kind!r}: one of linear, scaled_linear, squaredcos_cap_v2")
    bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)]
    return torch.tensor(betas, dtype=torch.float32)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch sqrt(alphas_cumprod) so that the last timestep is pure noise (Lin et al. 2023, arXiv
    2305.08891, algorithm 1)."""
    s = (1 - betas).cumprod(0).sqrt()
    s = (s - s[-1]) * s[0] / (s[0] - s[-1])
    alphas_cumprod = s**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


@dataclass(kw_only=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod (num_train_timesteps,), what the network predicts, and the algebra between the two. The
    fields are keys of scheduler_config.json (formats/config_json.py checks them), with diffusers' defaults.

    In the methods, `timesteps` is an int64 tensor (b,), one per sample. Results are in fp32, on its device.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"

    def __post_init__(self):
        kind = self.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {kind!r}: one of epsilon, v_prediction, sample")
        if self.rescale_betas_zero_snr and kind == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
                "x_0 cannot be computed from pure noise and its prediction"
            )
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float32)
        else:
            betas = make_betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.num_train_timesteps = len(betas)
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.copies: dict[torch.device, Tensor] = {}  # of alphas_cumprod on the devices that it is needed on

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The noise schedule of a scheduler_config.json; its other keys are settings of the schedulers."""
        names = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names and value is not None})

    def inference_timesteps(self, steps: int, spacing: str, offset: int) -> Tensor:
        """The timesteps (steps,) of inference, descending and in fp64, for a spacing "leading", "linspace" or
        "trailing"; those of "linspace" need not be whole numbers (Lin et al. 2023, table 2)."""
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

    def at(self, timesteps: Tensor) -> Tensor:
        """alpha_bar_t, (b,)."""
        device = timesteps.device
        if device not in self.copies:
            self.copies[device] = self.alphas_cumprod.to(device)
        return self.copies[device][timesteps]

    def shaped(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """alpha_bar_t, shaped to multiply `like` (b, ...)."""
        return self.at(timesteps).view(-1, *[1] * (like.ndim - 1))  # (b, 1, 1, ...)

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like` (b, ...)."""
        alphas_cumprod = self.shaped(timesteps, like)
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
        alphas_cumprod = self.at(timesteps)
        return alphas_cumprod / (1 - alphas_cumprod)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """The weights (b,) of the squared errors that give the error of x_0 a weight of min(SNR, gamma) (Hang
        et al. 2023, arXiv 2303.09556)."""
        snr = self.snr(timesteps)
        capped = snr.clamp(max=gamma)
        if self.prediction_type == "sample":
            return capped
        if self.prediction_type == "v_prediction":
            return capped / (snr + 1)
        return torch.where(snr > 0, capped / snr, 1.0)  # 1 is the limit at SNR 0

    def split(self, pred: Tensor, x: Tensor, alpha_cumprod: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and the noise that `pred` implies for x, at the noise level `alpha_cumprod`, a scalar
        or `shaped`."""
        pred, x = pred.float(), x.float()
        signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        if self.prediction_type == "epsilon":
            return (x - sigma * pred) / signal, pred
        if self.prediction_type == "v_prediction":
            return signal * x - sigma * pred, signal * pred + sigma * x
        return pred, (x - signal * pred) / sigma

    def ddim(
        self, pred: Tensor, x: Tensor, timesteps: Tensor, after: Tensor, sigma: Tensor | float = 0.0
    ) -> Tensor:
        """The mean of x at the timesteps `after`, (b,) as `timesteps` are, by DDIM's step with a deviation of
        `sigma` (Song et al. 2020, arXiv 2010.02502, equation 12)."""
        denoised, noise = self.split(pred, x, self.shaped(timesteps, x))
        alpha = self.shaped(after, x)
        return alpha.sqrt() * denoised + (1 - alpha - sigma**2).sqrt() * noise

    def ddim_sigma(self, timesteps: Tensor, after: Tensor, like: Tensor) -> Tensor:
        """The deviation of DDIM's step with an eta of 1 (equation 16), shaped to multiply `like` (b, ...)."""
        before, alpha = self.shaped(timesteps, like), self.shaped(after, like)
        return ((1 - alpha) / (1 - before) * (1 - before / alpha)).sqrt()


def log_density(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """The logarithm of the normal density of x (b, c, h, w), for each of its elements, (b,)."""
    found = ((x - mean) / sigma).square() / 2 + sigma.log() + math.log(2 * math.pi) / 2
    return -found.flatten(1).mean(dim=1)


def generator(*names: object) -> torch.Generator:
    """A CPU generator that depends on `names` alone, for example (seed, "noise", number of the sample).

    All random draws of a run come from such generators. So no random state has to be stored to resume a run,
    and nothing depends on the batch size, the workers or the number of devices.
    """
    digest = hashlib.blake2b(",".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Philox:
    """The normal random numbers that torch draws on an Nvidia GPU, computed on the CPU: Philox4x32-10 (Salmon
    et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the sine of a Box-Muller transform.

    The key is the seed; the counter of element i is i, and the number of the draw. So it is on a GPU up to as
    many elements as it runs threads at once, which are more than images have latents.
    """

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal `shape`, in fp32; the next draw is another."""
        low = 0xFFFFFFFF  # the lower half of 64 bits
        elements = torch.arange(math.prod(shape))
        zeros, keys = torch.zeros_like(elements), (self.seed & low, self.seed >> 32 & low)
        words = [zeros + self.draws, zeros, elements, zeros]
        for _ in range(10):
            first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # modulo 2^64
            words = [
                second >> 32 & low ^ words[1] ^ keys[0], second & low,
                first >> 32 & low ^ words[3] ^ keys[1], first & low,
            ]  # fmt: skip
            keys = keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low
        self.draws += 1
        radius, angle = ((word.double() + 0.5) / 2**32 for word in words[:2])  # uniform, neither 0 nor 1
        return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).sin()).float().view(shape)


def randn(shape: tuple[int, ...], generators: list[torch.Generator | Philox]) -> Tensor:
    """Standard normal (b, *shape) in fp32 on the CPU, sample i from generators[i]."""
    draws = (g.randn(shape) if isinstance(g, Philox) else torch.randn(shape, generator=g) for g in generators)
    return torch.stack([*draws])


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with that probability."""
    return torch.rand((), generator=generator).item() < probability


def choice(options: Sequence[Any], generator: torch.Generator) -> Any:
    """An option drawn with equal probabilities."""
    return options[torch.randint(len(options), (), generator=generator).item()]


def between(low: int, high: int, generator: torch.Generator) -> int:
    """An integer drawn from low to high, both included."""
    return torch.randint(low, high + 1, (), generator=generator).item()


def permuted(index: int, length: int, *names: object) -> int:
    """Where `index` is in a permutation of the integers below `length` that depends on `names` alone, without
    a list of them: a Feistel network (Luby and Rackoff 1988), walked until it is back in the range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains", method 2)."""
    bits = max(1, (length - 1).bit_length() + 1 >> 1)
    mask, key = (1 << bits) - 1, ",".join(map(str, names)).encode()[-64:]
    while True:
        for turn in range(ROUNDS):
            left, right = index >> bits, index & mask
            text = b"%d,%d" % (turn, right)
            digest = hashlib.blake2b(text, digest_size=8, key=key).digest()
            index = right << bits | left ^ int.from_bytes(digest, "little") & mask
        if index < length:
            return index


def subset(total: int, count: int | None, generator: torch.Generator) -> list[int]:
    """`count` of the integers below `total`, drawn and sorted; all of them if `count` is None."""
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())
