"""Tables: metadata files (JSON lines, CSV, parquet) beside images, and datasets of the package `datasets`."""

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd import reading
from minisd.data import images
from minisd.options import require

# Files whose rows describe the images of their folder and of its subfolders; the first one that exists is
# read. prompt.json holds ControlNet's {"source", "target", "prompt"} lines.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "prompt.json", "prompt.jsonl")

SAVED = ("dataset_info.json", "dataset_dict.json")  # what the package `datasets` writes into a folder

Row = tuple[int, dict[str, Any]]  # number of its line or row, columns


# Metadata files


def find(folder: Path) -> Path | None:
    """The metadata file of a folder, if there is one."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    return next((path for path in files if path.name.startswith("metadata") or _is_controlnet(path)), None)


def _is_controlnet(path: Path) -> bool:
    """Whether a prompt.json is ControlNet's; other programs write files of that name too."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(100_000)
    return '"source"' in first and '"target"' in first


@dataclass
class Rows:
    """The rows of a metadata file, by column; `numbers` are those of lines, or of rows by the `unit`."""

    path: Path
    columns: dict[str, list[Any]]
    numbers: list[int]
    unit: str

    def where(self, i: int) -> str:
        """The location of a row, for messages."""
        return f"{self.path}, {self.unit} {self.numbers[i]}"


def read(path: Path) -> Rows:
    """The rows of a metadata file. ValueError, naming file and line, if it is broken."""
    unit = "row" if path.suffix == ".parquet" else "line"
    rows, first = Rows(path, {}, [], unit), None
    for number, row in {".csv": _csv, ".parquet": _parquet}.get(path.suffix, _jsonl)(path):
        rows.numbers.append(number)
        if first is None:
            first, rows.columns = row, {column: [] for column in row}
        if row.keys() != first.keys():
            columns = f"the columns are {', '.join(row)}, but those of {rows.where(0)} are {', '.join(first)}"
            raise ValueError(f"{rows.where(-1)}: {columns}")
        for column, values in rows.columns.items():
            values.append(row[column])
    require(first is not None, f"{path} has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines: in JSON lines, U+2028 does not end a line.
    decode = json.JSONDecoder().raw_decode
    for number, line in enumerate(reading.text(path).split("\n"), 1):
        try:
            row, end = decode(line)
        except (ValueError, RecursionError):
            row, end = None, -1
        if end != len(line) or not isinstance(row, dict):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = reading.an_object(reading.parse_json(line, where), where)
        yield number, row


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(reading.text(path), newline=""), strict=True)
    header, line = None, 1
    try:
        for cells in filter(None, reader):
            number, line = line, reader.line_num + 1
            where = f"{path}, line {number}"
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: a column is named twice: {', '.join(header)}")
            elif len(cells) != len(header):
                raise ValueError(
                    f"{where}: {len(cells)} cells under {len(header)} columns ({', '.join(header)}); "
                    "a text with a comma needs double quotes"
                )
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as e:
        raise ValueError(f"{path}, line {line}: {e}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'minisd[datasets]'") from None
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    yield from enumerate(rows)


def check_inside(path: Path, root: Path | None, where: str) -> None:
    """ValueError, naming the row's location `where`, if a path leads out of the root, unless that is None.
    Links are not followed: all those in a folder of the hub's cache lead out of it."""
    inside = root is None or Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))
    require(inside, f"{where}: {path} is outside {root}; --allow_outside reads it")


def split(
    rows: Rows, folder: str, root: Path | None, known: Collection[str]
) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
    """Split rows into image files and texts, both by column. The key "file_name" is the column "image",
    "x_file_name" the column "x", and ControlNet's "source" and "target" are files if the rows have both.
    `known` are files within the root that need not be looked for. ValueError, naming the row, if it has no
    file, or one is missing or outside `root`."""
    pictures, texts = {}, {}
    pair = {"source", "target"} & rows.columns.keys()
    for key, values in rows.columns.items():
        if len(pair) == 2 and key in pair:
            column = key
        elif key == "file_name" or key.endswith("_file_name"):
            column = key.removesuffix("file_name").removesuffix("_") or "image"
        else:
            texts[key] = values
            continue
        prefix = os.path.join(folder, "")
        paths = [prefix + value if isinstance(value, str) else "" for value in values]
        for i in (i for i, path in enumerate(paths) if path not in known):
            paths[i] = _found(values[i], folder, root, rows.where(i), column)
        pictures[column] = paths
    require(pictures, f"{rows.where(0)}: no column file_name, but {', '.join(rows.columns)}")
    return pictures, texts


