"""One reader for what users have: a folder, with or without metadata, or a dataset of the hub.

    source = read(folder, flag="--data")                        a plain folder
    source = read_dataset("user/name", flag="--dataset_name")   the hub, a saved dataset, a parquet file
    source = from_options(options)                              whichever of them the flags name
    print(source.summary())

What is wrong with the data is a ValueError of one line that names the flag and the file, before anything is
trained.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from minisd.data import images, tables
from minisd.data.records import Cell, Record, Source, drawn, join, open_picture

__all__ = ["Record", "Source", "from_options", "join", "read", "read_dataset", "verified"]

SIDECARS = (".txt", ".caption")  # the first that is there counts
REPEATED = re.compile(r"(\d+)_(.+)")  # kohya's folders: 10_sks dog
MANY = 200  # pictures from which on a bar is shown while they are decoded


def from_options(options, *, subfolders: Literal["all", "repeated", "none"] = "all") -> Source:
    """What --data or --dataset_name names, with what else config.Captions says of it."""
    o = options
    kwargs = {"skip_bad_images": o.skip_bad_images, "max_samples": o.max_train_samples, "seed": o.seed}
    if o.data and o.data.suffix != ".parquet":
        return read(o.data, flag="--data", subfolders=subfolders, **kwargs)
    flag, name = ("--data", str(o.data)) if o.data else ("--dataset_name", o.dataset_name)
    cache = getattr(o, "cache_dir", None)
    return read_dataset(name, flag=flag, config=o.dataset_config_name, cache_dir=cache, **kwargs)


def read(
    folder: Path,
    *,
    flag: str,
    subfolders: Literal["all", "repeated", "none"] = "all",
    skip_bad_images: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
) -> Source:
    """The pictures of a folder in the order of their names; of the folders in it too: all, kohya's N_name
    alone ("repeated"), or none.

    Texts are the columns of the nearest metadata file at or above a picture; "text" is else that of a .txt or
    .caption file beside it, else kohya's name of the folder. ValueError if anything does not fit together, or
    if a picture cannot be decoded, unless `skip_bad_images`. Of more than `max_samples` records the seed
    draws so many.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{flag}: {folder} is not a folder" if folder.exists() else f"{flag}: there is no {folder}"
        )
    try:
        records, skipped, hidden = _Folder(folder, subfolders).records()
    except ValueError as e:
        raise ValueError(f"{flag}: {e}") from None
    if not records:
        seen = f"{len(skipped)} other files looked at" if skipped else "it is empty"
        raise ValueError(f"{flag}: no picture in {folder} ({seen})")
    records = [records[i] for i in drawn(len(records), max_samples, seed, "samples")]
    source = verified(str(folder), records, flag=flag, skip_bad_images=skip_bad_images)
    return replace(source, skipped=(*skipped, *source.skipped), hidden=hidden)


def read_dataset(
    name: str,
    *,
    flag: str = "--dataset_name",
    config: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
) -> Source:
    """The split "train" of a dataset on the hub, of one saved in a folder, or of a parquet file, through the
    package `datasets`; a plain folder is read without it. ValueError as by `read`."""
    subset = {"skip_bad_images": skip_bad_images, "max_samples": max_samples, "seed": seed}
    if Path(name).is_dir() and not tables.needs_datasets(Path(name)):
        return read(Path(name), flag=flag, **subset)
    table, pictures, texts = tables.load_dataset(name, config, cache_dir, flag=flag)
    if not pictures:
        raise ValueError(
            f"{flag} {name}: no column holds pictures; the columns are {', '.join(table.column_names)}"
        )
    chosen = drawn(len(table), max_samples, seed, "samples")
    columns = {column: table.select_columns(column)[:][column] for column in texts}
    records = [
        Record(
            name=f"row {i}",
            pictures={column: Cell(table, i, column) for column in pictures},
            texts={column: values[i] for column, values in columns.items()},
        )
        for i in chosen
    ]
    return verified(name, records, flag=flag, skip_bad_images=skip_bad_images)


def verified(name: str, records: list[Record], *, flag: str, skip_bad_images: bool) -> Source:
    """A source of the records, each picture decoded once. ValueError if one cannot be, or if none is left."""
    good, bad, sizes = [], [], {}
    for record in tqdm(records, desc="checking pictures", leave=False, disable=len(records) < MANY):
        try:
            for picture in record.pictures.values():
                if picture not in sizes:
                    sizes[picture] = open_picture(picture).size
        except ValueError as e:
            if not skip_bad_images:
                raise ValueError(f"{flag}: {e}; --skip_bad_images goes on without it") from None
            bad.append(str(e))
            continue
        good.append(replace(record, sizes={c: sizes[p] for c, p in record.pictures.items()}))
    if not good:
        raise ValueError(f"{flag}: none of the {len(bad)} pictures can be decoded; the first: {bad[0]}")
    return Source(name, flag, tuple(good), tuple(bad))


