"""The training examples of each method: a view of an image, its prompt, and further tensors.

A dataset has
    len(dataset)                  number of indices in an epoch
    examples(index, generator)    the examples at an index; random choices are drawn from the generator
    pixels(view)                  the image (3, h, w) in [-1, 1] of a view, or None if there is none
    extras(view)                  further tensors of a view, by name
    identity(view)                all that the pixels of a view depend on, as a text
    views()                       all possible views, or None if crops are random, or it is an index
    prompts()                     all possible prompts, or None if their parts are shuffled
    buckets                       the shape (w, h) at each index, or None if all images have one shape
    lanes                         of an index: what order.Lanes needs, or None
order.py decides the order of the examples in a run, and their generators.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from minisd import noise
from minisd.data import crop, images
from minisd.data.crop import Box, Size, View
from minisd.data.records import ABSENT
from minisd.data.source import Source
from minisd.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from minisd.options import require


@dataclass(frozen=True, kw_only=True)
class Example:
    """A view of an image, its prompt, and the weight of its loss."""

    view: View
    prompt: str
    weight: float = 1.0


class Captioned:
    """Images with captions: the shorter side is resized to `resolution`, and a centred or random square is
    cut out; flipped with probability 1/2 if `random_flip`.

    With `squash`, the whole image is resized to the square. With `bucket`, it is scaled to cover the bucket
    nearest to its aspect ratio (sides are multiples of `step` pixels), and the centre is cut out.

    Records without a caption get `prompt` (one of several is drawn); with caption_column=None all records do.
    A caption is dropped with probability `caption_dropout`. Its parts between commas are shuffled, but for
    the first `shuffle_after`, unless that is None. `pair_column` holds a second image of each record. If
    `masked`, the extra "mask", (1, h, w) in [0, 1], is the view of the image in the column "mask"; with
    `alpha`, if that is not so, it is how opaque the image itself is. ValueError, naming the flag, for a
    missing column, a pair with different aspect ratios, images of which none is transparent, or captions
    without anything to shuffle.
    """

    IMAGE_FLAG, CAPTION_FLAG, PAIR_FLAG = "--image_column", "--caption_column", ""

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        squash: bool = False,
        interpolation: str = "bilinear",
        caption_dropout: float = 0.0,
        shuffle_after: int | None = None,
        caption_column: str | None = "text",
        image_column: str = "image",
        pair_column: str | None = None,
        prompt: str | Sequence[str] | None = None,
        bucket: bool = False,
        step: int = 64,
        masked: bool = False,
        alpha: bool = False,
    ):
        self.prompt = prompt or ""
        self.described = source  # without the prompts
        self.caption_column = None
        if caption_column is not None:
            source = source if prompt is None else source.with_prompt(prompt, caption_column)
            self.caption_column = source.column(caption_column, flag=self.CAPTION_FLAG)
        self.source = source
        self.image_column = source.column(image_column, flag=self.IMAGE_FLAG, of="pictures")
        if pair_column is not None:
            self.pair_column = source.pair_column(pair_column, self.image_column, flag=self.PAIR_FLAG)
        self.masks = None  # their column, or None for that of the image itself, and how they are read
        if masked and not (alpha and "mask" not in source.columns):
            column = source.pair_column("mask", self.image_column, flag="--masked_loss")
            self.masks = column, {"behind": "black"}
        elif alpha:
            pictures = source.records.pictures[self.image_column]
            found = source.records.checked or any(map(images.has_alpha, pictures))
            require(found, f"--alpha_mask: no image in {source.name} has an alpha channel")
            self.masks = None, {"alpha": True}
        self.epoch = source.records.epoch  # the record at each index
        self.lanes = source.records.lanes
        self.flips = (False, True) if random_flip else (False,)
        self.caption_dropout, self.shuffle_after = caption_dropout, shuffle_after
        if shuffle_after is not None:
            texts = self.source.all_captions(self.caption_column)
            problem = f"--shuffle_caption: no caption has two parts, divided by commas, after {shuffle_after}"
            require(any(text.count(",") > shuffle_after for text in texts), problem)
        self.resampling = Image.Resampling[interpolation.upper().removesuffix("_EXACT")]  # as torchvision
        self.center_crop = center_crop or bucket
        self.squash, self.originals = squash, source.records.sizes[self.image_column]
        shapes = crop.bucket_shapes(resolution, step) if bucket else [(resolution, resolution)]
        self.known_shapes = tuple(shapes)
        require(not (bucket and self.lanes), "--bucket: the images of an index have no buckets yet")
        self.buckets = [self.fitted(i)[1] for i in self.epoch] if bucket else None

    def __len__(self) -> int:
        return len(self.epoch)

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        record = self.epoch[index]
        prompt, box = self.draw_prompt(record, generator), self.fixed_box(record)
        size, shape = self.fitted(record)
        if box is None:
            (w, h), (tw, th) = size, shape
            left, top = noise.between(0, w - tw, generator), noise.between(0, h - th, generator)
            box = left, top, left + tw, top + th
        view = View(record, self.draw_flip(generator), size, box)
        return [Example(view=view, prompt=prompt)]

    def draw_prompt(self, record: int, generator: torch.Generator) -> str:
        prompt = self.prompt
        if self.caption_column is not None:
            prompt = self.source.caption(record, self.caption_column, generator)
        if self.shuffle_after is not None:
            prompt = shuffled(prompt, self.shuffle_after, generator)
        dropped = self.caption_dropout and noise.chance(self.caption_dropout, generator)
        return "" if dropped else prompt

    def draw_flip(self, generator: torch.Generator) -> bool:
        return noise.choice(self.flips, generator)

    def fitted(self, record: int) -> tuple[Size, Size]:
        """The size that a record's image is resized to, and that of the crop."""
        return crop.fitted(self.originals[record], self.known_shapes, self.squash)

    def fixed_box(self, record: int) -> Box | None:
        """The crop of a record's image, or None if it is random."""
        size, shape = self.fitted(record)
        return crop.center(size, shape) if self.center_crop or size == shape else None

    def views(self) -> list[View] | None:
        if self.lanes:  # a list of them would grow with the index
            return None
        fitted = [self.fitted(record) for record in range(len(self.source))]
        records = sorted(range(len(fitted)), key=lambda r: fitted[r][1])  # those of a bucket together
        boxes = [self.fixed_box(r) for r in records]
        if None in boxes:
            return None
        pairs = zip(records, boxes, strict=True)
        return [View(r, flipped, fitted[r][0], box) for r, box in pairs for flipped in self.flips]

    def prompts(self) -> list[str] | None:
        if self.shuffle_after is not None:
            return None
        column, dropped = self.caption_column, [""] if self.caption_dropout else []
        captions = [self.prompt] if column is None else self.source.all_captions(column)
        return [*dict.fromkeys([*captions, *dropped])]

    def pixels(self, view: View) -> Tensor:
        """(3, h, w) in [-1, 1]."""
        return self.tensor(view, self.column(view))

    def column(self, view: View) -> str:
        """The column that a view is of."""
        return self.image_column

    def extras(self, view: View) -> dict[str, Tensor]:
        if self.masks is None:
            return {}
        column, how = self.masks
        mask = self.tensor(view, column or self.column(view), **how)  # (3, h, w)
        return {"mask": mask.mean(dim=0, keepdim=True) / 2 + 0.5}

    def identity(self, view: View) -> str:
        picture = self.source.identity(view.record, self.column(view))
        how = type(self).__name__, self.center_crop, self.resampling.name
        return repr((picture, how, view.flipped, view.size, view.box))

    def open(self, record: int, column: str, **how: Any) -> Image.Image:
        """An image, before it is resized; see `images.open_image`."""
        return self.source.open(record, column, **how)

    def tensor(self, view: View, column: str, **how: Any) -> Tensor:
        """A view of the image in a column, (3, h, w) in [-1, 1]."""
        image = self.open(view.record, column, **how).resize(view.size, self.resampling).crop(view.box)
        return images.to_tensor(ImageOps.mirror(image) if view.flipped else image)

    def summary(self) -> str:
        """The summary of the source, and the number of images in each bucket."""
        text = self.described.summary(self.caption_column)
        if self.buckets:
            counts = sorted(Counter(self.buckets).items())
            text += "\n  buckets: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in counts)
        return text