def _found(name: Any, folder: str, root: Path | None, where: str, column: str) -> str:
    """The path of a file that a row names."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: no file is named for the column {column}")
    path = Path(folder, name)
    check_inside(path, root, where)
    require(path.is_file(), f"{where}: there is no {path}")
    return str(path)


# Splits

# The words for each split in the names of folders and files, by the package `datasets`.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def splits(paths: Collection[str], pictures: Collection[str]) -> dict[str, set[str]]:
    """The files of each split that has any, by the rules of `datasets`: a folder on a file's path has a word
    of the split between separators; where this holds for none of the `pictures`, the file's name has. Where
    neither holds, all are of the split train. `paths` are those of all files, with `/`, within the root."""
    for tail in (r"(?:[-._ 0-9][^/]*)?/", r"[-._ 0-9][^/]*$"):
        patterns = {s: re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(w)}){tail}") for s, w in SPLITS.items()}
        found = {split: set(filter(pattern.search, paths)) for split, pattern in patterns.items()}
        if any(files & set(pictures) for files in found.values()):
            return found
    return {"train": set(paths)}


# The package `datasets`


def needs_datasets(folder: Path) -> bool:
    """Whether a folder was saved by the package `datasets`, or has parquet files and no images."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    with os.scandir(folder) if folder.is_dir() else nullcontext([]) as entries:
        if any(entry.name.lower().endswith(images.SUFFIXES) for entry in entries):
            return False
    found = False
    for _, _, names in os.walk(folder):
        if any(name.lower().endswith(images.SUFFIXES) for name in names):
            return False
        found = found or any(n.lower().endswith(".parquet") and n != "metadata.parquet" for n in names)
    return found


def load_dataset(
    name: str, config: str | None, cache_dir: str | None, folder: str | None = None, *, flag: str
) -> tuple[dict[str, Any], dict[str, list], list[str]]:
    """Load the split "train" of a dataset on the hub (of its `folder`, if given), of one saved in a folder,
    or of a local parquet file. Return a table for each column of images (undecoded), the values of each
    column of texts, and what was left out. ValueError, naming `flag`, if it cannot be loaded, or has no split
    train or no images."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{flag} {name} needs the package `datasets`: pip install 'minisd[datasets]'"
        ) from None
    path = Path(name)
    require(not (path.suffix == ".parquet" and not path.is_file()), f"{flag}: there is no {path}")
    try:
        if path.suffix == ".parquet":
            data = datasets.load_dataset("parquet", data_files=name, cache_dir=cache_dir)
        elif any((path / n).is_file() for n in SAVED):
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config, data_dir=folder, cache_dir=cache_dir)
    except Exception as e:  # of the package, the network or the hub
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{flag} {name}: {lines[0]}") from e
    sizes = {split: len(part) for split, part in data.items()} if isinstance(data, dict) else {"train": 0}
    require("train" in sizes, f"{flag} {name}: it has no split train, but {', '.join(sizes)}")
    data = data["train"] if isinstance(data, dict) else data
    left_out = [f"{count} of {split}" for split, count in sizes.items() if split != "train"]
    pictures, texts = {}, {}
    for column, kind in data.features.items():
        alone = data.select_columns(column)  # so that reading a cell does not read the other columns
        inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)  # a list's items
        dtype = getattr(inner, "dtype", None)
        if isinstance(kind, datasets.Image):
            pictures[column] = alone.cast_column(column, datasets.Image(decode=False))
        elif (isinstance(kind, dict) and "bytes" in kind) or dtype in ("binary", "large_binary"):
            pictures[column] = alone  # parquet written by another program
        elif dtype in ("string", "large_string"):
            texts[column] = alone[:][column]
    require(pictures, f"{flag} {name}: no column holds pictures; the columns are {', '.join(data.features)}")
    return pictures, texts, left_out
