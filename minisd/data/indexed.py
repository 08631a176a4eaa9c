"""The records of an index, which files that are mapped into memory hold: see index.py, which makes it."""

import json
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minisd import files, reading
from minisd.data import images
from minisd.data.images import Cell
from minisd.data.records import Records, Size
from minisd.options import MAX_LENGTH, MAX_PIXELS, require

FORMAT = "minisd index 2"
# Where an image begins in its shard, where its texts end, its bytes, `crc`, and its size in pixels.
ROW = np.dtype(
    [(n, "<u8") for n in ("at", "texts")] + [(n, "<u4") for n in ("bytes", "crc", "width", "height")]
)
FILES = "index.json", "rows", "texts"
LANES = 4096  # at most
LONGEST = 4 * MAX_LENGTH + 5000  # bytes of a name and a caption
Shard = dict[str, Any]  # "path", "rows", and the "group" of a parquet file or the "entries" of a folder


def crc(content: bytes, text: bytes) -> int:
    """The CRC-32 of an encoded image with its name and caption."""
    return zlib.crc32(text, zlib.crc32(content))


def is_index(path: Path) -> bool:
    """Whether a folder holds an index, by what index.json begins with."""
    try:
        reading.check_regular(path / "index.json")
        with open(path / "index.json", encoding="utf-8", errors="replace") as file:
            return f'"format": "{FORMAT}"' in file.read(100)
    except (OSError, ValueError):
        return False


class Table:
    """The files of an index, mapped into memory. ValueError, naming the file, if they do not fit together."""

    def __init__(self, folder: Path, max_pixels: int):
        self.folder, self.max_pixels, path = folder, max_pixels, folder / "index.json"
        self.header = reading.read_json(path)
        try:
            self.source, self.digest = self.header["source"] + "", self.header["digest"]
            self.shards = self.header["shards"]
            counts = [shard["rows"] for shard in self.shards if shard["path"] + "" or True]
            self.lanes = counts, self.header["lanes"], self.header["window"]
            good = all(type(n) is int and n > 0 for n in (*counts, *self.lanes[1:])) and len(counts) > 0
            self.sizes = [((w, h), n) for w, h, n in self.header["sizes"]]
            self.other_sizes, self.captions = self.header["other_sizes"] + 0, self.header["captions"] + 0
        except (KeyError, TypeError, ValueError):
            good = False
        require(good and self.lanes[1] <= LANES, f"{path} is damaged")
        self.ends = list(accumulate(counts))
        self.rows, self.texts = (
            _mapped(folder / name, kind) for name, kind in (("rows", ROW), ("texts", "u1"))
        )
        whole = len(self.rows) == self.ends[-1] and len(self.texts) == self.rows[-1]["texts"]
        require(whole, f"{folder} is cut off, or its files are of different indices: make it again")

    def __reduce__(self) -> tuple:  # a worker that is not forked maps the files itself
        return Table, (self.folder, self.max_pixels)

    def encoded_text(self, row: int) -> bytes:
        """Name, NUL and caption of a row."""
        start, end = int(self.rows[row - 1]["texts"]) if row else 0, int(self.rows[row]["texts"])
        require(0 <= end - start <= LONGEST, f"{self.folder / 'rows'} is damaged at row {row}")
        return self.texts[start:end].tobytes()

    def text(self, row: int) -> tuple[str, str]:
        """Name and caption of a row."""
        name, _, caption = self.encoded_text(row).partition(b"\0")
        return name.decode(errors="surrogateescape"), caption.decode(errors="replace")

    def name(self, row: int) -> str:
        """The path of a row's image, within the location of the data."""
        return "/".join(filter(None, (self.shard(row)["path"], self.text(row)[0])))

    def shard(self, row: int) -> Shard:
        return self.shards[bisect_right(self.ends, row)]

    def size(self, row: int) -> Size:
        width, height = int(self.rows[row]["width"]), int(self.rows[row]["height"])
        if not 0 < width * height <= self.max_pixels:
            known = f"--data: {self.name(row)} has {width}x{height} pixels by {self.folder}"
            raise ValueError(f"{known}, and {self.max_pixels:,} are the most; --max_pixels raises the limit")
        return width, height

    def read(self, row: int) -> bytes:
        """The encoded image of a row. ValueError if it is not as it was."""
        entry, shard = self.rows[row], self.shard(row)
        place, size = int(entry["at"]), int(entry["bytes"])
        require(size <= images.MOST, f"{self.folder / 'rows'} is damaged")
        try:
            if "group" in shard:
                content = encoded(self.source, shard["path"], shard["group"])[place].as_py()
            else:
                content = _range(self.source, shard["path"] or self.text(row)[0], place, size)
        except ValueError:
            raise
        except Exception as e:  # of a file system, the network or pyarrow
            raise ValueError(files.first_line(e)) from e
        whole = content is not None and len(content) == size
        same = whole and crc(content, self.encoded_text(row)) == entry["crc"]
        require(same, f"it, or its entry in {self.folder}, has changed since the index was made")
        return content


