"""The sizes of images by their headers alone, read in parallel, and remembered on disk.

An image of a megapixel takes 10 ms to decode, and its header a four-hundredth of that. So what is wrong
behind the header is found where the image is used, except with `whole` and in small data, which is decoded.
"""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisd import files
from minisd.data import images
from minisd.data.images import Cell
from minisd.data.records import Size
from minisd.terminal import BRIEF

FEW = 100  # images, up to which all are decoded
PROCESSES_FROM = 2000  # headers, from which Python's lock costs more than to start processes
PART = 256  # headers that a process reads at a time
ENTRY = np.dtype([("key", "<u8"), ("width", "<u4"), ("height", "<u4"), ("whole", "?")])


def sizes(
    pictures: Sequence[str | Cell], location: str, *, whole: bool, fresh: bool, max_pixels: int
) -> list[Size | str]:
    """(width, height) in pixels of each image, after EXIF rotation, or what is wrong with it: with `whole`,
    also what only decoding shows. What is remembered of the location is not used if `fresh`."""
    whole = whole or len(pictures) <= FEW
    memory = _Memory(location, pictures)
    if fresh or not memory.pays:
        known = np.zeros(len(pictures), ENTRY)
    else:
        known = memory.recall()
    known["key"][known["width"].astype(np.int64) * known["height"] > max_pixels] = 0  # to be refused
    if whole:
        known["key"][~known["whole"]] = 0
    missing = np.flatnonzero(known["key"] == 0).tolist()
    read = dict(zip(missing, _read([pictures[i] for i in missing], whole, max_pixels), strict=True))
    for i, size in read.items():
        if isinstance(size, tuple):
            known[i] = memory.keys[i], *size, whole
    if read and memory.pays:
        memory.store(known)
    one: dict[Size, Size] = {}  # equal sizes are one object
    pairs = zip(known["width"].tolist(), known["height"].tolist(), strict=True)
    found: list[Size | str] = [one.setdefault(pair, pair) for pair in pairs]
    for i, size in read.items():
        found[i] = one.setdefault(size, size) if isinstance(size, tuple) else size
    return found


def _read(pictures: list[str | Cell], whole: bool, max_pixels: int) -> list[Size | str]:
    """The sizes or problems of images, read in parallel."""
    workers = min(32, os.cpu_count() or 1)
    forks = "fork" in multiprocessing.get_all_start_methods()
    pool: type[Executor] | partial = ThreadPoolExecutor
    if forks and len(pictures) >= PROCESSES_FROM and isinstance(pictures[0], str):
        ours = {"mp_context": multiprocessing.get_context("fork"), "initializer": _ignore_interrupts}
        pool = partial(ProcessPoolExecutor, **ours)
    part = max(1, min(PART, len(pictures) // (4 * workers)))
    parts = [pictures[start : start + part] for start in range(0, len(pictures), part)]
    found = []
    bar = tqdm(desc="checking", total=len(pictures), disable=len(pictures) < 2 * FEW, **BRIEF)
    with images.unlimited(), bar, pool(workers) as executor:
        for sizes in executor.map(partial(_read_part, whole=whole, max_pixels=max_pixels), parts):
            found += sizes
            bar.update(len(sizes))
    return found


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others


def _read_part(pictures: list[str | Cell], whole: bool, max_pixels: int) -> list[Size | str]:
    found: list[Size | str] = []
    for picture in pictures:
        try:
            found.append(images.read_size(picture, whole=whole, max_pixels=max_pixels))
        except ValueError as e:
            found.append(str(e))
    return found


class _Memory:
    """The sizes of a location's images in the user's cache, each under a key of its file's path, size and
    time. `keys` (n,) are those of the images; 0 is none."""

    def __init__(self, location: str, pictures: Sequence[str | Cell]):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minisd" / "sizes"
        self.path = cache / hashlib.sha256(os.path.abspath(location).encode(errors="replace")).hexdigest()
        self.pays = len(pictures) > FEW and isinstance(pictures[0], str)
        self.keys = np.fromiter(map(_key, pictures) if self.pays else [0] * len(pictures), np.uint64)

    def recall(self) -> np.ndarray:
        """The entry of each image, (n,), zeros where none is known."""
        found, known = np.zeros(len(self.keys), ENTRY), np.zeros(0, ENTRY)
        with suppress(OSError):
            content = self.path.read_bytes()
            body = content[32:]
            if hashlib.sha256(body).digest() == content[:32]:  # else it is damaged
                known = np.frombuffer(body, ENTRY)
        if len(known):
            places = np.searchsorted(known["key"], self.keys).clip(max=len(known) - 1)  # (n,)
            hits = (known["key"][places] == self.keys) & (self.keys != 0)
            found[hits] = known[places[hits]]
        return found

    def store(self, entries: np.ndarray) -> None:
        """Remember these entries in place of the earlier ones, if the disk allows it."""
        body = np.sort(entries[entries["key"] != 0], order="key").tobytes()
        with suppress(ValueError):
            files.write_bytes(self.path, hashlib.sha256(body).digest() + body)


def _key(path: str | Cell) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError, TypeError):
        return 0
    about = f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(about, digest_size=8).digest(), "little")
