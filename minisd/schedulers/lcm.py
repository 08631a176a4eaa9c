"""LCM: a few steps of a distilled model, each to x_0 and up again (Luo et al. 2023, arXiv 2310.04378)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisd.noise import Canvas, NoiseSchedule, Original, randn

A1111 = "LCM"


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    generators: list[torch.Generator],
    *,
    original: Original | None = None,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Iterator[Tensor]:
    """Algorithm 3, at `steps` of the `original_inference_steps` timesteps at which the model was distilled.
    The consistency function is c_skip x + c_out x_0, where c_skip is 1 and c_out 0 at timestep 0 (Song et al.
    2023, arXiv 2303.01469, appendix C).

    x (b, ...) is standard normal; denoise(x, t) is the network's prediction. Yields x after each step.
    """
    if not 1 <= steps <= original_inference_steps:
        raise ValueError(f"--steps {steps}: lcm has from 1 to {original_inference_steps}")
    apart = schedule.num_train_timesteps // original_inference_steps
    distilled = [apart * (i + 1) - 1 for i in reversed(range(original_inference_steps))]
    timesteps = [distilled[i * original_inference_steps // steps] for i in range(steps)]
    alphas_cumprod = schedule.alphas_cumprod.to(x.device)
    bars = alphas_cumprod[timesteps]
    canvas = Canvas(original, x, bars.sqrt(), (1 - bars).sqrt())
    x = canvas.x
    for step in canvas.steps:
        scaled = timesteps[step] * timestep_scaling / 0.5  # 0.5 is the standard deviation of the data
        denoised = schedule.denoised(denoise(x, timesteps[step]), x, bars[step])
        x = scaled / (scaled**2 + 1) ** 0.5 * denoised + x / (scaled**2 + 1)
        if step < steps - 1:
            noise = randn(x.shape[1:], generators).to(x.device)
            x = bars[step + 1].sqrt() * x + (1 - bars[step + 1]).sqrt() * noise
        x = canvas.keep(x, step)
        yield x
