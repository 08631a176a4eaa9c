"""Measure how near a model's images are to the things of the data that their prompts name.

    python -m minisd.tiny.metrics --data DATA [--model MODEL] [--sheet sheet.png]

An image's features are its colours in 16x16 cells. The measure is simple, but an image that went through the
autoencoder is still nearest to itself. The rank of a thing is the number of other things of its style that
are nearer to the image; by chance half of them.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd import cli
from minisd.data import images
from minisd.options import TINY
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank
from minisd.tiny.data import STYLES, captions, plain, uncoloured
from minisd.tiny.pictures import GROUNDS, HUES, WHITE, on, recoloured

SETTINGS = Settings(width=64, height=64, steps=20, guidance_scale=3.0)


def features(drawn: list[Image.Image]) -> Tensor:
    """Return the mean colours, from 0 to 1, of 16x16 cells, (n, 768)."""
    pixels = torch.stack([images.to_tensor(image.convert("RGB")) for image in drawn])  # (n, 3, h, w)
    return F.adaptive_avg_pool2d((pixels + 1) / 2, 16).flatten(1)


@dataclass
class Things:
    """Every thing of the data once in every style: rows of metadata, and images with transparency."""

    rows: list[dict]
    pictures: list[Image.Image]

    @classmethod
    def load(cls, data: Path) -> "Things":
        """Load the bank of a folder that minisd.tiny.data wrote. ValueError if there is none."""
        path = data / "bank" / "metadata.jsonl"
        if not path.is_file():
            raise ValueError(f"--data: there is no {path}; python -m minisd.tiny.data writes it")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return cls(rows, [Image.open(data / "bank" / row["file_name"]).convert("RGBA") for row in rows])

    def find(self, name: str, style: str) -> int:
        """Return the index of a thing's image. ValueError if there is none."""
        for number, row in enumerate(self.rows):
            if (row["name"], row["style"]) == (name, style):
                return number
        raise ValueError(f"the bank has no {style} picture of {name!r}")

    def distances(self, drawn: list[Image.Image], ground: tuple[int, int, int] = WHITE) -> Tensor:
        """Return the distance of each image to each thing on a background, (n, size of the bank)."""
        return torch.cdist(features(drawn), features([on(picture, ground) for picture in self.pictures]))

    def ranks(self, distances: Tensor, numbers: list[int]) -> list[int]:
        """For each image i, return how many things of the same style are nearer than the thing numbers[i]."""
        ranks = []
        for row, number in zip(distances, numbers, strict=True):
            style = torch.tensor([r["style"] == self.rows[number]["style"] for r in self.rows])
            ranks.append(int((row[style] < row[number]).sum()))
        return ranks


def ground_of(image: Image.Image) -> tuple[int, ...]:
    """Return the median colour of an image's upper, left and right edges, 3 pixels wide."""
    pixels = images.to_tensor(image)
    edge = torch.cat(
        [part.flatten(1) for part in (pixels[:, :3], pixels[:, :, :3], pixels[:, :, -3:])], dim=1
    )
    return tuple(((edge.median(dim=1).values + 1) * 127.5).round().int().tolist())


def ground_name(image: Image.Image) -> str:
    """Return the name of the colour, white included, that is nearest to an image's background."""
    here = torch.tensor(ground_of(image))
    named = {"white": WHITE, **GROUNDS}
    return min(named, key=lambda name: (here - torch.tensor(named[name])).square().sum().item())


def draw(sd: StableDiffusion, prompts: list[str], seed: int) -> list[Image.Image]:
    """Draw an image for each prompt, the first with `seed`, the next with seed + 1 and so on."""
    return list(pictures(sd, prompts, range(seed, seed + len(prompts)), SETTINGS, batch_size=8))


def recall(
    sd: StableDiffusion, things: Things, numbers: list[int], seed: int
) -> tuple[dict, list[Image.Image]]:
    """Draw things by their captions. Return the shares of images that are nearest to the right thing among
    all of its style, that have it among the nearest 5, and that are nearer to it than to the same thing in
    the other style; the mean distance; the ranks; and the images."""
    drawn = draw(sd, [things.rows[n]["text"] for n in numbers], seed)
    distances = things.distances(drawn)
    ranks = things.ranks(distances, numbers)
    own = [row[n].item() for row, n in zip(distances, numbers, strict=True)]
    swap = dict(zip(STYLES, reversed(STYLES), strict=True))
    swapped = [things.find(things.rows[n]["name"], swap[things.rows[n]["style"]]) for n in numbers]
    other = [row[n].item() for row, n in zip(distances, swapped, strict=True)]
    count = len(numbers)
    return {
        "top1": sum(r == 0 for r in ranks) / count,
        "top5": sum(r < 5 for r in ranks) / count,
        "style": sum(a < b for a, b in zip(own, other, strict=True)) / count,
        "distance": sum(own) / count,
        "ranks": ranks,
    }, drawn


