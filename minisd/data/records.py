"""What a data set is once it has been read: records, each with pictures and texts by column."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minisd import noise
from minisd.data import images

SHOWN = 20  # reasons in a summary

# A column by other names, tried where it is missing: ControlNet's lines, and pairs told by file_name.
ALSO = {
    "image": ("target",),
    "conditioning_image": ("source",),
    "text": ("prompt",),
    "input_image": ("source", "original_image"),
    "edited_image": ("target", "image"),
    "edit_prompt": ("prompt", "text"),
}


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture within a dataset of the package `datasets`."""

    table: Any
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"


@dataclass(frozen=True)
class Record:
    """The pictures of one example and its texts, both by column, and how often it counts in an epoch.
    `sizes` are the pictures' (width, height) in pixels, as they stand upright."""

    name: str
    pictures: dict[str, Path | Cell]
    texts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeats: int = 1


@dataclass(frozen=True)
class Source:
    """Records in a fixed order, where they came from, and what was passed over with the reason."""

    name: str
    flag: str
    records: tuple[Record, ...]
    skipped: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def columns(self) -> list[str]:
        """Pictures first, then texts, each in the order of the first record that has them."""
        pictures = dict.fromkeys(c for r in self.records for c in r.pictures)
        return [*pictures, *dict.fromkeys(c for r in self.records for c in r.texts if c not in pictures)]

    @property
    def places(self) -> list[int]:
        """The record at each place of an epoch: repeats count."""
        return [i for i, record in enumerate(self.records) for _ in range(record.repeats)]

    def column(self, name: str, *, flag: str, of: str = "texts") -> str:
        """The column that is called `name`, or what else it may be called. ValueError, naming `flag`, if it
        is missing, or if a record has nothing there; `of` is "pictures" or "texts"."""
        having = {c for r in self.records for c in getattr(r, of)}
        found = next((c for c in (name, *ALSO.get(name, ())) if c in having), None)
        if found is None:
            hint = "" if of == "pictures" else (
                "; captions come from metadata.csv, metadata.jsonl, or .txt files beside the pictures"
            ) if self.columns == ["image"] else ""  # fmt: skip
            raise ValueError(
                f"{flag} {name}: {self.name} has no such column, but {', '.join(self.columns)}{hint}"
            )
        for record in self.records:
            if found not in getattr(record, of):
                raise ValueError(f"{flag} {name}: {record.name} in {self.name} has none")
            if of == "texts":
                _check_caption(record, found, flag)
        return found

    def check_pairs(self, column: str, other: str, *, flag: str) -> None:
        """ValueError, naming `flag` and the files, if the pictures of a record are not of one shape."""
        for record in self.records:
            (w, h), (ow, oh) = record.sizes[column], record.sizes[other]
            if abs(w * oh - h * ow) > max(w, h, ow, oh):  # further apart than rounding to pixels explains
                raise ValueError(
                    f"{flag}: an unequal pair in {self.name}: {record.pictures[column]} is {w}x{h}, "
                    f"{record.pictures[other]} is {ow}x{oh}"
                )

    def open(self, number: int, column: str) -> Image.Image:
        """The RGB picture of record `number` in `column`."""
        return open_picture(self.records[number].pictures[column])

    def caption(self, number: int, column: str, generator: torch.Generator) -> str:
        """The text of record `number`; of several, one is drawn."""
        text = self.records[number].texts[column]
        if isinstance(text, str):
            return text
        return text[torch.randint(len(text), (), generator=generator).item()]

    def with_prompt(self, prompt: str, column: str = "text") -> "Source":
        """The same with `prompt` for a caption where a record has none."""
        records = (replace(r, texts={column: prompt} | r.texts) for r in self.records)
        return replace(self, records=tuple(records))

    def split(self, share: float, seed: int) -> tuple["Source", "Source"]:
        """What to train on, and a held-out part drawn by the seed: a `share` of the records below 1, at least
        one, or so many of them. ValueError if nothing is left to train on."""
        count = max(1, round(len(self) * share)) if share < 1 else int(share)
        if count >= len(self):
            raise ValueError(f"--validation_split {share:g} leaves none of {len(self)} examples to train on")
        held = set(drawn(len(self), count, seed, "held out"))
        parts = (
            [r for i, r in enumerate(self.records) if i not in held],
            [self.records[i] for i in sorted(held)],
        )
        return tuple(replace(self, records=tuple(part)) for part in parts)

    def summary(self, caption_column: str | None = None) -> str:
        """Pictures, captions, sizes, and what was passed over and why."""
        sizes = Counter(size for r in self.records for size in r.sizes.values())
        count, places = sum(len(r.pictures) for r in self.records), len(self.places)
        column = caption_column or next((c for c in ("text", "prompt") if c in self.columns), None)
        captions = sum(column in r.texts for r in self.records)
        lines = [f"{count} pictures in {self.name}, {captions} with a caption"]
        if not count == len(self) == places:
            epoch = f", {places} in an epoch" if places > len(self) else ""
            lines.append(f"  examples: {len(self)}{epoch}")
        lines.append(f"  columns: {', '.join(self.columns)}")
        common = [f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4)]
        lines.append(f"  sizes: {_listed(common, len(sizes))}")
        if self.hidden:
            lines.append(f"  hidden: {_listed(self.hidden[:4], len(self.hidden))}")
        lines += [f"  passed over: {reason}" for reason in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  passed over: {len(self.skipped) - SHOWN} more")
        return "\n".join(lines)


def _listed(shown, total: int) -> str:
    return ", ".join(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")


def join(sources: list[Source]) -> Source:
    """Several as one: the concepts of Custom Diffusion."""
    return Source(
        name=", ".join(s.name for s in sources),
        flag=sources[0].flag,
        records=tuple(r for s in sources for r in s.records),
        skipped=tuple(reason for s in sources for reason in s.skipped),
        hidden=tuple(name for s in sources for name in s.hidden),
    )


def open_picture(picture: Path | Cell) -> Image.Image:
    """Decode it. ValueError, naming it, if it cannot be."""
    if isinstance(picture, Path):
        return images.open_image(picture)
    value = picture.table[picture.row][picture.column]
    if value is None:
        raise ValueError(f"{picture} is empty")
    if isinstance(value, bytes):
        value = {"bytes": value}
    if value["bytes"] is None:
        return images.open_image(Path(value["path"]))
    return images.open_image(Path(str(picture)), value["bytes"])


def _check_caption(record: Record, column: str, flag: str) -> None:
    text = record.texts[column]
    several = isinstance(text, list | tuple) and text and all(isinstance(t, str) for t in text)
    if not isinstance(text, str) and not several:
        raise ValueError(f"{flag} {column}: that of {record.name} is no text, nor a list of them: {text!r}")


def drawn(total: int, count: int | None, seed: int, what: str) -> list[int]:
    """So many numbers below `total`, in order, drawn by the seed; all of them if `count` is None."""
    return sorted(torch.randperm(total, generator=noise.generator(seed, what))[:count].tolist())
