"""The pixel-space model: a UNet without text encoder and VAE, and its noise schedule (arXiv 2006.11239)."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minisd.formats import config_json, diffusers, hub
from minisd.models.layers import move
from minisd.models.unet2d import DDPM, UNet2D
from minisd.noise import NoiseSchedule
from minisd.options import require


class PixelDiffusion:
    """unet and schedule; its latents are the pixels (b, 3, h, w) in [-1, 1]."""

    is_pixels, is_pix2pix, is_inpainting = True, False, False

    def __init__(self, unet: UNet2D, scheduler: dict, name: str = ""):
        self.unet = unet
        self.scheduler = scheduler  # the content of scheduler_config.json
        self.schedule = NoiseSchedule.from_config(scheduler)
        self.name = name  # of the folder
        self.channels, self.default_size, self.downscale = unet.config.in_channels, unet.config.sample_size, 1

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | None = None,
        ema: bool = False,
        tokenizer: str | None = None,
    ) -> "PixelDiffusion":
        """Load a DDPMPipeline's folder or hub id, frozen. ValueError, naming the file, if it is none, or the
        flag, if it asks for averaged weights or a tokenizer."""
        for name, value in (("load_ema", ema), ("tokenizer_name", tokenizer)):
            require(not value, f"--{name} has no effect: {model} is a model of pixels, without text")
        path = hub.resolve(str(model), revision=revision, variant=variant, cache_dir=cache_dir)
        unet, scheduler = diffusers.load_ddpm(path, variant)
        return cls(move(unet, device, dtype).eval().requires_grad_(False), scheduler, path.stem)

    @classmethod
    def new(cls, side: int, config: Path | None, **scheduler) -> "PixelDiffusion":
        """A model with random weights for images of `side` pixels. Its network is that of diffusers' example
        script, or of a config.json or its folder; `scheduler` changes scheduler_config.json. ValueError for a
        side that the network cannot halve often enough."""
        network = replace(DDPM, sample_size=side)
        if config:
            network = config_json.read(config.parent if config.name == "config.json" else config, "unet2d")
        smallest = 2 ** (len(network.block_out_channels) - 1)
        require(side % smallest == 0, f"--resolution {side}: this network needs a multiple of {smallest}")
        return cls(UNet2D(network), scheduler_config(**scheduler))

    def save(self, folder: Path, changed: Collection[str] = ("unet",)) -> None:
        """Write a DDPMPipeline's folder, all of it whatever is `changed`."""
        diffusers.save_ddpm(folder, self.unet, self.scheduler)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def decode(self, pixels: Tensor) -> Tensor:
        """The pixels (b, c, h, w): there is nothing to decode."""
        return pixels


def scheduler_config(**changes) -> dict:
    """scheduler_config.json as diffusers' example script writes it, except for `changes`."""
    return {
        "_class_name": "DDPMScheduler", "_diffusers_version": config_json.DIFFUSERS_VERSION, "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": None,
        "variance_type": "fixed_small",
    } | changes  # fmt: skip