def shuffled(caption: str, first: int, generator: torch.Generator) -> str:
    """A caption with its parts between commas in another order, but for the `first` ones."""
    parts = [part.strip() for part in caption.split(",")]
    order = torch.randperm(max(0, len(parts) - first), generator=generator).tolist()
    return ", ".join([*parts[:first], *(parts[first + i] for i in order)])


class ConceptPictures(Captioned):
    """The images of one concept, for textual inversion: squashed to a square (with `center_crop`, only the
    largest centred square), flipped with probability `flip_p`, each `repeats` times in an epoch.

    Prompts are made from templates, or are an image's caption if it has one. In both, `{}` stands for the
    concept's token. ValueError, naming the record, for a caption with neither `{}` nor the token.
    """

    IMAGE_FLAG = CAPTION_FLAG = "--data"

    def __init__(
        self, source: Source, token: str, *, style: bool, flip_p: float, repeats: int, **kwargs: Any
    ):
        filled = {c: [t or ABSENT for t in texts] for c, texts in source.records.texts.items()}
        source = replace(source, records=source.records.with_texts(**filled))
        templates = STYLE_TEMPLATES if style else OBJECT_TEMPLATES
        super().__init__(source, squash=True, interpolation="bicubic", prompt=templates, **kwargs)
        self.token, self.flip_p = token, flip_p
        self.epoch = list(range(len(source))) * repeats
        self.flips = [flip for flip, p in ((False, 1 - flip_p), (True, flip_p)) if p > 0]
        records = self.source.records
        for name, texts in zip(records.names, records.texts["text"], strict=True):
            for text in [texts] if isinstance(texts, str) else texts:
                if token.lower() not in text.lower() and "{}" not in text:
                    raise ValueError(f"the caption of {name} has neither {token} nor {{}}: {text!r}")

    def draw_prompt(self, record: int, generator: torch.Generator) -> str:
        return super().draw_prompt(record, generator).replace("{}", self.token)

    def draw_flip(self, generator: torch.Generator) -> bool:
        return noise.chance(self.flip_p, generator)

    def open(self, record: int, column: str) -> Image.Image:
        image = super().open(record, column)
        return images.center_square(image) if self.center_crop else image


