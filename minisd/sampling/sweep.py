"""A table of settings, one row for each run, and the labelled sheet of the resulting images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisd import reading
from minisd.options import require

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, list[str]]  # values by flag; several where the table has its column several times


def read(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) for each row of a CSV file whose header names flags; an empty cell sets nothing.
    ValueError, naming the line, if a row is not as long as the header."""
    try:
        reader = csv.reader(io.StringIO(reading.text(path), newline=""))
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (ValueError, csv.Error) as e:
        raise ValueError(f"--csv {path}: {e}") from None
    require(len(lines) > 1, f"--csv {path}: needs a header that names flags, and a row for each picture")
    header = [name.strip().removeprefix("--") for name in lines[0][1]]
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(f"--csv {path} line {line}: {len(cells)} cells, and {len(header)} in the header")
        row: Row = {}
        for name, cell in zip(header, cells, strict=True):
            row.setdefault(name, []).extend([cell.strip()] if cell.strip() else [])
        rows.append((line, row))
    return rows


def _value(row: Row, name: str) -> str:
    return " ".join(row[name]) or "-"


def by_prompt(prompts: Sequence[str], drawn: Sequence[Image.Image]) -> Image.Image:
    """All images of one run: those of several prompts in a labelled row for each, or, if there is one for
    each prompt, as labelled cells."""
    from minisd.data import images

    rows: dict[str, list[Image.Image]] = {}
    for prompt, image in zip(prompts, drawn, strict=True):
        rows.setdefault(prompt, []).append(image)
    if len(rows) == 1:
        return images.grid(drawn)
    if len(rows) == len(drawn):
        return images.grid([images.labelled(image, prompt) for prompt, (image,) in rows.items()])
    return images.labelled_rows(list(rows.items()), size=None)


def sheet(rows: Sequence[Row], cells: Sequence[Image.Image]) -> Image.Image:
    """An image of all cells, one for each row: a table if two flags differ and every pair of their values
    occurs once, with the first flag's values from top to bottom; else a list in which each cell is labelled
    with the flags that differ."""
    from minisd.data import images

    columns = {name: list(dict.fromkeys(_value(row, name) for row in rows)) for name in rows[0]}
    varying = [(name, values) for name, values in columns.items() if len(values) > 1]
    if len(varying) == 2:
        (down, ys), (across, xs) = varying
        pairs = [(_value(row, down), _value(row, across)) for row in rows]
        places = dict(zip(pairs, cells, strict=True))
        if len(places) == len(rows) == len(ys) * len(xs):
            table = [[places[y, x] for x in xs] for y in ys]
            return images.table(table, [f"{down}: {y}" for y in ys], [f"{across}: {x}" for x in xs])
    labels = [", ".join(f"{name}: {_value(row, name)}" for name, _ in varying) for row in rows]
    return images.grid([images.labelled(cell, text) for cell, text in zip(cells, labels, strict=True)])