class _Folder:
    """The files below a folder, sorted into pictures, metadata and others."""

    def __init__(self, root: Path, subfolders: str):
        self.root = root
        self.pictures: list[Path] = []
        self.sidecars: list[Path] = []
        self.metadata: dict[Path, Path] = {}  # folder -> its metadata file
        self.repeats: dict[Path, tuple[int, str]] = {}  # kohya's folder -> repeats, caption
        self.skipped: list[str] = []
        self.hidden = 0
        self._scan(root, subfolders, {os.path.realpath(root)})

    def _scan(self, folder: Path, subfolders: str, seen: set[str]) -> None:
        entries = sorted(folder.iterdir(), key=lambda p: p.name)
        files = [p for p in entries if not p.is_dir()]
        metadata, others = tables.find(files)
        if metadata:
            self.metadata[folder] = metadata
            self.skipped += [f"{self._short(p)}: {metadata.name} counts" for p in others]
        for path in entries:
            if path.name.startswith(".") or path.name == "__MACOSX":
                self.hidden += 1
            elif path.is_dir():
                self._enter(path, subfolders, seen)
            elif path.suffix.lower() in images.SUFFIXES:
                self.pictures.append(path)
            elif path.suffix in SIDECARS:
                self.sidecars.append(path)
            elif path != metadata and path not in others:
                self.skipped.append(f"{self._short(path)}: not a picture")

    def _enter(self, folder: Path, subfolders: str, seen: set[str]) -> None:
        repeated = REPEATED.fullmatch(folder.name) if folder.parent == self.root else None
        if subfolders == "none" or (subfolders == "repeated" and not repeated):
            if any(folder.iterdir()):
                self.skipped.append(f"{self._short(folder)}: a folder")
            return
        if repeated and subfolders != "none":
            count, name = int(repeated[1]), repeated[2]
            if not count:
                self.skipped.append(f"{self._short(folder)}: repeated 0 times")
                return
            self.repeats[folder] = count, name
        real = os.path.realpath(folder)
        if real not in seen:  # a link may lead back up
            self._scan(folder, "all", seen | {real})

    def _short(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def records(self) -> tuple[list[Record], list[str], int]:
        """The records, what was passed over, and how many hidden files there are. ValueError if a picture has
        no row, or a row no picture."""
        rows = [record for folder, path in self.metadata.items() for record in self._rows(folder, path)]
        named = {os.path.normpath(p) for record in rows for p in record.pictures.values()}
        plain = []
        for path in self.pictures:
            if os.path.normpath(path) in named:
                continue
            if metadata := next((self.metadata[f] for f in self._above(path) if f in self.metadata), None):
                raise ValueError(f"{path} has no row in {metadata}")
            plain.append(self._finished(Record(self._short(path), {"image": path})))
        stems = {p.with_suffix("") for p in self.pictures}
        lost = [f"{self._short(p)}: no picture of that name" for p in self.sidecars
                if p.with_suffix("") not in stems]  # fmt: skip
        return rows + plain, self.skipped + lost, self.hidden

    def _above(self, path: Path) -> Iterator[Path]:
        """The folders a file is in, the nearest first, up to the root."""
        for folder in path.parents:
            yield folder
            if folder == self.root:
                return

    def _rows(self, folder: Path, metadata: Path) -> list[Record]:
        records = []
        for where, row in tables.read(metadata):
            names, texts = tables.split(row)
            if not names:
                raise ValueError(f"{where}: no column file_name, but {', '.join(row)}")
            pictures = {}
            for column, name in names.items():
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{where}: no file is named for the column {column}")
                pictures[column] = path = folder / name
                if not path.is_file():
                    raise ValueError(f"{where}: there is no {path}")
            first = next(iter(pictures.values()))
            records.append(self._finished(Record(self._short(first), pictures, texts)))
        return records

    def _finished(self, record: Record) -> Record:
        """With the caption that stands beside the picture, or kohya's, if it has none; and with repeats."""
        path = next(iter(record.pictures.values()))
        repeats, name = next((self.repeats[f] for f in self._above(path) if f in self.repeats), (1, None))
        texts = dict(record.texts)
        if not texts:
            sidecar = next((s for s in map(path.with_suffix, SIDECARS) if s.is_file()), None)
            if sidecar:
                texts["text"] = tables.text(sidecar).strip()
            elif name:
                texts["text"] = name
        return replace(record, texts=texts, repeats=repeats)
