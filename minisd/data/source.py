"""The data to train on: records of images and texts, read from a folder, a file or the hub.

    source = read(Path("images"), flag="--data")             a folder, with or without metadata
    source = read("user/name", flag="--dataset_name")        the hub, a saved dataset, a parquet file
    source = from_options(options, cache_dir=None)           the location that the flags name

All errors in the data are one-line ValueErrors that name the flag and the file, raised before training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from minisd import noise
from minisd.data import headers, images, indexed, tables
from minisd.data.folder import Folder, Subfolders
from minisd.data.records import ABSENT, COMMON, Records
from minisd.options import MAX_LENGTH, MAX_PIXELS, Data, Dataset, check_text, require

MAX_REASONS = 20  # of skipped files in a summary
BAD_HINT = "repair it and resume the run, or start over with --skip_bad_images; --check_data finds all such"
CAPTIONS_HINT = "; captions come from metadata.csv, metadata.jsonl, or .txt files beside the pictures"

# Other names of a column, tried if it is missing: those in ControlNet's prompt.json and in edit datasets.
ALIASES = {
    "image": ("target",), "conditioning_image": ("source",), "text": ("prompt",),
    "input_image": ("source", "original_image"), "edited_image": ("target", "image"),
    "edit_prompt": ("prompt", "text"),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Records in a fixed order, the name of their location, and the skipped files, with the reasons."""

    name: str
    records: Records
    skipped: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # what is not of the split train
    bad: tuple[str, ...] = ()  # those of the skipped that are images which cannot be decoded
    flag: str = "--data"  # that names the location

    def __len__(self) -> int:
        return len(self.records)

    @property
    def columns(self) -> list[str]:
        """Names of the columns: images, then texts."""
        return list(dict.fromkeys([*self.records.pictures, *self.records.texts]))

    def column(self, name: str, *, flag: str, of: Literal["texts", "pictures"] = "texts") -> str:
        """The column called `name`, or by one of its aliases. ValueError, naming `flag`, if there is none, or
        if it is empty in a record."""
        known = getattr(self.records, of)
        column = next((c for c in (name, *ALIASES.get(name, ())) if c in known), None)
        if column is None:
            message = f"{flag} {name}: {self.name} has no such column, but {', '.join(self.columns)}"
            uncaptioned = of == "texts" and self.columns == ["image"]
            raise ValueError(message + CAPTIONS_HINT if uncaptioned else message)
        for number, value in enumerate(() if self.records.checked else known[column]):
            if value is ABSENT:
                raise ValueError(f"{flag} {name}: {self.records.names[number]} in {self.name} has none")
            if of == "texts" and not (type(value) is str and len(value) <= MAX_LENGTH and value.isascii()):
                self._check_texts(value, f"{flag} {column}", self.records.names[number])
        return column

    def _check_texts(self, value: Any, flag: str, name: str) -> None:
        """ValueError, naming `flag` and a record, if its texts are none, too long, or not in UTF-8."""
        texts = value if isinstance(value, list | tuple) else [value]
        if not (texts and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"{flag}: that of {name} is not text or texts: {value!r}")
        for text in texts:
            check_text(text, f"{flag}: {name} has one")

    def pair_column(self, name: str, other: str, *, flag: str) -> str:
        """As `column`, for images with the aspect ratios of those in the column `other`. ValueError, naming
        `flag` and the files, also if two differ."""
        column = self.column(name, flag=flag, of="pictures")
        sizes, pictures = self.records.sizes, self.records.pictures
        for i, ((w, h), (ow, oh)) in enumerate(zip(sizes[other], sizes[column], strict=True)):
            if abs(w * oh - h * ow) > max(w, h, ow, oh):  # more than by rounding to pixels
                raise ValueError(
                    f"{flag}: an unequal pair in {self.name}: {pictures[other][i]} is {w}x{h}, "
                    f"{pictures[column][i]} is {ow}x{oh}"
                )
        return column

    def open(self, number: int, column: str, **how: Any) -> Image.Image:
        """The RGB image of record `number` in `column`, by `images.open_image`. ValueError if it cannot be
        decoded, or is not of the size that its header had at the start."""
        picture, size = self.records.pictures[column][number], self.records.sizes[column][number]
        try:
            image = images.open_image(picture, max_pixels=None, **how)  # as checked at the start
            (w, h), (ow, oh) = image.size, size
            require((w, h) == (ow, oh), f"{picture} was {ow}x{oh} at the start, and is {w}x{h}")
        except ValueError as e:
            raise ValueError(f"{self.flag}: {e}; {BAD_HINT}") from None
        return image

    def identity(self, number: int, column: str) -> str:
        """A text that changes with the image of a record: path, size and time of its file, or its content."""
        picture = self.records.pictures[column][number]
        if isinstance(picture, str):
            status = os.stat(picture)
            return f"{os.path.abspath(picture)} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(picture.read_bytes()).hexdigest()

    def caption(self, number: int, column: str, generator: torch.Generator) -> str:
        """The text of record `number`, drawn if it has several."""
        text = self.records.texts[column][number]
        return text if isinstance(text, str) else noise.choice(text, generator)

    def all_captions(self, column: str) -> Iterator[str]:
        """All texts of all records."""
        for texts in self.records.texts[column]:
            yield from [texts] if isinstance(texts, str) else texts

    def with_prompt(self, prompt: str | Sequence[str], column: str = "text") -> Source:
        """The same records, with `prompt` as the text of those without one."""
        return replace(self, records=self.records.with_prompt(prompt, column))

    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        """The records to train on and those held out, drawn by the seed: a `share` below 1 of the records,
        but at least one, or else `share` records. ValueError if none is left to train on."""
        count = max(1, round(len(self) * share)) if share < 1 else int(share)
        if count >= len(self):
            raise ValueError(f"--validation_split {share:g} leaves none of {len(self)} examples to train on")
        held_out = noise.subset(len(self), count, noise.generator(seed, "held out"))
        training = sorted(set(range(len(self))) - set(held_out))
        return tuple(replace(self, records=self.records.take(n)) for n in (training, held_out))

    def guess_captions(self) -> str | None:
        """The column that is likely to hold the captions, if there is one."""
        return next((column for column in ("text", "prompt") if column in self.columns), None)

    def summary(self, caption_column: str | None = None) -> str:
        """Numbers of images and captions, columns, sizes, and the skipped files with the reasons."""
        (pictures, sizes, more), repeated = self.records.common_sizes(), len(self.records.epoch)
        captions = self.records.count_texts(caption_column or self.guess_captions())
        lines = [f"{pictures} pictures in {self.name}, {captions} with a caption"]
        if not pictures == len(self) == repeated:
            epoch = f", {repeated} in an epoch" if repeated > len(self) else ""
            lines.append(f"  examples: {len(self)}{epoch}")
        lines.append(f"  columns: {', '.join(self.columns)}")
        shown = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes)
        lines.append(f"  sizes: {shown}" + (f" and {more} more" if more else ""))
        if self.left_out:
            lines.append(f"  only the split train; left out: {', '.join(self.left_out)}")
        if self.hidden:
            more = f" and {len(self.hidden) - COMMON} more" if len(self.hidden) > COMMON else ""
            lines.append(f"  hidden: {', '.join(self.hidden[:COMMON])}{more}")
        lines += [f"  skipped: {reason}" for reason in self.skipped[:MAX_REASONS]]
        if len(self.skipped) > MAX_REASONS:
            lines.append(f"  skipped: {len(self.skipped) - MAX_REASONS} more")
        return "\n".join(lines)