class Conditioned(Captioned):
    """ControlNet's images, each with the one in `pair_column`, cropped in the same way, as the extra
    "conditioning", (3, h, w) in [0, 1]."""

    PAIR_FLAG = "--conditioning_image_column"

    def extras(self, view: View) -> dict[str, Tensor]:
        return {"conditioning": self.tensor(view, self.pair_column) / 2 + 0.5}


class EditPairs(Captioned):
    """InstructPix2Pix's images after the edit, each with the one before the edit, in `pair_column`, cropped
    and flipped in the same way, as the extra "original", (3, h, w) in [-1, 1]."""

    IMAGE_FLAG, CAPTION_FLAG = "--edited_image_column", "--edit_prompt_column"
    PAIR_FLAG = "--original_image_column"

    def extras(self, view: View) -> dict[str, Tensor]:
        return {"original": self.tensor(view, self.pair_column)}


class Preferences(Captioned):
    """Diffusion-DPO's pairs: at each index the preferred image and, as another part, the rejected one in
    `pair_column`, cropped and flipped in the same way and with the same prompt.

    With `label_column`, the image in `pair_column` is the preferred one where that is 0, and pairs with 0.5
    are left out. ValueError, naming --label_column, for other values, or if none is left.
    """

    PAIR_FLAG = "--rejected_image_column"

    def __init__(self, source: Source, *, image_column: str, label_column: str | None, **kwargs: Any):
        self.second = set()  # the numbers of the records whose second image is the preferred one
        if label_column is not None:
            about, column = f"--label_column {label_column}", source.records.texts.get(label_column)
            require(
                column is not None,
                f"{about}: {source.name} has no such column, but {', '.join(source.columns)}",
            )
            labels = [
                _label(value, f"{about}: {name}")
                for name, value in zip(source.records.names, column, strict=True)
            ]
            kept = [i for i, label in enumerate(labels) if label != 0.5]
            require(kept, f"{about}: {source.name} has no pair with a preferred image")
            source = replace(source, records=source.records.take(kept))
            self.second = {n for n, i in enumerate(kept) if labels[i] == 0}
        super().__init__(source, image_column=image_column, **kwargs)

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        (example,) = super().examples(index, generator)
        return [replace(example, view=replace(example.view, part=part)) for part in (0, 1)]

    def views(self) -> list[View] | None:
        views = super().views()
        return views and [replace(view, part=part) for view in views for part in (0, 1)]

    def column(self, view: View) -> str:
        swapped = view.record in self.second
        return self.pair_column if swapped != bool(view.part) else self.image_column


