"""An index of images that are too many for a list: made once, in parallel, and then mapped into memory.

    minisd index SRC OUT                                  as python -m minisd.data.index
    train.py --method text_to_image --data OUT            from which it trains

SRC is a folder, or a URL for fsspec, with WebDataset tars (as img2dataset writes them) or parquet files, or a
folder of images; these stay where they are. OUT has

    index.json    the location of the data, and path and number of rows of each shard: a tar, a group of a
                  parquet file's rows, or FILES images of a folder
    rows          an entry (ROW) for each image
    texts         name, NUL and caption of each, in UTF-8

Which row is drawn when is a function of the seed, the sample's number and index.json: see order.Lanes.
"""

import hashlib
import os
import runpy
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from minisd import files, reading
from minisd.data import headers, images, tables
from minisd.data.folder import Folder
from minisd.data.indexed import (
    FORMAT,
    LANES,
    LONGEST,
    ROW,
    Index,
    Shard,
    crc,
    encoded,
    open_shard,
    parquet_file,
    remote,
)
from minisd.data.records import ABSENT, COMMON
from minisd.options import MAX_PIXELS, check_text, require
from minisd.terminal import BRIEF

FILES = 1000  # images of a folder in a shard
WINDOW = 8  # shards that are mixed
KINDS = ".tar", ".parquet"  # of files with many images
# The name of an image, where it is in its shard, and what reads it and its caption.
Found = Iterator[tuple[str, int, Callable[[], tuple[bytes, str]]]]


def make(source: str, out: Path, lanes: int | None = None, decode: bool = False) -> tuple[Index, list[str]]:
    """Write the index of a location to the folder `out`. Return it, and why images are left out: with
    `decode` those too of which only decoding shows that they are damaged. ValueError if none is left."""
    source = source if "://" in source else os.path.abspath(source)
    problems, kept, sizes, digest, captions, end = [], [], Counter(), hashlib.sha256(), 0, 0
    with files.new_folder(out) as folder:
        with open(folder / "rows", "wb") as rows, open(folder / "texts", "wb") as texts:
            for shard, found, text, with_caption, wrong in _scanned(source, decode):
                problems += wrong
                if not text:
                    continue
                captions += with_caption
                found["texts"] += end
                end += len(text)
                sizes.update(found[["width", "height"]].tolist())
                kept.append(shard | {"rows": len(found)})
                for file, content in ((rows, found.tobytes()), (texts, text)):
                    digest.update(content)
                    file.write(content)
        require(kept, f"{source}: no picture can be read; the first: {next(iter(problems), '')}")
        header = {
            "format": FORMAT, "source": source, "captions": captions, "digest": digest.hexdigest(),
            "lanes": lanes or default_lanes(len(kept)), "window": WINDOW,
            "sizes": [[w, h, n] for (w, h), n in sizes.most_common(COMMON)],
            "other_sizes": max(0, len(sizes) - COMMON), "shards": kept,
        }  # fmt: skip
        files.write_json(folder / "index.json", header)
    return Index(out), problems