def keywords(options: Data) -> dict[str, Any]:
    """The flags about what may be read, as keywords of `read`. --check_data decodes all, and goes on."""
    check = options.check_data
    further = {"skip_bad_images": options.skip_bad_images or check, "fresh": check}
    return further | {name: getattr(options, name) for name in ("allow_outside", "max_pixels")}


def from_options(options: Data, cache_dir: str | None) -> Source:
    """Read the location that --dataset_name or --data names. If both are given, --data is a folder in the
    dataset."""
    location, flag = options.data, "--data"
    further = {"subfolders": options.SUBFOLDERS, **keywords(options)}
    if isinstance(options, Dataset):
        further |= {"by_split": options.DATA_HAS_SPLITS, "config": options.dataset_config_name}
        further |= {"max_samples": options.max_train_samples, "seed": options.seed}
        if options.dataset_name:
            location, flag = options.dataset_name, "--dataset_name"
            further |= {"by_split": True, "folder": options.data}
    return read(location, flag=flag, cache_dir=cache_dir, **further)


def read(
    location: Path | str,
    *,
    flag: str,
    subfolders: Subfolders = "all",
    folder: Path | None = None,
    by_split: bool = False,
    config: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
    fresh: bool = False,
    allow_outside: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_samples: int | None = None,
    seed: int = 0,
) -> Source:
    """Read the images of a folder, or with the package `datasets` the split "train" of a parquet file, of a
    folder saved by that package, or, if `location` is a str, of a dataset on the hub (`config` is its
    configuration); of the `folder` in it alone, if that is given; or of an index, which index.py has made.

    The records of a folder are the rows of its metadata files, then the other images by name. Subfolders are
    read too: all, only those in kohya's layout N_name ("repeated"), or none. Texts are the columns of the
    nearest metadata file in an image's folder or above it; without one, "text" is the content of a .txt or
    .caption file beside the image, or else the name in kohya's folder. With `by_split`, only what is of the
    split train by its name is read: see `tables.splits`.

    From more than `max_samples` records, that number is drawn by the seed. ValueError if the data is
    inconsistent, if metadata names an image outside the location, unless `allow_outside`, or in `verified`.
    """
    path, skipped, hidden, left_out = Path(location), [], [], []
    if indexed.is_index(path) and not folder:
        return read_index(path, flag, max_samples, skip_bad_images, fresh, allow_outside, max_pixels)
    samples = noise.generator(seed, "samples")
    if folder and path.exists():
        path = path / folder
        if folder.is_absolute() or not path.is_dir():
            raise ValueError(f"--data {folder}: {location} of {flag} has no such folder in it")
        location, folder = type(location)(path), None
    local = path.is_dir() or (isinstance(location, Path) and path.suffix != ".parquet")
    if local and not tables.needs_datasets(path):
        try:
            root = Folder(path, subfolders, by_split, allow_outside)
            records, skipped, hidden, left_out = root.records(), root.skipped, root.hidden, root.left_out
        except ValueError as e:
            raise ValueError(f"{flag}: {e}") from None
        if max_samples is not None:
            records = records.take(noise.subset(len(records), max_samples, samples))
    else:
        inside = str(folder) if folder else None
        pictures, texts, left_out = tables.load_dataset(str(location), config, cache_dir, inside, flag=flag)
        records, chosen = Records(), noise.subset(len(next(iter(pictures.values()))), max_samples, samples)
        cells = {
            column: [images.Cell(table, i, column) for i in chosen] for column, table in pictures.items()
        }
        texts = {column: [values[i] for i in chosen] for column, values in texts.items()}
        records.extend([f"row {i}" for i in chosen], cells, texts)
    decoding = {"skip_bad_images": skip_bad_images, "fresh": fresh, "max_pixels": max_pixels}
    source = verified(str(location), records, flag=flag, **decoding)
    kept = {"skipped": (*skipped, *source.skipped), "hidden": tuple(hidden), "left_out": tuple(left_out)}
    return replace(source, **kept)


