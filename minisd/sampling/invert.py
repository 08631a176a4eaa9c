"""The noise from which DDIM draws a given image."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.sampling import generate, prompt
from minisd.sampling.options import Settings
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.schedulers import ddim
from minisd.schedulers._problem import Problem


@torch.no_grad()
def invert(
    sd: StableDiffusion,
    image: Image.Image | Tensor,
    text: str = "",
    *,
    iterations: int = 1,
    on_step: Callable[[int], None] = lambda n: None,
    **settings,
) -> Tensor:
    """Return x_T (1, 4, h, w), from which `sd.generate(text, noise=x_T, scheduler="ddim", **settings)` draws
    the image again, given as an image or as latents (1, 4, h, w). `iterations` is that of `ddim.invert`: more
    of them are nearer and take as many times longer. `settings` are flags such as `steps` and
    `guidance_scale`, by default 1: guidance makes the way back less exact."""
    latents = image
    if not isinstance(image, Tensor):
        latents = sd.encode_images(images.to_tensor(image.convert("RGB"))[None])[0]  # (1, 4, h, w)
    height, width = (side * sd.downscale for side in latents.shape[-2:])
    options = Settings(**{"guidance_scale": 1.0} | settings, height=height, width=width)
    _, known = generate.configured(sd, options)
    prompts = prompt.prepare(sd, [text], options)
    with prompt.loras_on(sd, prompts[0].loras, options.lora_dir):
        denoiser = generate.Denoiser(sd.unet, generate.branches_of(sd, prompts, options, None, None))
        given = {"schedule": sd.schedule, "steps": options.steps, "generators": [], "settings": known}
        for x in ddim.invert(Problem(denoise=denoiser, noise=latents, **given), iterations):  # noqa: B007
            on_step(1)
    return x
