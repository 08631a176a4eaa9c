"""minisd: Stable Diffusion v1.x, small enough to read.

import minisd

sd = minisd.load("v1-5-pruned-emaonly.safetensors")
sd.attach("text-inversion-model")
images = minisd.generate(sd, "a photo of a <cat>", steps=20, seed=0)
"""


def load(model, **options):
    """The model in a folder, file or hub id, on the GPU if there is one: see StableDiffusion.load."""
    import torch

    from minisd.stable_diffusion import StableDiffusion

    options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    return StableDiffusion.load(model, **options)


def generate(sd, prompt: str | list[str], *, seed: int = 0, width=None, height=None, **settings) -> list:
    """One picture for each prompt, with seeds from `seed` on; `settings` are those of generate.Settings."""
    from minisd.generate import Settings, pictures

    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    settings = Settings(width=width or sd.default_size, height=height or sd.default_size, **settings)
    return list(pictures(sd, prompts, [seed + i for i in range(len(prompts))], settings))
