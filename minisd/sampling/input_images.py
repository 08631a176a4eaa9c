"""The input images of a drawing: opened, brought to one size, and shared out among the pictures."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.data.canny import canny
from minisd.sampling.generate import Control
from minisd.sampling.options import Drawing, split_scale
from minisd.sampling.stable_diffusion import StableDiffusion

PREPROCESS = {"canny": canny, "none": lambda image: image}
MULTIPLE = 8  # the sides of a picture are multiples of it, in pixels


class InputImages:
    """The images that --image, --mask and --control_image name, opened once, before the model is read. A
    ValueError, here and below, names the flag or the file."""

    def __init__(self, options: Drawing):
        self.options = options
        self.images = [(path, opened(path)) for path in listed(options.image)]
        self.masks = [(path, opened(path, behind="black")) for path in listed(options.mask)]
        self.hints = [(path, opened(path)) for path in options.control_image]

    def prompts(self, prompts: list[str]) -> list[str]:
        """One for each picture to draw: a single prompt goes with all of --image."""
        if len(prompts) == 1:
            prompts = prompts * max(1, len(self.images))
        for name, files in (("image", self.images), ("mask", self.masks)):
            if len(files) not in (0, 1, len(prompts)):
                raise ValueError(
                    f"{len(files)} --{name} for {len(prompts)} pictures: give one, or one for each"
                )
        return prompts

    def complete(self, settings: Drawing, sd: StableDiffusion) -> None:
        """Set the size and the strength, if they are not given, by the images and the model."""
        path, image = (self.images + self.hints)[0]
        width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
        if not (width and height):
            raise ValueError(f"{path} has a side of less than {MULTIPLE} pixels")
        if settings.image_guidance_scale is not None and not sd.is_pix2pix:
            raise ValueError(f"--image_guidance_scale has no effect: {sd.name} is no instruct-pix2pix model")
        settings.width, settings.height = settings.width or width, settings.height or height
        if self.images and not (self.masks or sd.is_pix2pix or sd.is_inpainting):
            settings.strength = settings.strength or 0.8

    def tensors(self, sd: StableDiffusion, settings: Drawing, count: int) -> dict:
        """The images as `generate.pictures` takes them, for `count` pictures to draw."""
        size = settings.width, settings.height
        masks = []
        for path, image in self.masks:
            mask = torch.from_numpy(np.asarray(fit(path, image.convert("L"), size)) >= 128).float()[None]
            if not F.max_pool2d(mask, 1, sd.downscale).any():
                raise ValueError(f"--mask {path}: nothing in it is white, or too little to redraw")
            masks.append(mask)  # (1, h, w)
        return {
            "init_images": share([images.to_tensor(fit(*image, size)) for image in self.images], count),
            "masks": share(masks, count),
            "controls": self._controls(sd, settings, count),
        }

    def of(self, number: int, count: int) -> dict[str, list[Path]]:
        """The files that picture `number` of `count` has of --image and --mask."""
        given = {"image": self.images, "mask": self.masks}
        return {name: [files[number * len(files) // count][0]] for name, files in given.items() if files}

    def _controls(self, sd: StableDiffusion, settings: Drawing, count: int) -> list[Control]:
        o, controls = self.options, []
        steps = settings.steps - settings.first_step
        for name, (path, image), (preprocess, start, end) in zip(
            o.controlnet, self.hints, o.control_ranges(), strict=True
        ):
            source, scale = split_scale(name)
            network = sd.controlnet(source)
            image = PREPROCESS[preprocess](fit(path, image, (settings.width, settings.height)))
            hint = share([images.to_tensor(image) / 2 + 0.5], count)
            control = Control(
                network=network, hint=hint, scale=scale, start=start, end=end, guess=o.guess_mode
            )
            if not any(control.acts(step, steps) for step in range(steps)):
                raise ValueError(
                    f"--control_start {start:g} to --control_end {end:g} has none of the {steps} steps in it"
                )
            controls.append(control)
        return controls


def opened(file: Path | Image.Image, **options) -> Image.Image:
    """The image in a file, or one that is open already."""
    return file.convert("RGB") if isinstance(file, Image.Image) else images.open_image(file, **options)


def listed(paths: list[Path]) -> list[Path]:
    """Files as they are, and for a folder the images in it."""
    files = []
    for path in paths:
        inside = images.list_images(path) if isinstance(path, Path) and path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no pictures")
        files += inside
    return files


def fit(path: Path, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the size (width, height); says so if that is another one."""
    if image.size == size:
        return image
    print(f"{path}: {image.width}x{image.height}, resized to {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling.LANCZOS)


def share(tensors: list[Tensor], count: int) -> Tensor | None:
    """One image for all, or each for its share of the pictures: (count, c, h, w). None if there are none."""
    if not tensors:
        return None
    return torch.stack(tensors).repeat_interleave(count // len(tensors), dim=0)
