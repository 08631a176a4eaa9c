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
PART = 1024  # images that a process looks at, at a time
WORKERS = min(32, os.cpu_count() or 1)
# A file's size and time in ns, its image's size, and whether it was decoded. A width of 0: nothing is known.
ENTRY = np.dtype([("bytes", "<i8"), ("time", "<i8"), ("width", "<u4"), ("height", "<u4"), ("whole", "?")])
Pictures = Sequence[str | Cell]


def sizes(
    pictures: Pictures, location: str, *, whole: bool, fresh: bool, max_pixels: int
) -> list[Size | str]:
    """(width, height) in pixels of each image, after EXIF rotation, or what is wrong with it: with `whole`,
    also what only decoding shows. What is remembered of the location is not used if `fresh`."""
    whole = whole or len(pictures) <= FEW
    pays = len(pictures) > FEW and isinstance(pictures[0], str)
    memory = _Memory(location, pictures) if pays else None
    known = np.zeros(len(pictures), ENTRY) if fresh or memory is None else memory.recall()
    usable = known["width"].astype(np.int64) * known["height"] <= max_pixels  # else it is to be refused
    known["width"][~(usable & (known["whole"] | (not whole)))] = 0
    entries, problems = _look(pictures, known, whole, max_pixels)
    if memory and (entries != known).any():
        memory.store(entries)
    one: dict[Size, Size] = {}  # equal sizes are one object
    pairs = zip(entries["width"].tolist(), entries["height"].tolist(), strict=True)
    found: list[Size | str] = [one.setdefault(pair, pair) for pair in pairs]
    for i, problem in problems.items():
        found[i] = problem
    return found


def _look(
    pictures: Pictures, known: np.ndarray, whole: bool, max_pixels: int
) -> tuple[np.ndarray, dict[int, str]]:
    """The entries of images, and the problems of some, found in parallel."""
    part = max(1, min(PART, len(pictures) // (4 * WORKERS)))
    starts = range(0, len(pictures), part)
    parts = [[values[start : start + part] for start in starts] for values in (pictures, known)]
    entries, problems = [], {}
    brief = BRIEF | ({"disable": True} if len(pictures) < 2 * FEW else {})
    bar = tqdm(desc="checking", total=len(pictures), **brief)
    many = len(pictures) >= PROCESSES_FROM and isinstance(pictures[0], str)
    with images.unlimited(), bar, executor(processes=many) as pool:
        look = partial(_look_at_part, whole=whole, max_pixels=max_pixels)
        for start, (found, wrong) in zip(starts, pool.map(look, *parts), strict=True):
            entries.append(found)
            problems |= {start + i: problem for i, problem in wrong.items()}
            bar.update(len(found))
    return np.concatenate(entries), problems


def executor(*, processes: bool) -> Executor:
    """As many threads as there are cores, or processes where they can be forked."""
    if not processes or "fork" not in multiprocessing.get_all_start_methods():
        return ThreadPoolExecutor(WORKERS)
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_ignore_interrupts)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others


def _look_at_part(
    pictures: Pictures, known: np.ndarray, *, whole: bool, max_pixels: int
) -> tuple[np.ndarray, dict[int, str]]:
    """The known entries of images whose files are as they were, and those of the others, which are read."""
    # First: of a file that changes while it is read, the next start finds another time.
    status = np.array([_status(picture) for picture in pictures], np.int64)  # (n, 2)
    entries, problems = known.copy(), {}
    same = (known["bytes"] == status[:, 0]) & (known["time"] == status[:, 1]) & (known["width"] > 0)
    for i in np.flatnonzero(~same).tolist():
        try:
            size = images.read_size(pictures[i], whole=whole, max_pixels=max_pixels)
            entries[i] = *status[i], *size, whole
        except ValueError as e:
            entries[i], problems[i] = 0, str(e)
    return entries, problems


def _status(picture: str | Cell) -> tuple[int, int]:
    """Size and time of an image's file; zeros if it has none."""
    try:
        status = os.stat(picture)
    except (OSError, ValueError, TypeError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


class _Memory:
    """What the user's cache has on the images of a location: an entry for each, then their paths."""

    def __init__(self, location: str, pictures: Sequence[str]):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minisd" / "sizes"
        self.path = cache / hashlib.sha256(os.path.abspath(location).encode(errors="replace")).hexdigest()
        self.names = "\0".join(pictures).encode(errors="surrogatepass")

    def recall(self) -> np.ndarray:
        """The entry of each image, (n,), zeros where none is known."""
        names = self.names.split(b"\0")
        found, content = np.zeros(len(names), ENTRY), b""
        with suppress(OSError):
            content = self.path.read_bytes()
        if _digest(content[32:]) != content[:32]:  # damaged, or of another version
            return found
        count = int.from_bytes(content[32:40], "little")
        end = 40 + count * ENTRY.itemsize
        known = np.frombuffer(content[40:end], ENTRY)
        if content[end:] == self.names:
            return known.copy()
        places = {name: i for i, name in enumerate(content[end:].split(b"\0"))}
        pairs = [(i, place) for i, name in enumerate(names) if (place := places.get(name)) is not None]
        if pairs:
            here, there = zip(*pairs, strict=True)
            found[[*here]] = known[[*there]]
        return found

    def store(self, entries: np.ndarray) -> None:
        """Remember these entries in place of the earlier ones, if the disk allows it."""
        body = len(entries).to_bytes(8, "little") + entries.tobytes() + self.names
        with suppress(ValueError):
            files.write_bytes(self.path, _digest(body) + body)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(repr(ENTRY).encode() + body).digest()
