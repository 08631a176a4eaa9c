"""Custom Diffusion's pictures: concepts at random scales, and real or drawn pictures of their classes."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image

from minisd.data import images, sources, tables
from minisd.data.datasets import INTERPOLATION, Captioned, Example, View, between, chance, choice
from minisd.data.records import Record, Source

FAR = ("a far away ", "very small ")
NEAR = ("zoomed in ", "close up ")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One concept and its class, as --concepts_list has them."""

    instance_prompt: str
    instance_data_dir: Path
    class_prompt: str | None = None
    class_data_dir: Path | None = None


def read_concepts(path: Path) -> list[Concept]:
    """The concepts of a --concepts_list file. ValueError, naming the file, if it does not hold any."""
    if not path.is_file():
        raise ValueError(f"--concepts_list: there is no {path}")
    try:
        entries = json.loads(tables.text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"--concepts_list: {path}, line {e.lineno}: bad JSON: {e.msg}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"--concepts_list: {path} is not a list of objects")
    known = {f.name for f in fields(Concept)}
    concepts = []
    for number, entry in enumerate(entries, 1):
        where = f"--concepts_list: {path}, concept {number}"
        if unknown := entry.keys() - known:
            raise ValueError(
                f"{where}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
            )
        for name in ("instance_prompt", "instance_data_dir"):
            if not entry.get(name):
                raise ValueError(f"{where} has no {name}")
        if not all(isinstance(v, str) for v in entry.values() if v is not None):
            raise ValueError(f"{where}: every value is a text")
        paths = {k: Path(v) for k, v in entry.items() if k.endswith("_dir") and v}
        concepts.append(Concept(**entry | paths))
    return concepts


def concepts_of(options) -> list[Concept]:
    """What the flags name: the concepts of a list, or one. ValueError as by `read_concepts`, or if one has no
    class where pictures of it are asked for."""
    if options.concepts_list:
        concepts = read_concepts(options.concepts_list)
        for number, c in enumerate(concepts, 1):
            if options.with_prior_preservation and not (c.class_prompt and c.class_data_dir):
                where = f"--concepts_list: {options.concepts_list}, concept {number}"
                raise ValueError(f"{where}: --with_prior_preservation needs class_prompt and class_data_dir")
        return concepts
    one = Concept(
        instance_prompt=options.instance_prompt,
        instance_data_dir=options.data,
        class_prompt=options.class_prompt,
        class_data_dir=options.class_data_dir,
    )
    return [one]


def read_instances(concepts: list[Concept], *, flag: str, skip_bad_images: bool = False) -> Source:
    """The pictures of all concepts, each under its caption or its concept's prompt."""
    return sources.join(
        [
            sources.read(
                c.instance_data_dir, flag=flag, subfolders="repeated", skip_bad_images=skip_bad_images
            ).with_prompt(c.instance_prompt)
            for c in concepts
        ]
    )


def read_classes(
    concepts: list[Concept], *, flag: str, skip_bad_images: bool = False, at_least: int = 1
) -> Source:
    """The pictures of all concepts' classes: with captions of their own where images.txt and caption.txt list
    them line by line (a retrieved set: --real_prior), else of the folder under the class's prompt. ValueError
    if a class has fewer than `at_least`."""
    found = []
    for c in concepts:
        assert c.class_data_dir and c.class_prompt
        if (c.class_data_dir / "images.txt").is_file():
            found.append(_retrieved(c.class_data_dir, flag, skip_bad_images))
        else:
            source = sources.read(
                c.class_data_dir, flag=flag, subfolders="repeated", skip_bad_images=skip_bad_images
            )
            found.append(source.with_prompt(c.class_prompt))
        if len(found[-1]) < at_least:
            raise ValueError(
                f"{flag}: {c.class_data_dir} has {len(found[-1])} pictures, fewer than the {at_least} asked "
                "for; --num_class_images takes less"
            )
    return sources.join(found)


def _retrieved(folder: Path, flag: str, skip_bad_images: bool) -> Source:
    """What a retrieval left: images.txt with paths, caption.txt with as many lines."""
    lists = folder / "images.txt", folder / "caption.txt"
    for path in lists:
        if not path.is_file():
            raise ValueError(f"{flag}: there is no {path}")
    paths, captions = (tables.text(path).strip("\n").split("\n") for path in lists)
    if len(paths) != len(captions):
        raise ValueError(f"{flag}: {lists[0]} has {len(paths)} lines, and {lists[1]} has {len(captions)}")
    records = []
    for number, (name, caption) in enumerate(zip(paths, captions, strict=True), 1):
        # Written relative to where the retrieval ran, as a rule: the folder's own picture of that name does.
        candidates = Path(name.strip()), folder / name.strip(), folder / "images" / Path(name.strip()).name
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            raise ValueError(f"{flag}: {lists[0]}, line {number}: there is no {name.strip()}")
        records.append(Record(path.name, {"image": path}, {"text": caption.strip()}))
    return sources.verified(str(folder), records, flag=flag, skip_bad_images=skip_bad_images)


class CustomConcepts:
    """Instances of the concepts, squashed to a square of a random side s, two thirds of them up to
    `resolution` and one third beyond it, with the extra "mask", (1, h, w) of the latents, 1 where there is
    picture.

    A smaller one stands anywhere on mid-grey, its mask one latent pixel smaller on each side; of a larger one
    any square is shown, and the mask is all ones. The prompt says if it is far away or close up. Without
    `augment` s is `resolution`, which counts as a smaller one: the mask leaves out the border. `factor` is
    the pixels of one latent pixel.
    """

    buckets = None

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        augment: bool = True,
        hflip: bool = False,
        interpolation: str = "bilinear",
        factor: int = 8,
    ):
        self.source = source
        self.places = source.places
        self.image_column = source.column("image", flag=source.flag, of="pictures")
        self.caption_column = source.column("text", flag=source.flag)
        self.resolution = resolution
        self.augment = augment
        self.flips = (False, True) if hflip else (False,)
        self.resampling = INTERPOLATION[interpolation]
        self.factor = factor

    def __len__(self) -> int:
        return len(self.places)

    def _side(self, generator: torch.Generator) -> int:
        """The side s that a picture is squashed to."""
        full = self.resolution
        if not self.augment:
            return full
        if chance(0.66, generator):
            return between(full // 3, full, generator)
        return between(int(1.2 * full), int(1.4 * full) - 1, generator)

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        number, full = self.places[index], self.resolution
        prompt = self.source.caption(number, self.caption_column, generator)
        side = self._side(generator)
        room = abs(full - side)
        left, top = between(0, room, generator), between(0, room, generator)
        if side <= full:  # the box of a smaller one reaches beyond it
            left, top = -left, -top
        if side < 0.6 * full:
            prompt = choice(FAR, generator) + prompt
        elif side > full:
            prompt = choice(NEAR, generator) + prompt
        box = left, top, left + full, top + full
        return [Example(view=View(number, choice(self.flips, generator), (side, side), box), prompt=prompt)]

    def views(self) -> list[View] | None:
        """Every view there can be; None if scales are drawn."""
        if self.augment:
            return None
        full = self.resolution
        box = 0, 0, full, full
        return [View(n, f, (full, full), box) for n in range(len(self.source)) for f in self.flips]

    def pixels(self, view: View) -> torch.Tensor:
        """(3, resolution, resolution) in [-1, 1], 0 around a picture that is smaller."""
        image = self.source.open(view.path, self.image_column)
        if view.flipped:  # before it is put somewhere
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = images.to_tensor(image.resize(view.size, self.resampling))  # (3, s, s)
        side, full = view.size[0], self.resolution
        left, top = view.box[:2]
        if side > full:
            return picture[:, top : top + full, left : left + full].contiguous()
        canvas = torch.zeros(3, full, full)
        canvas[:, -top : side - top, -left : side - left] = picture
        return canvas

    def extras(self, view: View) -> dict[str, torch.Tensor]:
        """The mask, (1, h, w) of the latents."""
        side, latent = view.size[0], self.resolution // self.factor
        if side > self.resolution:
            return {"mask": torch.ones(1, latent, latent)}
        mask = torch.zeros(1, latent, latent)
        rows, columns = (self._inner(-start, side) for start in (view.box[1], view.box[0]))
        mask[:, rows, columns] = 1
        return {"mask": mask}

    def _inner(self, start: int, side: int) -> slice:
        """The latent pixels within a picture's rows or columns, less one at each end. A picture too small for
        that keeps the one in its middle: the loss divides by how many there are."""
        first, end = start // self.factor + 1, (start + side) // self.factor - 1
        if first < end:
            return slice(first, end)
        middle = min((start + side // 2) // self.factor, self.resolution // self.factor - 1)
        return slice(middle, middle + 1)

    def summary(self) -> str:
        return self.source.summary(self.caption_column)


class ClassPictures(Captioned):
    """Pictures of the classes: Captioned, with a mask of ones."""

    def __init__(self, source: Source, *, resolution: int, factor: int = 8, **kwargs):
        super().__init__(source, resolution=resolution, **kwargs)
        self.mask = torch.ones(1, resolution // factor, resolution // factor)

    def extras(self, view: View) -> dict[str, torch.Tensor]:
        return {"mask": self.mask}
