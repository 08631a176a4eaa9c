"""The data to train on: records of images and texts, read from a folder, a file or the hub.

    source = read(Path("images"), flag="--data")             a folder, with or without metadata
    source = read("user/name", flag="--dataset_name")        the hub, a saved dataset, a parquet file
    source = from_options(options, cache_dir=None)           the location that the flags name

All errors in the data are one-line ValueErrors that name the flag and the file, raised before training.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from minisd import noise, reading
from minisd.data import images, tables
from minisd.options import MAX_PIXELS, Data, Dataset, check_length, require
from minisd.terminal import BRIEF

Subfolders = Literal["all", "repeated", "none"]

REPEATED = re.compile(r"(\d+)_([^/]+)/")  # kohya's folders: repeats and caption (10_sks dog/)
CAPTION_SUFFIXES = (".txt", ".caption")  # of captions beside images; the first that exists is read
PROGRESS_BAR_FROM = 200  # records; fewer are checked without a progress bar
MAX_REASONS = 20  # of skipped files in a summary
CAPTIONS_HINT = "; captions come from metadata.csv, metadata.jsonl, or .txt files beside the pictures"

# Other names of a column, tried if it is missing: those in ControlNet's prompt.json and in edit datasets.
ALIASES = {
    "image": ("target",), "conditioning_image": ("source",), "text": ("prompt",),
    "input_image": ("source", "original_image"), "edited_image": ("target", "image"),
    "edit_prompt": ("prompt", "text"),
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """The images and texts of one example, by column. `sizes` are (width, height) of the images in pixels,
    after EXIF rotation; `repeats` is the number of times that the record occurs in an epoch."""

    name: str
    pictures: dict[str, Path | images.Cell]
    texts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeats: int = 1


@dataclass(frozen=True)
class Source:
    """Records in a fixed order, the name of their location, and the skipped files, with the reasons."""

    name: str
    records: tuple[Record, ...]
    skipped: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # what is not of the split train

    def __len__(self) -> int:
        return len(self.records)

    @property
    def columns(self) -> list[str]:
        """Names of the columns: images, then texts."""
        pictures = [column for record in self.records for column in record.pictures]
        return list(dict.fromkeys(pictures + [column for record in self.records for column in record.texts]))

    @property
    def epoch(self) -> list[int]:
        """The number of the record at each index of an epoch; records with repeats occur several times."""
        return [i for i, record in enumerate(self.records) for _ in range(record.repeats)]

    def column(self, name: str, *, flag: str, of: Literal["texts", "pictures"] = "texts") -> str:
        """The column called `name`, or by one of its aliases. ValueError, naming `flag`, if there is none, or
        if it is empty in a record."""
        known = {c for r in self.records for c in getattr(r, of)}
        column = next((c for c in (name, *ALIASES.get(name, ())) if c in known), None)
        if column is None:
            message = f"{flag} {name}: {self.name} has no such column, but {', '.join(self.columns)}"
            uncaptioned = of == "texts" and self.columns == ["image"]
            raise ValueError(message + CAPTIONS_HINT if uncaptioned else message)
        for record in self.records:
            require(column in getattr(record, of), f"{flag} {name}: {record.name} in {self.name} has none")
            value = getattr(record, of)[column]
            texts = value if isinstance(value, list | tuple) else [value]
            if of == "texts" and not (texts and all(isinstance(t, str) for t in texts)):
                raise ValueError(f"{flag} {column}: that of {record.name} is not text or texts: {value!r}")
            for text in texts if of == "texts" else ():
                check_length(text, f"{flag} {column}: {record.name} has one")
        return column

    def pair_column(self, name: str, other: str, *, flag: str) -> str:
        """As `column`, for images with the aspect ratios of those in the column `other`. ValueError, naming
        `flag` and the files, also if two differ."""
        column = self.column(name, flag=flag, of="pictures")
        for record in self.records:
            (w, h), (ow, oh) = record.sizes[other], record.sizes[column]
            if abs(w * oh - h * ow) > max(w, h, ow, oh):  # more than by rounding to pixels
                raise ValueError(
                    f"{flag}: an unequal pair in {self.name}: {record.pictures[other]} is {w}x{h}, "
                    f"{record.pictures[column]} is {ow}x{oh}"
                )
        return column

    def open(self, number: int, column: str) -> Image.Image:
        """The RGB image of record `number` in `column`."""
        return images.open_image(self.records[number].pictures[column], max_pixels=None)  # as verified

    def caption(self, number: int, column: str, generator: torch.Generator) -> str:
        """The text of record `number`, drawn if it has several."""
        text = self.records[number].texts[column]
        return text if isinstance(text, str) else noise.choice(text, generator)

    def with_prompt(self, prompt: str | Sequence[str], column: str = "text") -> Source:
        """The same records, with `prompt` as the text of those without one."""
        records = (replace(r, texts={column: prompt} | r.texts) for r in self.records)
        return replace(self, records=tuple(records))

    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        """The records to train on and those held out, drawn by the seed: a `share` below 1 of the records,
        but at least one, or else `share` records. ValueError if none is left to train on."""
        count = max(1, round(len(self) * share)) if share < 1 else int(share)
        if count >= len(self):
            raise ValueError(f"--validation_split {share:g} leaves none of {len(self)} examples to train on")
        held_out = noise.subset(len(self), count, noise.generator(seed, "held out"))
        training = sorted(set(range(len(self))) - set(held_out))
        return tuple(replace(self, records=tuple(self.records[i] for i in n)) for n in (training, held_out))

    def summary(self, caption_column: str | None = None) -> str:
        """Numbers of images and captions, columns, sizes, and the skipped files with the reasons."""
        sizes = Counter(size for r in self.records for size in r.sizes.values())
        pictures, repeated = sum(len(r.pictures) for r in self.records), len(self.epoch)
        column = caption_column or next((c for c in ("text", "prompt") if c in self.columns), None)
        captions = sum(column in r.texts for r in self.records)
        lines = [f"{pictures} pictures in {self.name}, {captions} with a caption"]
        if not pictures == len(self) == repeated:
            epoch = f", {repeated} in an epoch" if repeated > len(self) else ""
            lines.append(f"  examples: {len(self)}{epoch}")
        lines.append(f"  columns: {', '.join(self.columns)}")
        lines.append(f"  sizes: {_first_four([f'{w}x{h} ({n})' for (w, h), n in sizes.most_common()])}")
        if self.left_out:
            lines.append(f"  only the split train; left out: {', '.join(self.left_out)}")
        if self.hidden:
            lines.append(f"  hidden: {_first_four(self.hidden)}")
        lines += [f"  skipped: {reason}" for reason in self.skipped[:MAX_REASONS]]
        if len(self.skipped) > MAX_REASONS:
            lines.append(f"  skipped: {len(self.skipped) - MAX_REASONS} more")
        return "\n".join(lines)


def _first_four(words: Sequence[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def keywords(options: Data) -> dict[str, Any]:
    """The flags about what may be read, as keywords of `read`."""
    return {name: getattr(options, name) for name in ("skip_bad_images", "allow_outside", "max_pixels")}


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
    allow_outside: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_samples: int | None = None,
    seed: int = 0,
) -> Source:
    """Read the images of a folder, or with the package `datasets` the split "train" of a parquet file, of a
    folder saved by that package, or, if `location` is a str, of a dataset on the hub (`config` is its
    configuration); of the `folder` in it alone, if that is given.

    The records of a folder are the rows of its metadata files, then the other images by name. Subfolders are
    read too: all, only those in kohya's layout N_name ("repeated"), or none. Texts are the columns of the
    nearest metadata file in an image's folder or above it; without one, "text" is the content of a .txt or
    .caption file beside the image, or else the name in kohya's folder. With `by_split`, only what is of the
    split train by its name is read: see `tables.splits`.

    From more than `max_samples` records, that number is drawn by the seed. ValueError if the data is
    inconsistent, if metadata names an image outside the location, unless `allow_outside`, or, unless
    `skip_bad_images`, if an image cannot be decoded or has more than `max_pixels`.
    """
    path, skipped, hidden, left_out = Path(location), [], [], []
    samples = noise.generator(seed, "samples")
    if folder and path.exists():
        path = path / folder
        if folder.is_absolute() or not path.is_dir():
            raise ValueError(f"--data {folder}: {location} of {flag} has no such folder in it")
        location, folder = type(location)(path), None
    local = path.is_dir() or (isinstance(location, Path) and path.suffix != ".parquet")
    if local and not tables.needs_datasets(path):
        try:
            root = _Folder(path, subfolders, by_split, allow_outside)
            records, skipped, hidden, left_out = root.records(), root.skipped, root.hidden, root.left_out
        except ValueError as e:
            raise ValueError(f"{flag}: {e}") from None
        records = [records[i] for i in noise.subset(len(records), max_samples, samples)]
    else:
        inside = str(folder) if folder else None
        pictures, texts, left_out = tables.load_dataset(str(location), config, cache_dir, inside, flag=flag)
        records = []
        for i in noise.subset(len(next(iter(pictures.values()))), max_samples, samples):
            cells = {column: images.Cell(table, i, column) for column, table in pictures.items()}
            records.append(Record(f"row {i}", cells, {column: values[i] for column, values in texts.items()}))
    decoding = {"flag": flag, "skip_bad_images": skip_bad_images, "max_pixels": max_pixels}
    source = verified(str(location), records, **decoding)
    skipped = (*skipped, *source.skipped)
    return replace(source, skipped=skipped, hidden=tuple(hidden), left_out=tuple(left_out))


def verified(
    name: str,
    records: list[Record],
    *,
    flag: str,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """A source of the records, with their sizes; each image is decoded once. ValueError if one cannot be
    decoded or has more than `max_pixels`, or with `skip_bad_images` if all are so."""
    good, bad = [], []
    # Several records may share an image.
    size = functools.cache(lambda picture: images.open_image(picture, max_pixels=max_pixels).size)
    for record in tqdm(records, desc="checking", disable=len(records) < PROGRESS_BAR_FROM, **BRIEF):
        try:
            good.append(replace(record, sizes={c: size(picture) for c, picture in record.pictures.items()}))
        except ValueError as e:
            if not skip_bad_images:
                raise ValueError(f"{flag}: {e}; --skip_bad_images goes on without it") from None
            bad.append(str(e))
    if not good:
        raise ValueError(f"{flag}: none of the {len(bad)} pictures can be decoded; the first: {bad[0]}")
    return Source(name, tuple(good), tuple(bad))


def join(sources: Sequence[Source]) -> Source:
    """The records of several sources as one source."""
    lists = ("records", "skipped", "hidden", "left_out")
    joined = {name: tuple(entry for s in sources for entry in getattr(s, name)) for name in lists}
    return Source(", ".join(s.name for s in sources), **joined)


class _Folder:
    """Reads the records of a folder and its subfolders, and notes the skipped and hidden files."""

    def __init__(self, root: Path, subfolders: Subfolders, by_split: bool, allow_outside: bool):
        require(root.is_dir(), f"{root} is not a folder" if root.exists() else f"there is no {root}")
        self.root, self.subfolders, self.by_split = root, subfolders, by_split
        self.limits = None if allow_outside else root
        self.skipped: list[str] = []
        self.hidden: list[str] = []
        self.left_out: list[str] = []

    def records(self) -> list[Record]:
        """The records of metadata files, then those of other images. ValueError if an image has no row in the
        metadata, if a row has no image, or if there are no images."""
        files = list(self._files(self.root))
        others = self._other_splits(files) if self.by_split else set()
        files = [path for path in files if path not in others]
        folders = sorted({self.root, *(path.parent for path in files)})
        metadata = {folder: path for folder in folders if (path := tables.find(folder))}
        rows = [(folder, *row) for folder, path in metadata.items() for row in tables.read(path)]
        records = [
            self._record(*tables.split(row, folder, self.limits, where)) for folder, where, row in rows
        ]
        records = [r for r in records if not others.issuperset(r.pictures.values())]
        described = {os.path.normpath(p) for record in records for p in record.pictures.values()}
        stems = {p.with_suffix("") for p in files if p.suffix.lower() in images.SUFFIXES}
        for path in files:
            if path.suffix.lower() in images.SUFFIXES:
                nearest = next((metadata[f] for f in path.parents if f in metadata), None)
                if os.path.normpath(path) in described:
                    continue
                require(not nearest, f"{path} has no row in {nearest}")
                records.append(self._record({"image": path}, {}))
            elif path.suffix in CAPTION_SUFFIXES:
                if path.with_suffix("") not in stems:
                    self._skip(path, "no picture of that name")
            elif (used := metadata.get(path.parent)) != path:
                unused = used and path.name in tables.METADATA
                other = images.NO_HEIC if path.suffix.lower() in images.HEIC else "not a picture"
                self._skip(path, f"{used.name} is used instead" if unused else other)
        if not records:
            others = len(self.skipped) + len(self.hidden)
            contents = f"{others} other entries" if others else "empty"
            heic = sum(reason.endswith(images.NO_HEIC) for reason in self.skipped)
            contents = f"{heic} of {contents} are photos: {images.NO_HEIC}" if heic else contents
            raise ValueError(f"no picture in {self.root} ({contents})")
        return records

    def _other_splits(self, files: list[Path]) -> set[Path]:
        """The files that are not of the split train. ValueError if that leaves no picture."""
        names = {self._short(path): path for path in files}
        pictures = {name for name, path in names.items() if path.suffix.lower() in images.SUFFIXES}
        splits = tables.splits(names, pictures)
        training = splits.pop("train")
        counts = {split: len(pictures & found - training) for split, found in splits.items()}
        counts["no split"] = len(pictures - training.union(*splits.values()))
        self.left_out = [f"{count} of {split}" for split, count in counts.items() if count]
        if pictures and not pictures & training:
            raise ValueError(f"{self.root} has no split train by its names, but {', '.join(self.left_out)}")
        others = pictures.union(*splits.values()) - training
        return {names[name] for name in others}

    def _files(self, folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
        """Yield the files in a folder and its subfolders by name; `above` are the folders above it."""
        real = os.path.realpath(folder)
        if real in above:  # a link that leads back up
            return
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name == "__MACOSX":
                self.hidden.append(self._short(path))
            elif not path.is_dir():
                yield path
            elif reason := self._exclusion(path):
                self._skip(path, reason)
            else:
                yield from self._files(path, above | {real})

    def _exclusion(self, folder: Path) -> str | None:
        """The reason to skip a folder, or None. Only folders directly in the root can be skipped."""
        kohya = REPEATED.match(f"{folder.name}/")
        if folder.parent != self.root or not any(folder.iterdir()):
            return None
        if self.subfolders == "none" or (self.subfolders == "repeated" and not kohya):
            return "a folder"
        return "repeated 0 times" if kohya and int(kohya[1]) == 0 else None

    def _record(self, pictures: dict[str, Path], texts: dict[str, Any]) -> Record:
        """A record; without texts, its text is the caption beside its first image, or kohya's."""
        path = next(iter(pictures.values()))
        kohya = REPEATED.match(self._short(path)) if self.subfolders != "none" else None
        if not texts:
            file = next((f for f in map(path.with_suffix, CAPTION_SUFFIXES) if f.is_file()), None)
            caption = reading.text(file).strip() if file else kohya and kohya[2]
            texts = {} if caption is None else {"text": caption}
        return Record(self._short(path), pictures, texts, repeats=int(kohya[1]) or 1 if kohya else 1)

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(f"{self._short(path)}: {reason}")

    def _short(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
