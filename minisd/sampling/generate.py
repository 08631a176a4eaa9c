"""Prompts to images: guidance, denoising, and the batches in which images are generated.

Classifier-free guidance is Ho and Salimans 2022 (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd import graph, ops, registry
from minisd.data import images
from minisd.models import controlnet
from minisd.models.layers import CachedContext
from minisd.noise import Philox, randn
from minisd.options import require
from minisd.sampling import prompt
from minisd.sampling.options import Settings
from minisd.sampling.prompt import Prompt
from minisd.schedulers._problem import InitImage, Problem, read_settings

if TYPE_CHECKING:
    from minisd.sampling.pixel_diffusion import PixelDiffusion
    from minisd.sampling.stable_diffusion import StableDiffusion

    Model = StableDiffusion | PixelDiffusion

Watch = Callable[[Tensor], None]  # is called with the predicted x_0 in each step
Images = Tensor | None  # (b, c, height, width)
ImagePrompt = Mapping[nn.Module, Tensor]  # of sampling/image_prompt.py
NO_IMAGE: ImagePrompt = {}


class Branch(NamedTuple):
    """A term of guidance's weighted sum of predictions: its weight, and the UNet's input for it."""

    weight: float
    context: Tensor  # (b, s, d)
    channels: Tensor | None = None  # (b, c, h, w), input channels behind those of x


@dataclass(kw_only=True)
class Control:
    """A ControlNet or T2I-Adapter, its conditioning images, its scale, and the steps in which it acts."""

    network: nn.Module
    hint: Tensor  # (b, 3, H, W) in [0, 1]
    scale: float = 1.0
    start: float = 0.0  # it acts between these fractions of the steps
    end: float = 1.0
    guess: bool = False  # only on the branch with the prompt, and on the coarse levels most

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in step `step` of `steps`."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


def text_branches(
    context: Tensor, negative: Tensor | None, guidance_scale: float, channels: Tensor | None = None
) -> list[Branch]:
    """pred = negative + scale (text - negative), as weights; without `negative` the text alone."""
    if negative is None:
        return [Branch(1.0, context, channels)]
    return [Branch(1 - guidance_scale, negative, channels), Branch(guidance_scale, context, channels)]


def image_branches(
    context: Tensor,
    negative: Tensor | None,
    channels: Tensor,
    guidance_scale: float,
    image_guidance_scale: float,
) -> list[Branch]:
    """pred = e(0, 0) + s_img (e(img, 0) - e(0, 0)) + s_txt (e(img, txt) - e(img, 0)), as weights (Brooks et
    al. 2022, arXiv 2211.09800, equation 3); with s_txt at most 1 or s_img below 1, e(img, txt) alone."""
    if guidance_scale <= 1 or image_guidance_scale < 1:
        return [Branch(1.0, context, channels)]
    return [
        Branch(1 - image_guidance_scale, negative, torch.zeros_like(channels)),
        Branch(image_guidance_scale - guidance_scale, negative, channels),
        Branch(guidance_scale, context, channels),
    ]


def branches_of(
    sd: Model, prompts: Sequence[Prompt], settings: Settings, init_images: Images, masks: Images
) -> list[Branch]:
    """The branches for this model, with the image and the mask if its UNet has channels for them. ValueError,
    naming the flag, if those are missing."""
    context, negative = prompt.contexts(sd, prompts, settings)
    scale, channels = settings.guidance_scale, None
    needs = f"{sd.name} takes {sd.unet.config.in_channels} channels: it needs"
    if sd.is_pix2pix or sd.is_inpainting:
        require(init_images is not None, f"{needs} a picture (--image)")
    if sd.is_pix2pix:
        original = sd.encode_original(init_images)  # (b, c, h, w)
        return image_branches(context, negative, original, scale, settings.image_guidance_scale or 1.5)
    if sd.is_inpainting:
        require(masks is not None, f"{needs} a mask of what to redraw (--mask)")
        outside = sd.encode_images(init_images * (1 - masks))[0]
        mask = F.interpolate(masks, outside.shape[-2:]).to(outside)  # (b, 1, h, w), the nearest pixel's
        channels = torch.cat([mask, outside], dim=1)  # (b, 1 + c, h, w)
    return text_branches(context, negative, scale, channels)


class Denoiser:
    """denoise(x, t): the weighted sum of all branches, computed in one batch. x and the result are fp32.

    The last branch is that with the prompt, and has the image of `image_prompt`; the others have none.
    ControlNets act on every branch, or with `guess` on the last one. The caller counts `step`, from 0 up to
    `steps`: the ControlNets' `start` and `end` refer to these.
    """

    def __init__(
        self,
        unet: nn.Module,
        branches: list[Branch],
        controls: Sequence[Control] = (),
        steps: int = 1,
        image_prompt: ImagePrompt = NO_IMAGE,
    ):
        self.unet = unet
        self.weights = [branch.weight for branch in branches]
        states = torch.cat([branch.context for branch in branches])  # (branches * b, s, d)
        last = len(branches[-1].context)
        rows = [1] * (len(states) - last) + [0] * last
        self.context = CachedContext(states, {to: both[rows] for to, both in image_prompt.items()}).fill(unet)
        channels = [branch.channels for branch in branches if branch.channels is not None]
        self.channels = torch.cat(channels) if channels else None  # (branches * b, c, h, w)
        self.controls = []  # each with its hints and contexts, (branches * b, ...) or, to guess, (b, ...)
        for control in controls:
            copies = 1 if control.guess else len(branches)
            hint = torch.cat([control.hint.to(states)] * copies)
            context = CachedContext(states[-len(hint) :]).fill(control.network)  # text comes last
            self.controls.append((replace(control, hint=control.network.prepare(hint)), context))
        self.step, self.steps = 0, steps

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if ops.watcher:
            ops.watcher.run = self.step, len(self.weights)
        inputs = torch.cat([x] * len(self.weights))
        if self.channels is not None:
            inputs = torch.cat([inputs, self.channels.to(inputs)], dim=1)  # (branches * b, c + more, h, w)
        inputs = inputs.to(self.context.states.dtype)
        timesteps = torch.full((len(inputs),), t, device=x.device)
        acting = [pair for pair in self.controls if pair[0].acts(self.step, self.steps)]
        networks = [self.unet, *(control.network for control, _ in acting)]
        (preds,) = graph.run(networks, self._predict, inputs, timesteps, self.context, acting)
        preds = preds.float().chunk(len(self.weights))
        return sum(weight * pred for weight, pred in zip(self.weights, preds, strict=True))

    def _predict(
        self,
        inputs: Tensor,
        timesteps: Tensor,
        context: CachedContext,
        controls: list[tuple[Control, CachedContext]],
    ) -> list[Tensor]:
        """The UNet's predictions for all branches, with the sum of the ControlNets' residuals."""
        residuals = []
        for control, text in controls:
            rows = slice(-len(text.states), None)
            seen = inputs[rows], timesteps[rows], text, control.hint
            residuals.append(control.network(*seen, control.scale, control.guess))
        residuals = controlnet.total(residuals, len(inputs)) if residuals else {}
        return [self.unet(inputs, timesteps, context, **residuals)]


def predict(
    sd: StableDiffusion, latents: Tensor, t: float, context: Tensor, negative: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The guided prediction (b, 4, h, w) for latents at timestep t, in fp32, with gradients if they are on.
    Contexts (b, s, d) are those of `sd.encode_text`; guidance needs the negative one."""
    require(guidance_scale <= 1 or negative is not None, "guidance needs the negative prompt's context")
    return Denoiser(sd.unet, text_branches(context, negative, guidance_scale))(latents, t)