def hues(sd: StableDiffusion, things: Things, seed: int) -> tuple[float, list[Image.Image]]:
    """Draw 3d things in hues that were held out for them. Return the share of images that are nearer to the
    thing in that hue than to the thing as it is (0 for a model that ignores the hue), and the images."""
    known = {row["name"] for row in things.rows if row["seen"]}
    pairs = [(name, hue) for name, hue in bank.world()["held_out"]["hue"] if plain(name) in known]
    drawn = draw(sd, [captions("3d", f"{hue} {uncoloured(name)}")[0] for name, hue in pairs], seed)
    own = [things.pictures[things.find(plain(name), "3d")] for name, _ in pairs]
    other = [recoloured(picture, HUES[hue]) for picture, (_, hue) in zip(own, pairs, strict=True)]
    to_own, to_other = (
        (features(drawn) - features([on(picture) for picture in truth])).norm(dim=1) for truth in (own, other)
    )
    return (to_other < to_own).float().mean().item(), drawn


def evaluate(sd: StableDiffusion, things: Things, kinds: list[str], count: int = 32, seed: int = 11):
    """Return figures by name, and labelled rows of images: for things of the training data, for held-out
    combinations of thing and style and of thing and hue, and for backgrounds."""
    size = sum(row["style"] == STYLES[0] for row in things.rows)
    figures, rows = {"things of a style (chance is 1 in as many)": size}, []
    names = {r["name"] for r in things.rows if r["seen"]}
    pools: dict[str, list[int]] = {"seen": [], "held-out style": []}
    for i, row in enumerate(things.rows):
        if row["style"] in STYLES and (not kinds or row["kind"] in kinds) and row["name"] in names:
            pools["seen" if row["seen"] else "held-out style"].append(i)
    for label, pool in pools.items():
        numbers = random.Random(3).sample(pool, min(count, len(pool)))
        if not numbers:
            continue
        figures[label], drawn = recall(sd, things, numbers, seed)
        for start in range(0, min(16, len(numbers)), 8):
            part = numbers[start : start + 8]
            subjects = ", ".join(f"{things.rows[n]['style']} {things.rows[n]['name']}" for n in part)
            rows.append((f"data, {label}", [on(things.pictures[n]) for n in part]))
            rows.append((subjects, drawn[start : start + 8]))
    figures["right hue, held out"], drawn = hues(sd, things, seed)
    rows.append(("3d, in held-out hues", drawn[:8]))
    chance = random.Random(5)
    grounds = [list(GROUNDS)[i % len(GROUNDS)] for i in range(16)]
    shown = [things.rows[chance.choice(pools["seen"])] for _ in grounds]
    prompts = [captions(t["style"], t["name"], g)[0] for t, g in zip(shown, grounds, strict=True)]
    drawn = draw(sd, prompts, seed)
    right = sum(ground_name(image) == ground for image, ground in zip(drawn, grounds, strict=True))
    figures["right ground (chance is 1 in 9)"] = right / len(grounds)
    subjects = [f"{t['style']} {t['name']} on {g}" for t, g in zip(shown, grounds, strict=True)]
    rows.append((", ".join(subjects[:8]), drawn[:8]))
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.tiny.metrics", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder written by minisd.tiny.data")
    parser.add_argument("--model", type=Path, default=TINY, help="folder of the model; default: the tiny one")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="X", help="only things of these kinds")
    parser.add_argument("--sheet", type=Path, help="file for the drawn images and those of the data")
    o = parser.parse_args()
    things = Things.load(o.data)
    figures, rows = evaluate(StableDiffusion.load(o.model), things, o.kinds)
    for label, value in figures.items():
        shown = {k: v for k, v in value.items() if k != "ranks"} if isinstance(value, dict) else {"": value}
        print(f"{label}:", ", ".join(f"{k} {v:.3g}".strip() for k, v in shown.items()))
    if o.sheet:
        images.save_png(images.labelled_rows(rows, size=128), o.sheet)


if __name__ == "__main__":
    cli.run("minisd.tiny.metrics", main)