def _mapped(path: Path, kind: Any) -> np.ndarray:
    reading.check_regular(path, float("inf"))
    length, rest = divmod(os.path.getsize(path), np.dtype(kind).itemsize)
    require(length > 0 and not rest, f"{path} is cut off")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # else pages around those that are read are read too
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, kind)


@dataclass(frozen=True, eq=False)
class Indexed(Cell):
    """An image of an index."""

    def __str__(self) -> str:
        return self.table.name(self.row)

    def read_bytes(self) -> bytes:
        return self.table.read(self.row)


class Column(Sequence):
    """A column of an index: its entries are made when they are asked for."""

    def __init__(self, table: Table, entry: Callable[[int], Any]):
        self.table, self.entry = table, entry

    def __len__(self) -> int:
        return len(self.table.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.entry(row) for row in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.entry(i)


class Index(Records):
    """The records of an index, of which none is in memory; the columns are "image" and "text"."""

    checked = True
    epoch: Sequence[int] = range(0)

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS):
        self.table = table = Table(folder, max_pixels)
        self.spoilt: set[int] = set()  # rows whose images cannot be decoded, if they have been
        self.lanes, self.epoch = table.lanes, range(len(table.rows))
        self.names, self.repeats = Column(table, table.name), Column(table, _once)
        self.pictures = {"image": Column(table, partial(_picture, table))}
        self.sizes = {"image": Column(table, table.size)}
        self.texts = {"text": Column(table, partial(_caption, table, ""))} if table.captions else {}

    def common_sizes(self) -> tuple[int, list[tuple[Size, int]], int]:
        return len(self), self.table.sizes, self.table.other_sizes

    def count_texts(self, column: str | None) -> int:
        return self.table.captions if column == "text" else 0

    def different_pictures(self) -> list[Cell]:
        return [p for row, p in enumerate(self.pictures["image"]) if row not in self.spoilt]

    def with_prompt(self, prompt: str | Sequence[str], column: str) -> Records:
        found = Column(self.table, partial(_caption, self.table, prompt))
        return self.with_texts(**{column: found if column == "text" else [prompt] * len(self)})

    def take(self, numbers: Sequence[int]) -> Records:
        raise ValueError(
            f"{self.table.folder} is an index, which is used whole: leave out --validation_split"
        )

    def described(self) -> Iterator[str]:
        yield json.dumps([self.table.digest, *self.lanes])


def _once(row: int) -> int:
    return 1


def _picture(table: Table, row: int) -> Indexed:
    return Indexed(table, row, "image")


def _caption(table: Table, default: Any, row: int) -> Any:
    return table.text(row)[1] or default


# Files and file systems


def remote(source: str) -> tuple[Any, str]:
    """The file system of a URL, and its path there. Made anew each time, as it may not be used after a fork:
    fsspec keeps it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{source} needs fsspec: pip install 'minisd[index]'") from None
    return url_to_fs(source)


def open_shard(source: str, path: str) -> BinaryIO:
    if "://" in source:
        system, root = remote(source)
        return system.open(f"{root}/{path}", "rb")
    reading.check_regular(os.path.join(source, path), float("inf"))
    return open(os.path.join(source, path), "rb")


def _range(source: str, path: str, start: int, size: int) -> bytes:
    if "://" in source:
        system, root = remote(source)
        return system.cat_file(f"{root}/{path}", start, start + size)
    with open_shard(source, path) as file:
        file.seek(start)
        return file.read(size)


def parquet_file(source: str, path: str) -> tuple[Any, str, str | None]:
    """A parquet file, and its columns of images and of captions."""
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'minisd[index]'") from None
    file = parquet.ParquetFile(open_shard(source, path))
    kinds = {field.name: field.type for field in file.schema_arrow}
    pictures = [n for n, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)]
    pictures += [n for n, k in kinds.items() if types.is_struct(k) and "bytes" in {f.name for f in k}]
    require(pictures, f"{path}: no column holds pictures; the columns are {', '.join(kinds)}")
    return file, pictures[0], next((n for n in ("text", "caption", "prompt") if n in kinds), None)


@lru_cache(2)  # of some megabytes each
def encoded(source: str, path: str, group: int) -> Any:
    """The encoded images in a group of a parquet file's rows, an array of pyarrow."""
    file, picture, _ = parquet_file(source, path)
    column = file.read_row_group(group, columns=[picture]).column(picture).combine_chunks()
    return column.field("bytes") if hasattr(column, "field") else column
