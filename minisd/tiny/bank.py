"""Every thing once in every style, with transparency: what the judge trains on and measures against.

bank.webp is one picture of 64x64 tiles in the order of world.json; minisd/tiny/data.py writes it. Its colours
are lossy, which is why the model's own data is not drawn from it.
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
    """What world.json lists: the things by kind, the core of them, and what is held out of training."""
    return json.loads(Path(__file__).with_name("world.json").read_text())


def names() -> list[str]:
    """All things, in the order of the tiles."""
    return [name for things in world()["concepts"].values() for name in things.split()]


def _boxes(count: int) -> Iterator[tuple[int, int, int, int]]:
    for i in range(count):
        row, column = divmod(i, COLUMNS)
        yield SIDE * column, SIDE * row, SIDE * (column + 1), SIDE * (row + 1)


def write(path: Path, pictures: Tiles) -> None:
    """Write the tiles into one picture; the tile of what `pictures` lacks stays empty."""
    keys = [(name, style) for name in names() for style in STYLES]
    sheet = Image.new("RGBA", (SIDE * COLUMNS, SIDE * -(-len(keys) // COLUMNS)))
    for key, box in zip(keys, _boxes(len(keys)), strict=True):
        if key in pictures:
            sheet.paste(pictures[key], box)
    sheet.save(path, "WEBP", quality=80, method=4)


def read(path: Path = PATH) -> Tiles:
    """The tiles that `write` wrote."""
    keys = [(name, style) for name in names() for style in STYLES]
    with Image.open(path) as sheet:
        sheet = sheet.convert("RGBA")
    return {key: sheet.crop(box) for key, box in zip(keys, _boxes(len(keys)), strict=True)}
