"""The image datasets that several methods train on, as the options describe them."""

from __future__ import annotations

from minisd.data.datasets import Captioned
from minisd.data.source import Source
from minisd.options import Captions, Dataset
from minisd.sampling.stable_diffusion import StableDiffusion


def transforms(options: Captions) -> dict:
    """How the options crop, flip and resize images."""
    return {
        "resolution": options.resolution,
        "center_crop": options.center_crop,
        "random_flip": options.random_flip,
        "interpolation": options.image_interpolation_mode,
    }


def captioned(source: Source, options: Captions, sd: StableDiffusion, prompt: str | None = None) -> Captioned:
    """Captioned images; `prompt` is that of images without a caption."""
    return Captioned(
        source,
        image_column=options.image_column,
        caption_column=options.caption_column,
        caption_dropout=options.caption_dropout,
        prompt=prompt,
        bucket=options.bucket,
        step=sd.vae.config.downscale * 2 ** (len(sd.unet.config.block_out_channels) - 1),
        **transforms(options),
    )


def uncaptioned(source: Source, options: Dataset) -> Captioned:
    """Images alone."""
    return Captioned(
        source,
        resolution=options.resolution,
        center_crop=options.center_crop,
        random_flip=options.random_flip,
        image_column=options.image_column,
        caption_column=None,
    )
