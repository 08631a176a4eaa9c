"""Does a model repeat its training images? Two signs, for each prompt: images from several seeds are nearly
the same (Carlini et al. 2023, "Extracting Training Data from Diffusion Models", section 4), and the prompt
adds much to the noise prediction (Wen et al. 2024, "Detecting, Explaining, and Mitigating Memorization in
Diffusion Models", OpenReview 84n3UwkH7b).

    python docs/research/memorisation.py                      the small model
    python docs/research/memorisation.py "an astronaut" "a cat" --model v1-5-pruned-emaonly.safetensors

The first is the mean correlation of the images, the second the length of the difference, per latent, in the
mean over steps and seeds. The small model knows every thing from a few images: with eight prompts of such
things the correlation is 0.92 to 0.97, with eight that mean nothing to it 0.51 to 0.83. The lengths overlap
there, 0.06 to 0.09 and 0.07 to 0.09. Writes memorisation.png: for each prompt, the most alike first, images
from several seeds.
"""

import argparse

import numpy as np
import torch
from PIL import Image

import minisd
from minisd.data.images import labelled_rows
from minisd.options import TINY

KNOWN = "cat", "camel", "house", "penguin"
STRANGE = "quantum field theory", "an essay about taxes", "a blorp"
PROMPTS = *(f"3d emoji of a {word}" for word in KNOWN), *STRANGE


def magnitude(
    sd, prompt: str, *, seeds: int = 4, steps: int = 20, seed: int = 0, guidance_scale: float = 3.0
):
    """What a prompt adds to the noise prediction, and the images (seeds) that were drawn for it."""

    def length(seen) -> float:
        """Of the UNet's last layer, which gives the predictions: without the prompt, then with it."""
        empty, text = seen.output.float().chunk(2)  # (images, 4, h, w) each
        return (text - empty).square().mean(dim=(1, 2, 3)).sqrt().mean().item()

    flags = {"num_images": seeds, "batch_size": seeds, "steps": steps, "seed": seed, "scheduler": "ddim"}
    with sd.watch("conv_out", keep=length) as seen:
        images = sd.generate(prompt, guidance_scale=guidance_scale, **flags)
    return sum(s.value for s in seen) / len(seen), images


def alike(images: list[Image.Image]) -> float:
    """The mean correlation of the pixels of two images of a prompt."""
    pixels = torch.stack([torch.tensor(np.asarray(i.convert("L"), dtype=np.float32)) for i in images])
    correlation = torch.corrcoef(pixels.flatten(1))
    return ((correlation.sum() - len(images)) / (len(images) ** 2 - len(images))).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--steps", type=int, default=20)
    o = parser.parse_args()
    sd, rows = minisd.load(o.model), []
    for prompt in o.prompts:
        length, images = magnitude(sd, prompt, steps=o.steps)
        rows.append((alike(images), f"alike {alike(images):.2f}, adds {length:.3f}: {prompt}", images))
        print(rows[-1][1], flush=True)
    rows.sort(key=lambda row: -row[0])
    labelled_rows([row[1:] for row in rows]).save("memorisation.png")


if __name__ == "__main__":
    main()
