"""Custom Diffusion's images: concepts at random scales, and real or generated images of their classes."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn.functional import pad

from minisd import noise, reading
from minisd.data import images, source, tables
from minisd.data.crop import View
from minisd.data.datasets import Captioned, Example
from minisd.data.records import Record, Records
from minisd.data.source import Source
from minisd.options import require

FAR = ("a far away ", "very small ")
NEAR = ("zoomed in ", "close up ")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One concept and its class, as in a --concepts_list."""

    instance_prompt: str
    instance_data_dir: Path
    class_prompt: str | None = None
    class_data_dir: Path | None = None


def read_concepts(path: Path, with_classes: bool = False) -> list[Concept]:
    """The concepts in a --concepts_list file. ValueError, naming the file, if it is broken or empty, or if a
    concept has no class although `with_classes`."""
    try:
        entries = reading.parse_json(reading.text(path), path)
    except ValueError as e:
        raise ValueError(f"--concepts_list: {e}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"--concepts_list: {path} is not a list of objects")
    known = {f.name for f in fields(Concept)}
    concepts = []
    for number, entry in enumerate(entries, 1):
        where = f"--concepts_list: {path}, concept {number}"
        if unknown := ", ".join(sorted(entry.keys() - known)):
            raise ValueError(f"{where}: unknown {unknown}; known: {', '.join(sorted(known))}")
        for name in ("instance_prompt", "instance_data_dir"):
            require(entry.get(name), f"{where} has no {name}")
        if not all(isinstance(v, str) for v in entry.values() if v is not None):
            raise ValueError(f"{where}: every value is a text")
        if with_classes and not (entry.get("class_prompt") and entry.get("class_data_dir")):
            raise ValueError(f"{where}: --with_prior_preservation needs class_prompt and class_data_dir")
        paths = {k: Path(os.path.expanduser(v)) for k, v in entry.items() if k.endswith("_dir") and v}
        concepts.append(Concept(**entry | paths))
    return concepts


def read_instances(concepts: list[Concept], **flags: Any) -> Source:
    """The images of all concepts, each with its caption or its concept's prompt. `flags` are keywords of
    `source.read`."""
    return source.join([_read(c.instance_data_dir, c.instance_prompt, **flags) for c in concepts])


def read_classes(concepts: list[Concept], **flags: Any) -> Source:
    """The images of the classes of all concepts: a retrieved set (--real_prior) with its captions where a
    folder has an images.txt, else the images in the folder with the class's prompt. `flags` are keywords
    of `source.read`."""

    def read(c: Concept) -> Source:
        if (c.class_data_dir / "images.txt").is_file():
            return _read_retrieved(c.class_data_dir, **flags)
        return _read(c.class_data_dir, c.class_prompt, **flags)

    return source.join([read(c) for c in concepts])


def _read(folder: Path, prompt: str, **flags: Any) -> Source:
    return source.read(folder, subfolders="repeated", **flags).with_prompt(prompt)


def _read_retrieved(folder: Path, *, flag: str, allow_outside: bool = False, **decoding: Any) -> Source:
    """The images of a retrieved set: images.txt has their paths, caption.txt their captions, line by line."""
    lists = folder / "images.txt", folder / "caption.txt"
    for path in lists:
        require(path.is_file(), f"{flag}: there is no {path}")
    paths, captions = (reading.text(path).strip("\n").split("\n") for path in lists)
    if len(paths) != len(captions):
        raise ValueError(f"{flag}: {lists[0]} has {len(paths)} lines, and {lists[1]} has {len(captions)}")
    records = []
    for number, (name, caption) in enumerate(zip(map(str.strip, paths), captions, strict=True), 1):
        # The paths are usually relative to where the retrieval ran; the files are in the folder.
        candidates = Path(name), folder / name, folder / "images" / Path(name).name
        path = next((p for p in candidates if p.is_file()), None)
        where = f"{flag}: {lists[0]}, line {number}"
        require(path is not None, f"{where}: there is no {name}")
        tables.check_inside(path, None if allow_outside else folder, where)
        records.append(Record(path.name, {"image": path}, {"text": caption.strip()}))
    return source.verified(str(folder), Records(records), flag=flag, **decoding)


class CustomConcepts(Captioned):
    """Images of the concepts, squashed to a square of random side s, with the extra "mask" (1, h, w), which
    is 1 at the latent pixels to train on. In two thirds of the draws s is at most `resolution`, else larger.

    A smaller square is placed at random on mid-grey, and its mask excludes a border of one latent pixel; from
    a larger one a random crop is taken, and its mask is all ones. The prompt says whether the concept is far
    away or close up. Without `augment`, s is `resolution`, and the mask excludes the border. `factor` is the
    number of pixels per latent along a side.
    """

    IMAGE_FLAG = CAPTION_FLAG = "--data"

    def __init__(
        self, source: Source, *, resolution: int, augment: bool = True, hflip: bool = False, factor: int = 8
    ):
        super().__init__(source, resolution=resolution, random_flip=hflip, squash=True)
        self.resolution, self.augment, self.factor = resolution, augment, factor

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        record, full = self.epoch[index], self.resolution
        prompt, side = self.draw_prompt(record, generator), full
        if self.augment:
            smaller = noise.chance(0.66, generator)
            low, high = (full // 3, full) if smaller else (int(1.2 * full), int(1.4 * full) - 1)
            side = noise.between(low, high, generator)
        margin = abs(full - side)
        left, top = noise.between(0, margin, generator), noise.between(0, margin, generator)
        if side <= full:  # the box of a smaller square reaches beyond it
            left, top = -left, -top
        if side < 0.6 * full:
            prompt = noise.choice(FAR, generator) + prompt
        elif side > full:
            prompt = noise.choice(NEAR, generator) + prompt
        box = left, top, left + full, top + full
        return [Example(view=View(record, self.draw_flip(generator), (side, side), box), prompt=prompt)]

    def views(self) -> list[View] | None:
        return None if self.augment else super().views()

    def tensor(self, view: View, column: str) -> Tensor:
        """(3, resolution, resolution) in [-1, 1]; 0, mid-grey, around a smaller square."""
        image = self.open(view.record, column)
        image = ImageOps.mirror(image) if view.flipped else image  # before it is placed
        picture = images.to_tensor(image.resize(view.size, self.resampling))  # (3, s, s)
        (left, top, right, bottom), side = view.box, view.size[0]
        return pad(picture, (-left, right - side, -top, bottom - side))  # negative padding crops

    def extras(self, view: View) -> dict[str, Tensor]:
        """The mask, (1, h, w)."""
        side, latent = view.size[0], self.resolution // self.factor
        if side > self.resolution:
            return {"mask": torch.ones(1, latent, latent)}
        mask = torch.zeros(1, latent, latent)
        rows, columns = (self._inner(-start, side) for start in (view.box[1], view.box[0]))
        mask[:, rows, columns] = 1
        return {"mask": mask}

    def _inner(self, start: int, side: int) -> slice:
        """The latent pixels in a square's rows or columns, without one at each end. Where none is left, the
        one in the middle: the loss divides by the mask's sum."""
        first, end = start // self.factor + 1, (start + side) // self.factor - 1
        if first < end:
            return slice(first, end)
        middle = min((start + side // 2) // self.factor, self.resolution // self.factor - 1)
        return slice(middle, middle + 1)


class ClassPictures(Captioned):
    """Images of the classes, with a mask of ones."""

    IMAGE_FLAG = CAPTION_FLAG = "--class_data_dir"

    def __init__(self, source: Source, *, resolution: int, factor: int = 8, **kwargs: Any):
        super().__init__(source, resolution=resolution, **kwargs)
        self.mask = torch.ones(1, resolution // factor, resolution // factor)

    def extras(self, view: View) -> dict[str, Tensor]:
        return {"mask": self.mask}