def read_index(
    path: Path, flag: str, max_samples: int | None, skip_bad_images: bool, fresh: bool, allow_outside: bool,
    max_pixels: int,
) -> Source:  # fmt: skip
    """The records of an index. Its images are decoded if `fresh`, for --check_data. ValueError as in `read`,
    and for flags that would leave some out."""
    require(max_samples is None, f"--max_train_samples: {path} is an index, which is used whole")
    made = f"--skip_bad_images: {path} is an index, which can be made with this flag"
    require(fresh or not skip_bad_images, made)
    try:
        records, bad = indexed.Index(path, max_pixels), {}
    except ValueError as e:
        raise ValueError(f"{flag}: {e}") from None
    at = records.table.source
    # Nothing is asked for by a URL that others may have written.
    require(allow_outside or "://" not in at, f"{flag}: {path} is of {at}; --allow_outside reads it")
    if fresh:
        whole = {"whole": True, "fresh": True, "max_pixels": max_pixels}
        sizes = headers.sizes(records.pictures["image"], str(path), **whole)
        bad = {row: size for row, size in enumerate(sizes) if isinstance(size, str)}
        records.spoilt.update(bad)
    problems = tuple(bad.values())
    return Source(str(path), records, problems, bad=problems, flag=flag)


def verified(
    name: str,
    records: Records,
    *,
    flag: str,
    skip_bad_images: bool = False,
    fresh: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """A source of the records, with their sizes. ValueError if the header of an image cannot be read or has
    more than `max_pixels`. With `skip_bad_images` each image is decoded, and an error only if all are bad."""
    pictures = records.different_pictures()
    sizes = headers.sizes(pictures, name, whole=skip_bad_images, fresh=fresh, max_pixels=max_pixels)
    bad = [size for size in sizes if isinstance(size, str)]
    if bad and not skip_bad_images:
        raise ValueError(f"{flag}: {bad[0]}; --skip_bad_images goes on without it")
    found = dict(zip(pictures, sizes, strict=True))
    records.sizes = {c: [found.get(p, ABSENT) for p in column] for c, column in records.pictures.items()}
    if bad:
        spoilt = {i for column in records.sizes.values() for i, s in enumerate(column) if isinstance(s, str)}
        records = records.take([i for i in range(len(records)) if i not in spoilt])
    if not records:
        raise ValueError(f"{flag}: none of the {len(bad)} pictures can be decoded; the first: {bad[0]}")
    return Source(name, records, tuple(bad), bad=tuple(bad), flag=flag)


def join(sources: Sequence[Source]) -> Source:
    lists = ("skipped", "hidden", "left_out", "bad")
    joined = {name: tuple(entry for s in sources for entry in getattr(s, name)) for name in lists}
    records = Records(record for s in sources for record in s.records)
    return Source(", ".join(s.name for s in sources), records, flag=sources[0].flag, **joined)