def _label(value: Any, about: str) -> float:
    """0, 0.5 or 1, from a number or its text. ValueError, beginning with `about`, for anything else."""
    known = {"0": 0.0, "0.0": 0.0, "0.5": 0.5, "1": 1.0, "1.0": 1.0}
    require(str(value) in known, f"{about} has {value!r}, not 0, 0.5 or 1")
    return known[str(value)]


class Prior:
    """Two datasets side by side (prior preservation): an example of the instances and one of their class at
    each index. An epoch is as long as the longer of the two.

    The weights of the losses are 2 and 2 * `weight`, so that the mean over both examples is the instance's
    loss plus `weight` times that of the class. If the instances have masks, all of a class's image counts.
    """

    buckets = lanes = None

    def __init__(self, instances: Captioned, classes: Captioned, weight: float):
        assert instances.buckets is None and classes.buckets is None  # their images share a batch
        self.parts = instances, classes
        self.weights = 2.0, 2.0 * weight

    def __len__(self) -> int:
        return max(map(len, self.parts))

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        return [
            replace(example, view=replace(example.view, part=i), weight=example.weight * self.weights[i])
            for i, part in enumerate(self.parts)
            for example in part.examples(index % len(part), generator)
        ]

    def views(self) -> list[View] | None:
        views = [part.views() for part in self.parts]
        if None in views:
            return None
        return [replace(view, part=i) for i, part in enumerate(views) for view in part]

    def prompts(self) -> list[str] | None:
        prompts = [part.prompts() for part in self.parts]
        return None if None in prompts else [*dict.fromkeys(p for part in prompts for p in part)]

    def pixels(self, view: View) -> Tensor:
        return self.parts[view.part].pixels(view)

    def extras(self, view: View) -> dict[str, Tensor]:
        whole = {"mask": torch.ones(1, *view.shape[::-1])} if self.parts[0].masks else {}
        return whole | self.parts[view.part].extras(view)

    def identity(self, view: View) -> str:
        return self.parts[view.part].identity(view)

    def summary(self) -> str:
        return "\n".join(part.summary() for part in self.parts)


class Prompts:
    """Prompts alone, for a method that draws its images itself."""

    buckets, lanes, parts = None, None, ()  # it has no records

    def __init__(self, prompts: Sequence[str], count: int = 1):
        self.prompts, self.count = prompts, count  # of examples of each

    def __len__(self) -> int:
        return len(self.prompts)

    def examples(self, index: int, generator: torch.Generator) -> list[Example]:
        return [Example(view=View(index), prompt=self.prompts[index])] * self.count

    def views(self) -> None:
        return None

    def pixels(self, view: View) -> None:
        return None

    def extras(self, view: View) -> dict[str, Tensor]:
        return {}

    def summary(self) -> str:
        return f"prompts: {', '.join(self.prompts)}"
