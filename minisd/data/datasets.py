"""What an example is: a picture, prepared, and its prompt. In which order they come is for batches.py.

A dataset has
    len(dataset)                  how many examples an epoch has
    examples(index, generator)    the Examples of one place in it, everything random taken from the generator
    pixels(view)                  the picture (3, h, w) in [-1, 1] that a view stands for
    extras(view)                  further tensors that belong to it, by name; {} where there are none
    views()                       every view there can be, or None if they are endless
    buckets                       the shape (w, h) of each of its places, or None if all are of one shape
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from minisd.data import buckets as shapes
from minisd.data import images, sources
from minisd.data.records import Source
from minisd.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


def chance(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def choice(options, generator: torch.Generator):
    return options[torch.randint(len(options), (), generator=generator).item()]


def between(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (), generator=generator).item()


@dataclass(frozen=True)
class View:
    """A picture as it is shown to the model: what a cached latent depends on. `path` is its file, or the
    number of its record; it is resized to `size`, `box` is cut out of that, and the cut is flipped."""

    path: Path | int
    flipped: bool = False
    size: Size | None = None
    box: Box | None = None


@dataclass(frozen=True)
class PartView:
    """A view of one of the datasets that stand behind another."""

    part: int
    view: View


@dataclass(frozen=True, kw_only=True)
class Example:
    """A view of a picture, its prompt, and what its loss counts."""

    view: View | PartView
    prompt: str
    weight: float = 1.0


def cover(size: Size, target: Size) -> Size:
    """The least size of the same shape that covers `target`. The longer side of a square target is cut down
    to whole pixels, as torchvision does it."""
    (w, h), (tw, th) = size, target
    if tw * h >= th * w:  # the width decides
        return tw, max(th, tw * h // w)
    return max(tw, th * w // h), th


def center(size: Size, target: Size) -> Box:
    """The centred box of `target` in `size`, rounded as torchvision rounds it: halves to the even."""
    left, top = (round((s - t) / 2) for s, t in zip(size, target, strict=True))
    return left, top, left + target[0], top + target[1]


def shown(image: Image.Image, view: View, resampling: Image.Resampling) -> Image.Image:
    """The picture of a view: resized, cut, flipped."""
    image = image.resize(view.size, resampling).crop(view.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else image


@dataclass
class Folder:
    """The usable pictures of a folder, their captions where they have one, and what was passed over."""

    path: Path
    pictures: list[Path]
    captions: dict[Path, str]
    source: Source

    @property
    def skipped(self) -> list[str]:
        return list(self.source.skipped)

    def summary(self) -> str:
        return self.source.summary()


def read_folder(path: Path, *, flag: str, skip_bad_images: bool = False) -> Folder:
    """The pictures right in a folder, each decoded once. ValueError as by sources.read."""
    source = sources.read(path, flag=flag, subfolders="none", skip_bad_images=skip_bad_images)
    source.column("image", flag=flag, of="pictures")
    texts = {record.pictures["image"]: record.texts.get("text") for record in source.records}
    return Folder(path, list(texts), {p: text for p, text in texts.items() if text}, source)


class ConceptPictures:
    """The pictures of one concept under prompts made from templates: textual inversion's data.

    A caption beside a picture is used instead of the templates; in it `{}`, or the token, is the concept.
    """

    buckets = None

    def __init__(
        self,
        folder: Folder,
        token: str,
        *,
        style: bool,
        resolution: int,
        center_crop: bool,
        flip_p: float,
        repeats: int,
    ):
        self.folder = folder
        self.token = token
        self.templates = STYLE_TEMPLATES if style else OBJECT_TEMPLATES
        self.resolution = resolution
        self.center_crop = center_crop
        self.flip_p = flip_p
        self.repeats = repeats
        for path, caption in folder.captions.items():
            if token.lower() not in caption.lower() and "{}" not in caption:
                raise ValueError(
                    f"the caption of {path.name} has neither {token} nor {{}} in it: {caption!r}"
                )

    def __len__(self) -> int:
        return len(self.folder.pictures) * self.repeats

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        path = self.folder.pictures[index % len(self.folder.pictures)]
        template = self.folder.captions.get(path) or choice(self.templates, generator)
        view = View(path, chance(self.flip_p, generator))
        return [Example(view=view, prompt=template.replace("{}", self.token))]

    def views(self) -> list[View]:
        """Every view there can be."""
        flips = [f for f, possible in ((False, self.flip_p < 1), (True, self.flip_p > 0)) if possible]
        return [View(path, flipped) for path in self.folder.pictures for flipped in flips]

    def extras(self, view: View) -> dict[str, torch.Tensor]:
        return {}

    def pixels(self, view: View) -> torch.Tensor:
        """(3, resolution, resolution) in [-1, 1]."""
        image = images.open_image(view.path)
        if self.center_crop:
            image = images.center_square(image)
        image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        if view.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return images.to_tensor(image)


class Captioned:
    """Pictures under their captions: the shorter side resized to `resolution`, a centred or random square cut
    out, flipped with probability 1/2 if `random_flip`.

    A record without a caption has `prompt`, if that is given; with caption_column=None every one has. A
    caption is left empty with probability `caption_dropout`. With `bucket` each picture is scaled to cover
    the shape of `step` pixels' multiples that is nearest to its own, and the middle is cut out. ValueError,
    naming the flag, for a column that is missing.
    """

    IMAGE_FLAG, CAPTION_FLAG = "--image_column", "--caption_column"

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "bilinear",
        caption_dropout: float = 0.0,
        caption_column: str | None = "text",
        image_column: str = "image",
        prompt: str | None = None,
        bucket: bool = False,
        step: int = 64,
    ):
        self.prompt = prompt or ""
        self.caption_column = None
        if caption_column is not None:
            source = source if prompt is None else source.with_prompt(prompt, caption_column)
            self.caption_column = source.column(caption_column, flag=self.CAPTION_FLAG)
        self.source = source
        self.image_column = source.column(image_column, flag=self.IMAGE_FLAG, of="pictures")
        self.flips = (False, True) if random_flip else (False,)
        self.caption_dropout = caption_dropout
        self.resampling = INTERPOLATION[interpolation]
        self.center_crop = center_crop or bucket
        self.places = source.places
        originals = [record.sizes[self.image_column] for record in source.records]
        self.shapes = [(resolution, resolution)] * len(originals)
        if bucket:
            known = shapes.sizes(resolution, step)
            self.shapes = [shapes.assign(size, known) for size in originals]
        pairs = zip(originals, self.shapes, strict=True)
        self.sizes = [self.scaled(size, shape) for size, shape in pairs]
        self.buckets = [self.shapes[i] for i in self.places] if bucket else None

    def scaled(self, size: Size, shape: Size) -> Size:
        """What a picture is resized to before `shape` is cut out."""
        return cover(size, shape)

    def __len__(self) -> int:
        return len(self.places)

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        number, prompt = self.places[index], self.prompt
        if self.caption_column is not None:
            prompt = self.source.caption(number, self.caption_column, generator)
        if self.caption_dropout and chance(self.caption_dropout, generator):
            prompt = ""
        box = self._box(number)
        if box is None:
            (w, h), (tw, th) = self.sizes[number], self.shapes[number]
            left, top = between(0, w - tw, generator), between(0, h - th, generator)
            box = left, top, left + tw, top + th
        view = View(number, choice(self.flips, generator), self.sizes[number], box)
        return [Example(view=view, prompt=prompt)]

    def _box(self, number: int) -> Box | None:
        """Where a picture is cut, or None if that is drawn."""
        size, shape = self.sizes[number], self.shapes[number]
        return center(size, shape) if self.center_crop or size == shape else None

    def views(self) -> list[View] | None:
        """Every view there can be; None if a crop is drawn."""
        numbers = sorted(range(len(self.sizes)), key=lambda n: self.shapes[n])  # a bucket's stand together
        boxes = [self._box(n) for n in numbers]
        if None in boxes:
            return None
        pairs = zip(numbers, boxes, strict=True)
        return [View(n, flip, self.sizes[n], box) for n, box in pairs for flip in self.flips]

    def extras(self, view: View) -> dict[str, torch.Tensor]:
        return {}

    def pixels(self, view: View) -> torch.Tensor:
        """(3, h, w) in [-1, 1]."""
        return self.tensor(view, self.image_column)

    def tensor(self, view: View, column: str) -> torch.Tensor:
        """(3, h, w) in [-1, 1]: the picture in a column, cut as the view says."""
        return images.to_tensor(shown(self.source.open(view.path, column), view, self.resampling))

    def summary(self) -> str:
        """What stands in the source, and how many pictures each bucket has."""
        text = self.source.summary(self.caption_column)
        if self.buckets:
            count = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sorted(Counter(self.buckets).items()))
            text += f"\n  buckets: {count}"
        return text


class InstancePictures(Captioned):
    """DreamBooth's pictures, of the instance or of its class: under the caption of each, else under
    `prompt`."""

    def __init__(self, source: Source, prompt: str, *, resolution: int, **kwargs):
        super().__init__(source, prompt=prompt, resolution=resolution, **kwargs)


class Prior:
    """Two datasets side by side: at each place an example of the instances and one of their class.

    Their weights, 2 and 2 * `weight`, make the mean over both, weighted, the mean error of the instances plus
    `weight` times that of the class. An epoch is as long as the longer of the two.
    """

    buckets = None

    def __init__(self, instances, classes, weight: float):
        assert instances.buckets is None and classes.buckets is None  # their pictures share a batch
        self.parts = instances, classes
        self.weights = 2.0, 2.0 * weight

    def __len__(self) -> int:
        return max(map(len, self.parts))

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        return [
            replace(example, view=PartView(i, example.view), weight=example.weight * self.weights[i])
            for i, part in enumerate(self.parts)
            for example in part.examples(index % len(part), generator)
        ]

    def views(self) -> list[PartView] | None:
        views = [part.views() for part in self.parts]
        if None in views:
            return None
        return [PartView(i, view) for i, part in enumerate(views) for view in part]

    def extras(self, view: PartView) -> dict[str, torch.Tensor]:
        return self.parts[view.part].extras(view.view)

    def pixels(self, view: PartView) -> torch.Tensor:
        return self.parts[view.part].pixels(view.view)

    def summary(self) -> str:
        return "\n".join(part.summary() for part in self.parts)
