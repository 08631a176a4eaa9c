"""One method's training by the judge, and its measurements."""

import contextlib
import functools
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from minisd import cli, registry
from minisd.data import images
from minisd.device import precision
from minisd.options import TINY
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank, measures
from minisd.tiny.data import Folder, captions, five, plain
from minisd.tiny.metrics import features
from minisd.tiny.pictures import GROUNDS, SIDE, WHITE, on, recoloured
from minisd.training import loop
from minisd.training.distributed import device
from minisd.training.run_folder import RunFolder

# How a concept is drawn: as in its training images, on another background, in another style.
PLACES = {"own ground": ("3d", ""), "new ground": ("3d", "blue"), "other style": ("flat", "")}
# Things that training a concept should leave as they are.
OTHERS = ("cat", "house", "mushroom", "fish")


@functools.cache
def defaults() -> dict[str, dict]:
    """Return the flags that suit the tiny model, by method; "sample" has those of sample.py."""
    return json.loads((TINY / "defaults.json").read_text())


@dataclass(frozen=True)
class Measure:
    """One line of the table: passed if `after` is at most `need`, or if `more`, at least `need`."""

    name: str
    before: float
    chance: float
    after: float
    need: float
    more: bool = False

    @property
    def passed(self) -> bool:
        return self.after >= self.need if self.more else self.after <= self.need


@dataclass(frozen=True)
class Thing:
    """A thing of the bank, in another hue (degrees) if one is given."""

    name: str
    hue: float | None = None

    def recolour(self, image: Image.Image) -> Image.Image:
        return image if self.hue is None else recoloured(image, self.hue)