def init_image(sd: Model, settings: Settings, init_images: Images, masks: Images) -> InitImage | None:
    """The scheduler's initial image, with its mask; None if the UNet takes the image and all is redrawn."""
    if init_images is None:
        return None
    keeps = masks is not None and not sd.is_inpainting  # inpainting models have learned to keep the rest
    if (sd.is_pix2pix or sd.is_inpainting) and settings.first_step == 0 and not keeps:
        return None
    latents = sd.encode_images(init_images)[0]  # (b, c, h, w)
    mask = F.interpolate(masks, latents.shape[-2:]) if keeps else None  # (b, 1, h, w)
    return InitImage(latents=latents, first_step=settings.first_step, mask=mask)


def configured(sd: Model, settings: Settings) -> tuple[ModuleType, dict[str, object]]:
    """The settings' scheduler, and its own settings: the model's, changed by the flags. ValueError, naming
    the flag, if it has no such setting, or if the size does not suit the model."""
    for side in ("width", "height"):
        if getattr(settings, side) % sd.downscale:
            raise ValueError(f"--{side} {getattr(settings, side)}: a positive multiple of {sd.downscale}")
    scheduler = registry.load("schedulers", settings.scheduler)
    flags = {name: getattr(settings, name) for name in ("eta", "use_karras_sigmas", "schedule_type")}
    flags = {name: value for name, value in flags.items() if value is not None}
    for name in [name for name in flags if name not in scheduler.SETTINGS]:
        raise ValueError(f"--{name} has no effect with --scheduler {settings.scheduler}")
    # Latents have no fixed range to be clipped to, even if the model's file says so.
    clipping = {} if sd.is_pixels else {"clip_sample": False}
    return scheduler, read_settings(scheduler, sd.scheduler | clipping | flags)


