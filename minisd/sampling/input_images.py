"""The pictures that sample.py is given: read, brought to one size, and shared out among the prompts."""

from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.data.canny import canny
from minisd.sampling.generate import Settings
from minisd.sampling.guidance import Control
from minisd.sampling.options import Sample, split_scale
from minisd.sampling.stable_diffusion import StableDiffusion

PREPROCESS = {"canny": canny, "none": lambda image: image}
MULTIPLE = 8  # of which the sides of a picture are, in pixels


class Inputs:
    """What --image, --mask and --control_image name. Made before the model is read: what is wrong with them
    is said at once. ValueError, here and below, names the flag or the file."""

    def __init__(self, options: Sample):
        self.options = options
        self.images = [(path, opened(path)) for path in listed(options.image)]
        self.masks = [(path, opened(path, behind="black")) for path in listed(options.mask)]
        self.hints = [(path, opened(path)) for path in options.control_image]

    def arguments(self, sd: StableDiffusion) -> dict:
        """What generate.pictures takes."""
        o = self.options
        prompts = [text for text in self.prompts(o.prompts) for _ in range(o.num_images)]
        own = {f.name: getattr(o, f.name) for f in fields(Settings) if f.default is not MISSING}
        own = {name: value for name, value in own.items() if value is not None}
        settings = Settings(**own | self.settings(sd))
        return {
            "prompts": prompts,
            "seeds": [o.seed + i for i in range(len(prompts))],
            "settings": settings,
            "batch_size": o.batch_size or (1 if sd.device.type == "cpu" else 4),
            **self.tensors(sd, settings, len(prompts)),
        }

    def prompts(self, prompts: list[str]) -> list[str]:
        """One for each picture to draw: a single prompt goes with all of --image."""
        if len(prompts) == 1:
            prompts = prompts * max(1, len(self.images))
        for name, given in (("image", self.images), ("mask", self.masks)):
            if len(given) not in (0, 1, len(prompts)):
                raise ValueError(
                    f"{len(given)} --{name} for {len(prompts)} pictures: give one, or one for each"
                )
        return prompts

    def settings(self, sd: StableDiffusion) -> dict:
        """The entries of generate.Settings that the pictures have a part in."""
        o, found = self.options, {}
        width = height = sd.default_size
        for path, image in [*self.images, *self.hints][:1]:
            width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
            if not (width and height):
                raise ValueError(f"{path} has a side of less than {MULTIPLE} pixels")
        taken, latent = sd.unet.config.in_channels, sd.vae.config.latent_channels
        if self.images:
            found["strength"] = o.strength or (1.0 if self.masks or taken > latent else 0.8)
        if o.image_guidance_scale is not None:
            if taken != 2 * latent:
                raise ValueError(
                    f"--image_guidance_scale has no effect: {sd.name} is no instruct-pix2pix model"
                )
            found["image_guidance_scale"] = o.image_guidance_scale
        return found | {"width": o.width or width, "height": o.height or height}

    def tensors(self, sd: StableDiffusion, settings: Settings, count: int) -> dict:
        """The pictures as generate.pictures takes them, for `count` pictures to draw."""
        size = settings.width, settings.height
        masks = []
        for path, image in self.masks:
            mask = torch.from_numpy(np.asarray(fit(path, image.convert("L"), size)) >= 128).float()[None]
            if not F.max_pool2d(mask, 1, sd.vae.config.downscale).any():
                raise ValueError(f"--mask {path}: nothing in it is white, or too little to redraw")
            masks.append(mask)  # (1, h, w)
        return {
            "originals": share([images.to_tensor(fit(*image, size)) for image in self.images], count),
            "masks": share(masks, count),
            "controls": self._controls(sd, settings, count),
        }

    def of(self, number: int, count: int) -> dict[str, list[Path]]:
        """The files that picture `number` of `count` has of --image and --mask."""
        given = {"image": self.images, "mask": self.masks}
        return {name: [files[number * len(files) // count][0]] for name, files in given.items() if files}

    def _controls(self, sd: StableDiffusion, settings: Settings, count: int) -> list[Control]:
        o = self.options
        ranges = (o.for_each(name) for name in ("control_preprocess", "control_start", "control_end"))
        found = []
        for name, (path, image), preprocess, start, end in zip(
            o.controlnet, self.hints, *ranges, strict=True
        ):
            source, scale = split_scale(name)
            network = sd.controlnet(source, o.cache_dir)
            image = PREPROCESS[preprocess](fit(path, image, (settings.width, settings.height)))
            hint = share([images.to_tensor(image) / 2 + 0.5], count)
            one = Control(network=network, hint=hint, scale=scale, start=start, end=end, guess=o.guess_mode)
            steps = settings.steps - settings.first_step
            if not any(one.acts(step, steps) for step in range(steps)):
                raise ValueError(
                    f"--control_start {start:g} to --control_end {end:g} has none of the {steps} steps in it"
                )
            found.append(one)
        return found


def opened(given: Path | Image.Image, **options) -> Image.Image:
    """The picture in a file, or one that is read already."""
    return given.convert("RGB") if isinstance(given, Image.Image) else images.open_image(given, **options)


def listed(paths: list[Path]) -> list[Path]:
    """Files as they are, and for a folder the pictures in it."""
    found = []
    for path in paths:
        inside = images.list_images(path) if isinstance(path, Path) and path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no pictures")
        found += inside
    return found


def fit(path: Path, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the size (width, height); says so if that is another one."""
    if image.size == size:
        return image
    print(f"{path}: {image.width}x{image.height}, resized to {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling.LANCZOS)


def share(pictures: list[Tensor], count: int) -> Tensor | None:
    """One picture for all, or as many of each as it takes: (count, c, h, w). None if there are none."""
    if not pictures:
        return None
    found = torch.stack(pictures)
    if len(found) == 1:
        return found.expand(count, -1, -1, -1)
    return found.repeat_interleave(count // len(found), dim=0)