class Trial:
    """Trains one method in `folder` and collects its measures; with `shuffled`, on other rows' images."""

    def __init__(self, method: str, model: Path, folder: Path, flags: list[str], shuffled: bool):
        self.method, self.path, self.folder, self.flags = method, model, folder, flags
        self.shuffled = shuffled
        self.bank = bank.read()
        self.measures: list[Measure] = []
        self.rows: list[tuple[str, list[Image.Image]]] = []
        self.training = 0.0  # seconds
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    # Training and drawing

    def write(self, name: str, rows: list[dict]) -> Path:
        """Write a folder for train.py; each row has images and texts by column."""
        folder = Folder(self.folder / name)
        for i, row in enumerate(rows):
            drawn = {k: v for k, v in row.items() if isinstance(v, Image.Image)}
            texts = {k: v for k, v in row.items() if k not in drawn}
            if self.shuffled:  # the image to be drawn is another row's
                target = "edited_image" if "edited_image" in drawn else ""
                drawn[target] = rows[(i + len(rows) // 3) % len(rows)][target]
            folder.add(drawn, **texts)
        folder.close()
        return folder.path

    def train(self, **flags) -> Path:
        """Run train.py's code and return the folder of the result. Its output goes to train.log."""
        out = self.folder / "result"
        common = {"output_dir": out, "report_to": "none", "checkpointing_steps": 0}
        flags = defaults().get(self.method, {}) | common | flags
        argv = ["--method", self.method]
        for name, value in flags.items():
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
        _, options = cli.parse_train(argv + self.flags)
        started = time.monotonic()
        with (self.folder / "train.log").open("w") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                training = registry.load_class("methods", self.method)(options, device())
                status = loop.train(training, RunFolder(self.method, options))
        self.training += time.monotonic() - started
        if status:
            sys.exit(status)
        return out

    def train_model(self, **flags) -> Path:
        """Run `train` for a method that starts from the model."""
        return self.train(model=self.path, num_validation_images=1, **flags)

    def load(self, path: Path | None = None) -> StableDiffusion:
        return StableDiffusion.load(path or self.path, dtype=precision("auto", torch.device("cpu")))

    def draw(self, sd: StableDiffusion, prompts: list[str], seed: int = 0, sampling: dict | None = None,
             **further) -> list[Image.Image]:  # fmt: skip
        """Draw an image for each prompt, with the seeds from `seed` on; `sampling` overrides the defaults."""
        settings = Settings(width=SIDE, height=SIDE, **defaults()["sample"] | (sampling or {}))
        seeds = range(seed, seed + len(prompts))
        return list(pictures(sd, prompts, seeds, settings, batch_size=8, **further))

    def measure(self, name: str, before, chance, after, need, more: bool = False) -> None:
        self.measures.append(Measure(name, *map(float, (before, chance, after, need)), more))

    # Concepts

    def shown(self, thing: Thing, style: str = "3d", ground: str = "") -> Image.Image:
        return on(thing.recolour(self.bank[thing.name, style]), GROUNDS.get(ground, WHITE))

    def concept(self, thing: Thing, word: str) -> Path:
        """Write five images of it on several backgrounds, with captions that call it `word`."""
        shown = five(thing.recolour(self.bank[thing.name, "3d"]))
        rows = [{"": picture, "text": text.replace("{}", word)} for picture, text in shown]
        self.rows.append((f"{word} is", [row[""] for row in rows]))
        return self.write(thing.name, rows)

    def lineup(self, tile: Image.Image, name: str, style: str = "3d", ground: str = "") -> measures.Lineup:
        """Return what tells `tile`, the thing `name`, from all other things of the style."""
        others = [self.bank[n, style] for n in bank.names() if n != name]
        return measures.Lineup(tile, others, GROUNDS.get(ground, WHITE))

    def learned(self, thing: Thing, old: StableDiffusion, old_word: str, new: StableDiffusion, word: str,
                need: tuple[float, ...], shown: tuple[float, ...] = (0.75, 0.75, 0.75)) -> None:  # fmt: skip
        """Measure how near images of `word` are to the thing, and those of `old_word` before, among all other
        things of the style, also in the thing's hue, and which share shows it. `need` has the limit on the
        rank for each of PLACES, `shown` that on the share, 0 where it is not measured."""
        for (place, (style, ground)), limit, share in zip(PLACES.items(), need, shown, strict=True):
            target = self.shown(thing, style, ground)
            names = [n for n in bank.names() if n != thing.name]
            others = [self.shown(Thing(n, h), style, ground) for n in names for h in {None, thing.hue}]
            others += [self.shown(Thing(thing.name), style, ground)] if thing.hue is not None else []
            before, after = (
                self.draw(sd, [called(style, w, ground)] * 4) for sd, w in ((old, old_word), (new, word))
            )
            ranks = [measures.rank(drawn, target, others) for drawn in (before, after)]
            self.measure(f"{word}, {place}: rank", ranks[0], len(others) / 2, ranks[1], limit)
            near = [measures.distance(drawn, [target] * 4).mean() for drawn in (before, after)]
            chance = measures.distance(others, [target] * len(others)).mean()
            self.measure(f"{word}, {place}: distance", near[0], chance, near[1], 0.85 * near[0])
            if share:
                lineup = self.lineup(thing.recolour(self.bank[thing.name, style]), thing.name, style, ground)
                seen = [lineup.recognised(d).float().mean() for d in (before, after)]
                self.measure(f"{word}, {place}: share that shows it", seen[0], 0, seen[1], share, more=True)
            self.rows += [
                (f"before: {called(style, old_word, ground)}", before),
                (f"after: {called(style, word, ground)}", after),
            ]

    def prior(self, thing: Thing, word: str, old: StableDiffusion, new: StableDiffusion) -> None:
        """Measure whether images of `word` are nearer to those before training than to the learned thing."""
        prompts = [called("3d", word)] * 8
        before, after = self.draw(old, prompts, 50), self.draw(new, prompts, 50)
        kept = measures.distance(after, before) < measures.distance(after, [self.shown(thing)] * len(after))
        self.measure(f"{word}: share kept", 1, 0.5, kept.float().mean(), 0.75, more=True)
        seen = [
            self.lineup(self.bank[word, "3d"], word).recognised(d).float().mean() for d in (before, after)
        ]
        self.measure(f"{word}: share that shows one", seen[0], 0, seen[1], 0.75, more=True)
        self.rows += [(f"before: {prompts[0]}", before), (f"after: {prompts[0]}", after)]

    def others(self, old: StableDiffusion, new: StableDiffusion) -> None:
        """Measure how many of OTHERS, which nothing trained on, are still drawn as what they are."""
        prompts = [called("3d", plain(name)) for name in OTHERS]
        before, after = self.draw(old, prompts, 60), self.draw(new, prompts, 60)
        seen = [self.share_shown(OTHERS, drawn) for drawn in (before, after)]
        self.measure("other things: share that shows them", seen[0], 0, seen[1], 0.75, more=True)
        self.rows += [("before: other things", before), ("after: other things", after)]

    def measure_shapes(self, names: list[str], before: list[Image.Image], after: list[Image.Image]) -> None:
        """Measure how much of the likeness to the things' shapes is left."""
        lineups = [self.lineup(self.bank[name, "3d"], name) for name in names]
        alike = [
            sum(line.shape([d]).item() for line, d in zip(lineups, drawn, strict=True)) / len(names)
            for drawn in (before, after)
        ]
        self.measure("likeness of shapes", alike[0], 0, alike[1], 0.9 * alike[0], more=True)

    def share_shown(self, names: Sequence[str], drawn: list[Image.Image]) -> float:
        """Return the share of images that show the 3d thing that they should."""
        lineups = [self.lineup(self.bank[name, "3d"], name) for name in names]
        seen = [line.recognised([d]).item() for line, d in zip(lineups, drawn, strict=True)]
        return sum(seen) / len(seen)

    # Styles

    def known(self, seed: str) -> list[str]:
        """Return the things that the model was trained on, shuffled."""
        names = bank.world()["core"].split()
        random.Random(seed).shuffle(names)
        return names

    def styles(self, sd: StableDiffusion, styles: tuple[str, ...]) -> measures.Styles:
        """Return a classifier of styles, fitted on the autoencoder's reconstructions of the bank."""
        names, examples = self.known("styles")[:60], {}
        for style in styles:
            pixels = torch.stack([images.to_tensor(on(self.bank[name, style])) for name in names])
            mean, _ = sd.encode_images(pixels)
            examples[style] = [images.to_pil(p) for p in sd.decode(mean)]
        return measures.Styles(examples)

    def in_style(self, names: list[str], style: str) -> Path:
        """Write a captioned image of each thing in that style."""
        rows = [{"": on(self.bank[n, style]), "text": called(style, plain(n))} for n in names]
        self.rows.append((f"{style}, of {len(names)}", [row[""] for row in rows[:8]]))
        return self.write(style, rows)

    def rank_of(self, names: list[str], drawn: list[Image.Image], style: str) -> float:
        """Count the things of a style that are nearer to image i than names[i] is; return the median."""
        things = bank.names()
        near = torch.cdist(*(features(p) for p in (drawn, [on(self.bank[n, style]) for n in things])))
        own = near.gather(1, torch.tensor([[things.index(name)] for name in names]))  # (n, 1)
        return (near < own).sum(dim=1).float().quantile(0.5).item()


def called(style: str, word: str, ground: str = "") -> str:
    """Return the usual caption of a thing that is called `word`."""
    return captions(style, word, ground)[0]
