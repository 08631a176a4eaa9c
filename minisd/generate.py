"""Prompts to pictures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from minisd import registry
from minisd.data import images
from minisd.guidance import Control, Denoiser, image_branches, text_branches
from minisd.noise import randn, settings_for
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


def denoise(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    originals: Tensor | None = None,
    control: Control | None = None,
) -> Iterator[Tensor]:
    """The latents (b, 4, h, w) after each step. Picture i depends on prompts[i] and seeds[i] alone: its noise
    comes from a CPU generator of its own, so that neither the device nor the batch changes it. An
    instruct-pix2pix model edits `originals` (b, 3, height, width) in [-1, 1]; `control` has its own picture
    for each of these."""
    downscale = sd.vae.config.downscale
    for side in ("width", "height"):
        if getattr(settings, side) <= 0 or getattr(settings, side) % downscale:
            raise ValueError(f"--{side} {getattr(settings, side)}: a positive multiple of {downscale}")
    taken, given = sd.unet.config.in_channels, sd.vae.config.latent_channels * (1 + (originals is not None))
    if taken != given:
        needs = "it needs a picture" if taken > given else "it cannot edit a picture"
        raise ValueError(f"{sd.name} takes {taken} channels: {needs}")
    sample = registry.load("schedulers", settings.scheduler).sample
    # Clipping is for pixels; latents have no such range, whatever the file says.
    options = settings_for(sample, sd.scheduler) | {"clip_sample": False}
    if settings.eta is not None:
        if not settings_for(sample, {"eta": settings.eta}):
            raise ValueError(f"--eta has no meaning for --scheduler {settings.scheduler}")
        options["eta"] = settings.eta

    context = sd.encode_text(prompts)
    guided = settings.guidance_scale > 1
    negative = sd.encode_text([settings.negative_prompt] * len(prompts)) if guided else None
    if originals is None:
        branches = text_branches(context, negative, settings.guidance_scale)
    else:
        scales = settings.guidance_scale, settings.image_guidance_scale
        branches = image_branches(context, negative, sd.encode_original(originals), *scales)
    denoiser = Denoiser(sd.unet, branches, control)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (sd.vae.config.latent_channels, settings.height // downscale, settings.width // downscale)
    x = randn(shape, generators).to(sd.device)
    yield from sample(denoiser, x, sd.schedule, settings.steps, generators, **options)


@torch.no_grad()
def pictures(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    settings: Settings,
    *,
    batch_size: int = 4,
    originals: Tensor | None = None,
    control: Control | None = None,
    on_step: Callable[[int], None] = lambda n: None,
) -> Iterator[Image.Image]:
    """One picture for each pair of prompt and seed; `on_step(n)` hears of every step that n pictures took.
    `originals` and the hint of `control` are as in `denoise`, one for each picture."""
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        further = {
            "originals": None if originals is None else originals[part],
            "control": control and replace(control, hint=control.hint[part]),
        }
        for x in denoise(sd, prompts[part], seeds[part], settings, **further):
            on_step(len(x))
        for latents in x:
            yield images.to_pil(sd.decode(latents[None])[0])