@torch.no_grad()
def denoise(
    sd: Model,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    settings: Settings,
    *,
    init_images: Tensor | None = None,
    masks: Tensor | None = None,
    noise: Tensor | None = None,
    controls: Sequence[Control] = (),
    image_prompt: ImagePrompt = NO_IMAGE,
    watch: Watch | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (b, 4, h, w), or a model's pixels, after each step. Image i depends on prompts[i] and
    seeds[i] alone: its noise comes from a CPU generator of its own, so that neither the device nor the batch
    changes it.

    `init_images` (b, 3, height, width) in [-1, 1] are the images to start from, or for instruct-pix2pix to
    edit; they are redrawn where `masks` (b, 1, height, width) are 1, and kept where they are 0. Each control
    has a hint for each image. `image_prompt`, for all images, is what `image_prompt.project` returns. `noise`
    (b, 4, h, w) replaces that of the seeds. `watch` is called with the predicted x_0 in each step. All
    prompts must name the same LoRAs.
    """

    def predict(x: Tensor, t: float) -> Tensor:
        pred = denoiser(x, t)
        if watch:
            alpha_cumprod = sd.schedule.alphas_cumprod[round(t)].to(x.device)
            watch(sd.schedule.split(pred, x, alpha_cumprod)[0])
        return pred

    scheduler, own = configured(sd, settings)
    prompts = prompt.prepare(sd, prompts, settings)
    with prompt.loras_on(sd, prompts[0].loras, settings.lora_dir):
        branches = branches_of(sd, prompts, settings, init_images, masks)
        start = init_image(sd, settings, init_images, masks)
        steps = settings.steps - (start.first_step if start else 0)
        denoiser = Denoiser(sd.unet, branches, controls, steps, image_prompt)
        seeded = Philox if settings.rng == "nv" else lambda seed: torch.Generator().manual_seed(seed)
        generators = [seeded(seed) for seed in seeds]
        height, width = settings.height // sd.downscale, settings.width // sd.downscale
        noise = randn((sd.channels, height, width), generators) if noise is None else noise
        given = {"schedule": sd.schedule, "steps": settings.steps, "generators": generators}
        problem = Problem(denoise=predict, noise=noise.to(sd.device), settings=own, init_image=start, **given)
        for x in scheduler.sample(problem):
            denoiser.step += 1
            yield x


@torch.no_grad()
def pictures(
    sd: Model,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    settings: Settings,
    *,
    batch_size: int = 4,
    init_images: Tensor | None = None,
    masks: Tensor | None = None,
    noise: Tensor | None = None,
    controls: Sequence[Control] = (),
    image_prompt: ImagePrompt = NO_IMAGE,
    on_step: Callable[[int], None] = lambda n: None,
    on_preview: Callable[[list[Image.Image]], None] | None = None,
    preview: int = 1,
) -> Iterator[Image.Image]:
    """Yield one image for each pair of prompt and seed. `init_images`, `masks`, `noise`, `controls` and
    `image_prompt` are as in `denoise`, all but the last with one for each image. `on_step(n)` is called after
    each step of a batch of n images, and `on_preview` with previews of them at every `preview`-th run of the
    network."""

    def show(predicted: Tensor) -> None:
        if next(runs) % preview == 0:
            on_preview([images.to_pil(p) for p in sd.decode(predicted)])

    prompts = prompt.prepare(sd, prompts, settings)
    inputs = {"init_images": init_images, "masks": masks, "noise": noise}
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    for part in batches(prompts, batch_size):
        runs = count(1)
        of_part = {name: tensor[part] for name, tensor in inputs.items()}
        of_part["controls"] = [replace(control, hint=control.hint[part]) for control in controls]
        of_part |= {"image_prompt": image_prompt, "watch": show if on_preview else None}
        for x in denoise(sd, prompts[part], seeds[part], settings, **of_part):
            on_step(len(x))
        for one in x:
            yield images.to_pil(sd.decode(one[None])[0])


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[slice]:
    """Yield the slices of `prompts` that can be drawn at once: at most `size` neighbours with the same LoRAs
    and contexts of the same length, so that no image depends on another."""
    start = 0
    for _, run in groupby(prompts, key=lambda prompt: (prompt.loras, len(prompt.chunks))):
        end = start + len(list(run))
        yield from (slice(first, min(first + size, end)) for first in range(start, end, size))
        start = end
