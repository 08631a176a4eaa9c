"""The pixel-space model: a UNet without text encoder and VAE, and its noise schedule (arXiv 2006.11239)."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minisd.formats import config_json, diffusers
from minisd.models.layers import move
from minisd.models.unet2d import DDPM, UNet2D
from minisd.noise import NoiseSchedule, randn
from minisd.schedulers import ddpm
from minisd.schedulers._problem import Problem, read_settings


class PixelDiffusion:
    """unet and schedule; generates images (b, 3, h, w) in [-1, 1]."""

    def __init__(self, unet: UNet2D, scheduler: dict):
        self.unet = unet
        self.scheduler = scheduler  # the content of scheduler_config.json
        self.schedule = NoiseSchedule.from_config(scheduler)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "PixelDiffusion":
        """Load a DDPMPipeline's folder, frozen. ValueError, naming the file, if it is none."""
        unet, scheduler = diffusers.load_ddpm(path)
        return cls(move(unet, device).eval().requires_grad_(False), scheduler)

    @classmethod
    def new(cls, side: int, config: Path | None, **scheduler) -> "PixelDiffusion":
        """A model with random weights for images of `side` pixels. Its network is that of diffusers' example
        script, or of a config.json or its folder; `scheduler` changes scheduler_config.json. ValueError for a
        side that the network cannot halve often enough."""
        network = replace(DDPM, sample_size=side)
        if config:
            network = config_json.read(config.parent if config.name == "config.json" else config, "unet2d")
        smallest = 2 ** (len(network.block_out_channels) - 1)
        if side % smallest:
            raise ValueError(f"--resolution {side}: this network needs a multiple of {smallest}")
        return cls(UNet2D(network), scheduler_config(**scheduler))

    def save(self, folder: Path, changed: Collection[str] = ("unet",)) -> None:
        """Write a DDPMPipeline's folder, all of it whatever is `changed`."""
        diffusers.save_ddpm(folder, self.unet, self.scheduler)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The networks by name."""
        return {"unet": self.unet}

    @torch.no_grad()
    def sample(
        self, generators: list[torch.Generator], steps: int, on_step: Callable[[int], None] = lambda n: None
    ) -> Tensor:
        """Generate one image for each generator, by DDPM: (b, c, h, w), about [-1, 1]. `on_step(b)` is called
        after each step."""
        config, weight = self.unet.config, self.unet.conv_in.weight

        def predict(x: Tensor, t: float) -> Tensor:
            timesteps = torch.full((len(x),), t, device=weight.device)
            return self.unet(x.to(weight.dtype), timesteps).float()

        shape = (config.in_channels, config.sample_size, config.sample_size)
        problem = Problem(
            denoise=predict,
            noise=randn(shape, generators).to(weight.device),
            schedule=self.schedule,
            steps=steps,
            generators=generators,
            settings=read_settings(ddpm, self.scheduler),
        )
        for x in ddpm.sample(problem):
            on_step(len(x))
        return x


def scheduler_config(**changes) -> dict:
    """scheduler_config.json as diffusers' example script writes it, except for `changes`."""
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": config_json.DIFFUSERS_VERSION,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "trained_betas": None,
        "variance_type": "fixed_small",
    } | changes
