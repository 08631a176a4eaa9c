"""Input images: opened, resized, and assigned to the images to generate."""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.data.canny import canny
from minisd.models.controlnet import ControlNet
from minisd.options import require
from minisd.sampling.generate import Control
from minisd.sampling.options import Drawing, split_scale
from minisd.sampling.stable_diffusion import StableDiffusion

PREPROCESS = {"canny": canny, "none": lambda image: image}
LARGE = 4  # times the area of a training image; what is larger is not drawn at its own size unasked
MULTIPLE = 8  # the sides of a generated image are multiples of it, in pixels


class InputImages:
    """The images of --image, --mask and --control_image, opened before the model is loaded. A ValueError from
    any of the methods names the flag or the file."""

    def __init__(self, options: Drawing):
        read = functools.partial(opened, max_pixels=options.max_pixels)
        self.images = [(path, read(path)) for path in listed(options.image)]
        self.masks = [(path, read(path, behind="black")) for path in listed(options.mask)]
        self.hints = [(path, read(path)) for path in options.control_image]

    def prompts(self, prompts: list[str]) -> list[str]:
        """The prompts, one for each image: a single prompt is repeated for all of --image."""
        if len(prompts) == 1:
            prompts = prompts * max(1, len(self.images))
        for name, files in (("image", self.images), ("mask", self.masks)):
            problem = f"{len(files)} --{name} for {len(prompts)} pictures: give one, or one for each"
            require(len(files) in (0, 1, len(prompts)), problem)
        return prompts

    def complete(self, settings: Drawing, sd: StableDiffusion) -> None:
        """Set the size and the strength, unless given, from the images and the model: the size of the first
        image, or if that is much larger than the model's, the model's area in the image's shape."""
        path, image = (self.images + self.hints)[0]
        area, own = image.width * image.height, sd.default_size**2
        large = area > LARGE * own and not (settings.width or settings.height)
        scale = (own / area) ** 0.5 if large else 1.0
        width, height = (int(side * scale) // MULTIPLE * MULTIPLE for side in image.size)
        require(width and height, f"{path} has a side of less than {MULTIPLE} pixels")
        problem = f"--image_guidance_scale has no effect: {sd.name} is no instruct-pix2pix model"
        require(settings.image_guidance_scale is None or sd.is_pix2pix, problem)
        settings.width, settings.height = settings.width or width, settings.height or height
        if self.images and not (self.masks or sd.is_pix2pix or sd.is_inpainting):
            settings.strength = settings.strength or 0.8

    def tensors(self, sd: StableDiffusion, settings: Drawing, count: int) -> dict:
        """The images as keywords of `generate.pictures`, for `count` images to generate."""
        size = settings.width, settings.height
        masks = []
        for path, image in self.masks:
            mask = torch.from_numpy(np.asarray(fit(path, image.convert("L"), size)) >= 128).float()[None]
            redrawn = F.max_pool2d(mask, 1, sd.downscale).any()  # the pixels that the latents sample
            require(redrawn, f"--mask {path}: nothing in it is white, or too little to redraw")
            masks.append(mask)  # (1, h, w)
        return {
            "init_images": share([images.to_tensor(fit(*image, size)) for image in self.images], count),
            "masks": share(masks, count),
            "controls": self._controls(sd, settings, count),
        }

    def of(self, number: int, count: int) -> dict[str, list[Path]]:
        """The files of --image and --mask for image `number` of `count`."""
        inputs = {"image": self.images, "mask": self.masks}
        return {name: [files[number * len(files) // count][0]] for name, files in inputs.items() if files}

    def _controls(self, sd: StableDiffusion, settings: Drawing, count: int) -> list[Control]:
        controls, steps = [], settings.steps - settings.first_step
        ranges = settings.control_ranges()
        for name, file, (preprocess, start, end) in zip(settings.controlnet, self.hints, ranges, strict=True):
            source, scale = split_scale(name)
            image = PREPROCESS[preprocess](fit(*file, (settings.width, settings.height)))
            hint = share([images.to_tensor(image) / 2 + 0.5], count)
            acting = {"scale": scale, "start": start, "end": end, "guess": settings.guess_mode}
            control = Control(network=sd.controlnet(source), hint=hint, **acting)
            guesses = not settings.guess_mode or isinstance(control.network, ControlNet)
            require(guesses, f"--guess_mode is for ControlNets, and {source} is a T2I-Adapter")
            problem = f"--control_start {start:g} to --control_end {end:g} has none of the {steps} steps"
            require(any(control.acts(step, steps) for step in range(steps)), problem)
            controls.append(control)
        return controls


def opened(file: Path | Image.Image, **options) -> Image.Image:
    """The image in a file; a PIL image as it is, in RGB."""
    return file.convert("RGB") if isinstance(file, Image.Image) else images.open_image(file, **options)


def listed(paths: list[Path]) -> list[Path]:
    """The files, with the images in a folder instead of the folder."""
    files = []
    for path in paths:
        inside = images.list_images(path) if isinstance(path, Path) and path.is_dir() else [path]
        require(inside, f"{path} holds no pictures")
        files += inside
    return files


def fit(path: Path, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the size (width, height); prints both sizes if it is resized."""
    if image.size == size:
        return image
    resized = f"resized to {size[0]}x{size[1]} (--width and --height choose)"
    print(f"{path}: {image.width}x{image.height}, {resized}", file=sys.stderr)
    return image.resize(size, Image.Resampling.LANCZOS)


def share(tensors: list[Tensor], count: int) -> Tensor | None:
    """Repeat each tensor (c, h, w) equally often: (count, c, h, w). None if there are none."""
    return torch.stack(tensors).repeat_interleave(count // len(tensors), dim=0) if tensors else None
