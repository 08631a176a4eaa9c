"""Prompts to pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd import registry
from minisd.data import images
from minisd.guidance import Branch, Control, Denoiser, image_branches, text_branches
from minisd.noise import Original, randn, settings_for
from minisd.stable_diffusion import StableDiffusion


@dataclass(kw_only=True)
class Settings:
    """Everything about a picture but its prompt and its seed."""

    width: int
    height: int
    negative_prompt: str = ""
    scheduler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    eta: float | None = None
    image_guidance_scale: float = 1.5  # how far an edit stays with its original
    strength: float = 1.0  # the part of the steps that is taken, if there is a picture to begin with

    @property
    def first_step(self) -> int:
        """So many steps are left out, if there is a picture to begin with."""
        return self.steps - int(self.steps * self.strength)


def infotext(sd: StableDiffusion, prompt: str, seed: int, settings: Settings) -> str:
    """How a picture was made, as the text that A1111 puts into its PNG files."""
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    fields = {
        "Steps": settings.steps,
        "Sampler": settings.scheduler.upper(),
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": sd.name,
        **({"Eta": f"{settings.eta:g}"} if settings.eta is not None else {}),
        "Version": "minisd",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in fields.items())])


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
) -> Original | None:
    """What the scheduler begins with and keeps: nothing, if the model sees the picture and all is redrawn."""
    if originals is None:
        return None
    more = sd.unet.config.in_channels - sd.vae.config.latent_channels
    latents, mask = sd.encode_images(originals)[0], None
    if masks is not None and more != latents.shape[1] + 1:  # inpainting models have learned to keep the rest
        mask = F.interpolate(masks, latents.shape[-2:])
    if more and settings.first_step == 0 and mask is None:
        return None
    return Original(latents=latents, start=settings.first_step, mask=mask)


def denoise(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    originals: Tensor | None = None,
    masks: Tensor | None = None,
    controls: Sequence[Control] = (),
) -> Iterator[Tensor]:
    """The latents (b, 4, h, w) after each step. Picture i depends on prompts[i] and seeds[i] alone: its noise
    comes from a CPU generator of its own, so that neither the device nor the batch changes it.

    `originals` (b, 3, height, width) in [-1, 1] are what to begin with, and what an instruct-pix2pix model
    edits; of them, only what is 1 in `masks` (b, 1, height, width), not 0, is redrawn. Each of `controls` has
    a hint for each picture."""
    downscale = sd.vae.config.downscale
    for side in ("width", "height"):
        if getattr(settings, side) <= 0 or getattr(settings, side) % downscale:
            raise ValueError(f"--{side} {getattr(settings, side)}: a positive multiple of {downscale}")
    sample = registry.load("schedulers", settings.scheduler).sample
    # Clipping is for pixels; latents have no such range, whatever the file says.
    options = settings_for(sample, sd.scheduler | {"clip_sample": False})
    if settings.eta is not None:
        if not settings_for(sample, {"eta": settings.eta}):
            raise ValueError(f"--eta has no meaning for --scheduler {settings.scheduler}")
        options["eta"] = settings.eta

    context = sd.encode_text(prompts)
    guided = settings.guidance_scale > 1
    negative = sd.encode_text([settings.negative_prompt] * len(prompts)) if guided else None
    branches = branches_of(sd, context, negative, settings, originals, masks)
    original = beginning(sd, settings, originals, masks)
    steps = settings.steps - (original.start if original else 0)
    denoiser = Denoiser(sd.unet, branches, controls, steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (sd.vae.config.latent_channels, settings.height // downscale, settings.width // downscale)
    noise = randn(shape, generators).to(sd.device)
    for x in sample(denoiser, noise, sd.schedule, settings.steps, generators, original=original, **options):
        denoiser.step += 1
        yield x


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
) -> Iterator[Image.Image]:
    """One picture for each pair of prompt and seed; `on_step(n)` hears of every step that n pictures took.
    `originals`, `masks` and `controls` are as in `denoise`, with one for each picture."""
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        further = {
            "originals": None if originals is None else originals[part],
            "masks": None if masks is None else masks[part],
            "controls": [replace(control, hint=control.hint[part]) for control in controls],
        }
        for x in denoise(sd, prompts[part], seeds[part], settings, **further):
            on_step(len(x))
        for latents in x:
            yield images.to_pil(sd.decode(latents[None])[0])
