"""Prompts to pictures."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd import registry
from minisd.data import images
from minisd.noise import NoiseSchedule, randn
from minisd.sampling import prompt
from minisd.sampling.guidance import Branch, Control, Denoiser, image_branches, text_branches
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.schedulers._problem import InitImage, Problem, read_settings


@dataclass(kw_only=True)
class Settings:
    """Everything about a picture but its prompt and its seed."""

    width: int
    height: int
    negative_prompt: str = ""
    scheduler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    eta: float | None = None  # what the scheduler says by default
    karras: bool | None = None  # what the model says by default
    image_guidance_scale: float = 1.5  # how far an edit stays with its original
    strength: float = 1.0  # the part of the steps that is taken, if there is a picture to begin with
    clip_skip: int = 1
    plain_prompt: bool = False  # the prompts are text, without A1111's syntax
    lora_dir: Path | None = None  # where the prompts' LoRAs lie

    @property
    def first_step(self) -> int:
        """So many steps are left out, if there is a picture to begin with."""
        return self.steps - int(self.steps * self.strength)


def branches_of(
    sd: StableDiffusion,
    context: Tensor,
    negative: Tensor | None,
    settings: Settings,
    originals: Tensor | None,
    masks: Tensor | None,
) -> list[Branch]:
    """What guides the model: the prompts (b, s, d), and the pictures too if its UNet has channels for them.
    ValueError, naming the flag, if those are missing."""
    taken, own = sd.unet.config.in_channels, sd.vae.config.latent_channels
    if taken > own and originals is None:
        raise ValueError(f"{sd.name} takes {taken} channels: it needs a picture (--image)")
    if taken == 2 * own:  # instruct-pix2pix
        scales = settings.guidance_scale, settings.image_guidance_scale
        return image_branches(context, negative, sd.encode_original(originals), *scales)
    seen = None
    if taken == 2 * own + 1:  # inpainting
        if masks is None:
            raise ValueError(f"{sd.name} takes {taken} channels: it needs a mask of what to redraw (--mask)")
        outside = sd.encode_images(originals * (1 - masks))[0]
        mask = F.interpolate(masks, outside.shape[-2:]).to(outside)  # (b, 1, h, w), the nearest pixel's
        seen = torch.cat([mask, outside], dim=1)  # (b, 1 + c, h, w)
    return text_branches(context, negative, settings.guidance_scale, seen)


def beginning(
    sd: StableDiffusion, settings: Settings, originals: Tensor | None, masks: Tensor | None
) -> InitImage | None:
    """What the scheduler begins with and keeps: nothing, if the model sees the picture and all is redrawn."""
    if originals is None:
        return None
    more = sd.unet.config.in_channels - sd.vae.config.latent_channels
    latents, mask = sd.encode_images(originals)[0], None
    if masks is not None and more != latents.shape[1] + 1:  # inpainting models have learned to keep the rest
        mask = F.interpolate(masks, latents.shape[-2:])
    if more and settings.first_step == 0 and mask is None:
        return None
    return InitImage(latents=latents, first_step=settings.first_step, mask=mask)


def denoise(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    originals: Tensor | None = None,
    masks: Tensor | None = None,
    controls: Sequence[Control] = (),
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """The latents (b, 4, h, w) after each step. Picture i depends on prompts[i] and seeds[i] alone: its noise
    comes from a CPU generator of its own, so that neither the device nor the batch changes it.

    `originals` (b, 3, height, width) in [-1, 1] are what to begin with, and what an instruct-pix2pix model
    edits; of them, only what is 1 in `masks` (b, 1, height, width), not 0, is redrawn. Each of `controls` has
    a hint for each picture. `watch` hears what latents the network sees behind the noise, each time it runs.
    """
    downscale = sd.vae.config.downscale
    for side in ("width", "height"):
        if getattr(settings, side) <= 0 or getattr(settings, side) % downscale:
            raise ValueError(f"--{side} {getattr(settings, side)}: a positive multiple of {downscale}")
    scheduler = registry.load("schedulers", settings.scheduler)
    # Clipping is for pixels; latents have no such range, whatever the file says.
    config = sd.scheduler | {"clip_sample": False}
    for flag, key in {"eta": "eta", "karras": "use_karras_sigmas"}.items():
        value = getattr(settings, flag)
        if value is not None and key not in scheduler.SETTINGS:
            raise ValueError(f"--{flag} has no meaning for --scheduler {settings.scheduler}")
        config |= {key: value} if value is not None else {}

    negative = settings.negative_prompt if settings.guidance_scale > 1 else None
    context, negative = prompt.contexts(
        sd, prompts, negative, clip_skip=settings.clip_skip, plain=settings.plain_prompt
    )
    branches = branches_of(sd, context, negative, settings, originals, masks)
    init_image = beginning(sd, settings, originals, masks)
    steps = settings.steps - (init_image.first_step if init_image else 0)
    denoiser = Denoiser(sd.unet, branches, controls, steps)
    seen = watched(denoiser, sd.schedule, watch) if watch else denoiser
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (sd.vae.config.latent_channels, settings.height // downscale, settings.width // downscale)
    noise = randn(shape, generators).to(sd.device)
    problem = Problem(
        denoise=seen,
        noise=noise,
        schedule=sd.schedule,
        steps=settings.steps,
        generators=generators,
        settings=read_settings(scheduler, config),
        init_image=init_image,
    )
    for x in scheduler.sample(problem):
        denoiser.step += 1
        yield x


def watched(denoiser: Denoiser, schedule: NoiseSchedule, watch: Callable[[Tensor], None]):
    """The denoiser, which tells `watch` what x_0 it comes to each time."""

    def denoise(x: Tensor, t: float) -> Tensor:
        pred = denoiser(x, t)
        watch(schedule.split(pred, x, schedule.alphas_cumprod[round(t)].to(x.device))[0])
        return pred

    return denoise


@torch.no_grad()
def pictures(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    batch_size: int = 4,
    originals: Tensor | None = None,
    masks: Tensor | None = None,
    controls: Sequence[Control] = (),
    on_step: Callable[[int], None] = lambda n: None,
    on_preview: Callable[[list[Image.Image]], None] | None = None,
    preview: int = 1,
) -> Iterator[Image.Image]:
    """One picture for each pair of prompt and seed; `on_step(n)` hears of every step that n pictures took,
    and `on_preview` gets what they are about to be, every `preview` runs of the network.
    `originals`, `masks` and `controls` are as in `denoise`, with one for each picture."""

    runs = itertools.count(1)

    def show(latents: Tensor) -> None:
        if next(runs) % preview == 0:
            on_preview([images.to_pil(p) for p in sd.decode(latents)])

    further = {"originals": originals, "masks": masks, "controls": controls}
    watch = show if on_preview else None
    for steps in drawing(sd, prompts, seeds, settings, batch_size=batch_size, watch=watch, **further):
        for x in steps:
            on_step(len(x))
        for latents in x:
            yield images.to_pil(sd.decode(latents[None])[0])


def drawing(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    batch_size: int,
    originals: Tensor | None = None,
    masks: Tensor | None = None,
    controls: Sequence[Control] = (),
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[Iterator[Tensor]]:
    """The batches in which these are drawn, each to be gone through before the next. As in `denoise`, with
    the LoRAs of the prompts."""
    if not settings.plain_prompt:
        prompt.attach_loras(sd, prompts, settings.lora_dir)
        if prompt.take_loras(settings.negative_prompt)[1]:
            raise ValueError("--negative_prompt has a <lora:...>: it acts on both, and belongs into --prompt")
    for part, texts, loras in batches(sd, prompts, settings, batch_size):
        further = {
            "originals": None if originals is None else originals[part],
            "masks": None if masks is None else masks[part],
            "controls": [replace(control, hint=control.hint[part]) for control in controls],
        }
        steps = denoise(sd, texts, seeds[part], settings, watch=watch, **further)
        yield with_loras(sd, loras, settings.lora_dir, steps)


def with_loras(
    sd: StableDiffusion, loras: dict[str, tuple[float, float]], folder: Path | None, steps: Iterator[Tensor]
) -> Iterator[Tensor]:
    """The steps, gone through with a prompt's LoRAs on."""
    with prompt.loras_on(sd, loras, folder):
        yield from steps


def batches(
    sd: StableDiffusion, prompts: list[str], settings: Settings, size: int
) -> Iterator[tuple[slice, list[str], dict[str, tuple[float, float]]]]:
    """Which pictures can be drawn at once: at most `size` neighbours with the same LoRAs and contexts of the
    same length, so that none depends on another. With each batch its prompts without the LoRAs, and these."""
    plain = settings.plain_prompt
    taken = [(p, {}) if plain else prompt.take_loras(p) for p in prompts]

    def alike(i: int) -> tuple:
        text, loras = taken[i]
        return loras, len(prompt.chunks(sd.tokenizer, text, plain))

    for (loras, _), run in groupby(range(len(prompts)), key=alike):
        numbers = list(run)
        for start in range(numbers[0], numbers[-1] + 1, size):
            part = slice(start, min(start + size, numbers[-1] + 1))
            yield part, [text for text, _ in taken[part]], loras
