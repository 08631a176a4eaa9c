"""Every thing once in every style, with transparency: the images of the judge.

bank.webp is one image of 64x64 tiles in the order of world.json, written by minisd/tiny/data.py. Its colours
are lossy, so the model's own training data is not taken from it.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from minisd.tiny.pictures import SIDE

PATH = Path(__file__).with_name("bank.webp")
STYLES = ("3d", "flat", "noto")
COLUMNS = 9 * len(STYLES)

Tiles = dict[tuple[str, str], Image.Image]  # (name, style) -> 64x64 RGBA


@functools.cache
def world() -> dict:
    """Return the content of world.json: the things by kind, the core things, and what training excludes."""
    return json.loads(Path(__file__).with_name("world.json").read_text())


def names() -> list[str]:
    """Return the names of all things, in the order of the tiles."""
    return [name for things in world()["concepts"].values() for name in things.split()]


def _boxes(count: int) -> Iterator[tuple[int, int, int, int]]:
    for i in range(count):
        row, column = divmod(i, COLUMNS)
        yield SIDE * column, SIDE * row, SIDE * (column + 1), SIDE * (row + 1)


def write(path: Path, pictures: Tiles) -> None:
    """Write the tiles into one image; the tiles that `pictures` lacks stay empty."""
    keys = [(name, style) for name in names() for style in STYLES]
    sheet = Image.new("RGBA", (SIDE * COLUMNS, SIDE * -(-len(keys) // COLUMNS)))
    for key, box in zip(keys, _boxes(len(keys)), strict=True):
        if key in pictures:
            sheet.paste(pictures[key], box)
    sheet.save(path, "WEBP", quality=80, method=4)


def read(path: Path = PATH) -> Tiles:
    """Return the tiles that `write` wrote."""
    keys = [(name, style) for name in names() for style in STYLES]
    with Image.open(path) as sheet:
        sheet = sheet.convert("RGBA")
    return {key: sheet.crop(box) for key, box in zip(keys, _boxes(len(keys)), strict=True)}
