"""What several test files share."""

import torch

from minisd.noise import NoiseSchedule
from minisd.schedulers._problem import InitImage, Problem, read_settings

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def toy(x, t):
    """A network without weights."""
    return 0.5 * x.tanh() + 0.1 * t / 1000


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(
    scheduler,
    steps: int,
    noise: torch.Tensor,
    generators: list[torch.Generator] = (),
    denoise=toy,
    *,
    schedule: NoiseSchedule | None = None,
    init_image: InitImage | None = None,
    **settings,
) -> list[torch.Tensor]:
    """x after each step of a scheduler's module, on the noise schedule of Stable Diffusion by default."""
    problem = Problem(
        denoise=denoise,
        noise=noise,
        schedule=schedule or NoiseSchedule(**SD),
        steps=steps,
        generators=generators,
        settings=read_settings(scheduler, settings),
        init_image=init_image,
    )
    return list(scheduler.sample(problem))
