"""Does a model repeat its training images? The magnitude of the text-conditional noise prediction (Wen et al.
2024, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", OpenReview 84n3UwkH7b).

    python docs/research/memorisation.py                      the small model, overfitted on four images first
    python docs/research/memorisation.py "an astronaut" "a cat" --model v1-5-pruned-emaonly.safetensors

The score of a prompt is the length of what it adds to the noise prediction without a prompt, per latent, in
the mean over steps and seeds: a memorised prompt pulls towards one image from every seed, and so harder.
On the small model that does not show: after 80 updates on four images alone their scores were 0.06 to 0.12,
those of other prompts 0.10 to 0.13. The prediction without a prompt may have learned the images, too.
Writes memorisation.png: for each prompt, the highest score first, images from several seeds.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import minisd
from minisd.data.images import labelled_rows

WORDS = "cat", "dog", "fish", "mushroom"
OTHERS = "camel", "house", "penguin", "red apple"


def magnitude(
    sd, prompt: str, *, seeds: int = 4, steps: int = 20, seed: int = 0, guidance_scale: float = 3.0
):
    """The score of a prompt, and the images (seeds) that were drawn for it."""

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


def write_images(folder: Path) -> list[str]:
    """Write four images of nothing in particular. Returns their captions."""
    chance, rows = random.Random(0), []
    for word in WORDS:
        image = Image.new("RGB", (64, 64), tuple(chance.choices(range(256), k=3)))
        for _ in range(6):
            x, y = chance.choices(range(48), k=2)
            box, colour = (
                (x, y, x + chance.randint(8, 30), y + chance.randint(8, 30)),
                chance.choices(range(256), k=3),
            )
            ImageDraw.Draw(image).rectangle(box, fill=tuple(colour))
        image.save(folder / f"{word}.png")
        rows.append({"file_name": f"{word}.png", "text": f"3d emoji of a {word}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [row["text"] for row in rows]


def overfit(folder: Path, updates: int = 200) -> tuple[Path, list[str]]:
    """A model that knows four images by heart, and their captions."""
    (folder / "images").mkdir()
    captions = write_images(folder / "images")
    flags = {"max_train_steps": updates, "train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none"}
    run = minisd.train("text_to_image", data=folder / "images", output_dir=folder / "model", **flags)
    return run.path, captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="*", default=[f"3d emoji of a {word}" for word in WORDS + OTHERS])
    parser.add_argument("--model", help="by default the small one, overfitted")
    parser.add_argument("--updates", type=int, default=200, help="of overfitting")
    parser.add_argument("--steps", type=int, default=20)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, captions = (o.model, []) if o.model else overfit(Path(folder), o.updates)
        sd, rows = minisd.load(path), []
        for prompt in o.prompts:
            score, images = magnitude(sd, prompt, steps=o.steps)
            known = "trained on" if prompt in captions else ""
            rows.append((score, prompt, images))
            print(f"{score:.3f}  images alike {alike(images):.2f}  {prompt}  {known}", flush=True)
    rows.sort(key=lambda row: -row[0])
    labelled_rows([(f"{score:.3f} {prompt}", images) for score, prompt, images in rows]).save(
        "memorisation.png"
    )


if __name__ == "__main__":
    main()