def default_lanes(shards: int) -> int:
    """A power of two, of four shards each at least: so lanes are nearly equal."""
    return min(LANES, 1 << max(0, (shards // 4).bit_length() - 1))


def _scanned(source: str, decode: bool) -> Iterator[tuple[Shard, np.ndarray, bytes, int, list[str]]]:
    """Each shard, its rows, their texts and the number of captions, and what is wrong; found in parallel."""
    shards = _shards(source)
    brief = BRIEF | ({"disable": True} if len(shards) == 1 else {})
    bar = tqdm(desc="indexing", total=len(shards), **brief)
    with bar, images.unlimited(), headers.executor(processes=len(shards) > 1) as pool:
        for shard, found in zip(shards, pool.map(partial(_scan, source, decode), shards), strict=True):
            bar.update()
            yield {k: v for k, v in shard.items() if k != "entries"}, *found


def _shards(source: str) -> list[Shard]:
    """The tars of a location, or the groups of its parquet files' rows, or the images of a folder. ValueError
    if there are none."""
    if "://" in source:
        system, root = remote(source)
        paths = [path[len(root) :].strip("/") for path in system.find(root)]
    else:
        require(os.path.isdir(source), f"{source} is not a folder")
        files_in = ((folder, name) for folder, _, names in os.walk(source) for name in names)
        paths = [os.path.relpath(os.path.join(*path), source) for path in files_in if path[1].endswith(KINDS)]
        paths = [path for path in paths if os.path.basename(path) not in tables.METADATA]
    if tars := sorted(path for path in paths if path.endswith(".tar")):
        return [{"path": path} for path in tars]
    if parquets := sorted(path for path in paths if path.endswith(".parquet")):
        groups = {path: parquet_file(source, path)[0].num_row_groups for path in parquets}
        return [{"path": path, "group": group} for path, n in groups.items() for group in range(n)]
    require("://" not in source, f"{source} has no .tar or .parquet files")
    records = Folder(Path(source), "all", False, False).records()
    columns = ", ".join(records.pictures)
    require(columns == "image", f"{source} has the columns {columns} of images; an index has image alone")
    captions = next(
        (records.texts[c] for c in ("text", "prompt") if c in records.texts), [ABSENT] * len(records)
    )
    start = len(os.path.join(source, ""))
    entries = [(records.pictures["image"][i][start:], captions[i]) for i in records.epoch]
    return [{"path": "", "entries": entries[i : i + FILES]} for i in range(0, len(entries), FILES)]


def _scan(source: str, decode: bool, shard: Shard) -> tuple[np.ndarray, bytes, int, list[str]]:
    """The rows of a shard, their texts and the number of captions, and why images are left out."""
    rows, texts, captions, problems = [], bytearray(), 0, []
    kind = _folder if "entries" in shard else _parquet if "group" in shard else _tar
    try:
        for name, place, read in kind(source, shard):
            path = "/".join(filter(None, (shard["path"], name)))
            try:
                content, caption = read()
                require(isinstance(caption, str), f"an index has one caption for an image, not {caption!r}")
                check_text(caption, "a caption")
                text = f"{name}\0{caption}".encode(errors="surrogateescape")
                require(len(text) <= LONGEST and "\0" not in name, "the name is too long, or has a zero byte")
                size = images.read_size(path, content, whole=decode, max_pixels=MAX_PIXELS)
            except (OSError, ValueError) as e:
                said = files.first_line(e)
                problems.append(said if said.startswith(path) else f"{path}: {said}")
                continue
            texts += text
            captions += bool(caption)
            rows.append((place, len(texts), len(content), crc(content, text), *size))
    except Exception as e:  # of a file, a file system or pyarrow: what was found before that stays
        problems.append(f"{shard['path']}: {files.first_line(e)}")
    return np.array(rows, ROW), bytes(texts), captions, problems


def _tar(source: str, shard: Shard) -> Found:
    """The images of a tar, each with the text or JSON file of its name up to the first dot, beside it."""
    with open_shard(source, shard["path"]) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for _, group in groupby(_members(tar), key=lambda member: _split(member.name)[0]):
            by_suffix = {_split(member.name)[1]: member for member in group}
            for suffix, member in by_suffix.items():
                if suffix in images.SUFFIXES:
                    yield member.name, member.offset_data, partial(_packed, file, member, by_suffix)
                    break
        # tarfile takes any header that it cannot read for the end: zeros, a block and at most a record.
        file.seek(tar.offset)
        end = file.read(2 * tarfile.RECORDSIZE)
        whole = len(end) >= tarfile.BLOCKSIZE and not any(end)
        require(whole, f"it is damaged or cut off at byte {tar.offset:,}")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # which would keep all of them
        require(member.size >= 0, f"{member.name} has {member.size} bytes")  # tarfile would go back
        if member.isreg() and not member.issparse():
            yield member


def _split(name: str) -> tuple[str, str]:
    """A name up to the first dot of its last part, and the rest, in lower case."""
    folder, _, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}/{stem}", dot + suffix.lower()


def _packed(file: BinaryIO, member: tarfile.TarInfo, beside: dict[str, tarfile.TarInfo]) -> tuple[bytes, str]:
    """An image in a tar, and its caption."""

    def content(member: tarfile.TarInfo, most: int) -> bytes:
        require(member.size <= most, f"{member.name} has {member.size:,} bytes; at most {most:,} are read")
        file.seek(member.offset_data)
        found = file.read(member.size)
        require(len(found) == member.size, f"{member.name} is cut off")
        return found

    caption = ""
    if ".txt" in beside:
        caption = content(beside[".txt"], reading.MOST).decode("utf-8-sig").strip()
    elif ".json" in beside:
        value = reading.parse_json(content(beside[".json"], reading.MOST).decode(), beside[".json"].name)
        caption = reading.an_object(value, beside[".json"].name).get("caption") or ""
    return content(member, images.MOST), caption


def _parquet(source: str, shard: Shard) -> Found:
    file, picture, text = parquet_file(source, shard["path"])
    pictures = encoded(source, shard["path"], shard["group"])
    captions = file.read_row_group(shard["group"], columns=[text]).column(text) if text else None
    for row in range(len(pictures)):
        yield (
            f"row {row} of group {shard['group']}",
            row,
            lambda row=row: (pictures[row].as_py() or b"", (captions[row].as_py() or "") if text else ""),
        )


def _folder(source: str, shard: Shard) -> Found:
    for name, caption in shard["entries"]:
        yield name, 0, partial(_file, os.path.join(source, name), "" if caption is ABSENT else caption)


def _file(path: str, caption: str) -> tuple[bytes, str]:
    reading.check_regular(path, images.MOST)
    return Path(path).read_bytes(), caption


if __name__ == "__main__":
    sys.argv.insert(1, "index")
    runpy.run_module("minisd", run_name="__main__", alter_sys=True)
