"""Examples by column: a hundred thousand take some thirty megabytes, and a pass over them little time."""

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisd.data.images import Cell

COMMON = 4  # sizes that a summary shows
ABSENT = ...  # in a column, where a record has no such image or text
Size = tuple[int, int]


@dataclass(frozen=True)
class Record:
    """The images and texts of one example, by column. `sizes` are (width, height) of the images in pixels,
    after EXIF rotation; `repeats` is the number of times that the record occurs in an epoch."""

    name: str
    pictures: dict[str, Path | Cell]
    texts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    repeats: int = 1


class Records(Sequence):
    """Records in a fixed order: lists with an entry for each, by column. Paths are texts."""

    lanes: tuple | None = None  # of an index: what `order.Lanes` needs
    checked = False  # whether no column has to be looked through for what is missing or wrong

    def __init__(self, records: Iterable[Record] = ()):
        self.names: list[str] = []
        self.repeats: list[int] = []
        self.pictures: dict[str, list[str | Cell]] = {}
        self.texts: dict[str, list[Any]] = {}
        self.sizes: dict[str, list[Size]] = {}
        for r in records:
            pictures = {c: str(p) if isinstance(p, Path) else p for c, p in r.pictures.items()}
            columns = ({c: [v] for c, v in values.items()} for values in (pictures, r.texts, r.sizes))
            pictures, texts, sizes = columns
            self.extend([r.name], pictures, texts, [r.repeats], sizes)

    def extend(
        self,
        names: Sequence[str],
        pictures: Mapping[str, Sequence[str | Cell]],
        texts: Mapping[str, Sequence[Any]],
        repeats: Sequence[int] | None = None,
        sizes: Mapping[str, Sequence[Size]] | None = None,
    ) -> None:
        """Append records that all have the same columns."""
        pairs = (self.pictures, pictures), (self.texts, texts), (self.sizes, sizes or {})
        for columns, values in pairs:
            for column in dict.fromkeys([*columns, *values]):
                entries = columns.setdefault(column, [ABSENT] * len(self.names))
                entries.extend(values.get(column, [ABSENT] * len(names)))
        self.names.extend(names)
        self.repeats.extend(repeats or [1] * len(names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        name, repeats = self.names[index], self.repeats[index]
        pictures, texts, sizes = (
            {column: entries[index] for column, entries in columns.items() if entries[index] is not ABSENT}
            for columns in (self.pictures, self.texts, self.sizes)
        )
        pictures = {c: Path(p) if isinstance(p, str) else p for c, p in pictures.items()}
        return Record(name, pictures, texts, sizes, repeats)

    @property
    def epoch(self) -> Sequence[int]:
        """The number of the record at each index of an epoch; records with repeats occur several times."""
        if self.repeats.count(1) == len(self):
            return range(len(self))
        return [i for i, repeats in enumerate(self.repeats) for _ in range(repeats)]

    def common_sizes(self) -> tuple[int, list[tuple[Size, int]], int]:
        """The number of images, the commonest of their sizes, with the number of each, and how many other
        sizes there are."""
        sizes = Counter(size for column in self.sizes.values() for size in column)
        del sizes[ABSENT]
        return sizes.total(), sizes.most_common(COMMON), max(0, len(sizes) - COMMON)

    def count_texts(self, column: str | None) -> int:
        """The number of records that have a text in a column."""
        return sum(text is not ABSENT for text in self.texts.get(column, ()))

    def different_pictures(self) -> list[str | Cell]:
        """Each image once: several records may share one."""
        columns = self.pictures.values()
        return list(dict.fromkeys(p for column in columns for p in column if p is not ABSENT))

    def take(self, numbers: Sequence[int]) -> "Records":
        """The records of these numbers, in this order."""
        taken = Records()
        taken.names, taken.repeats = ([entries[i] for i in numbers] for entries in (self.names, self.repeats))
        for name in ("pictures", "texts", "sizes"):
            columns = {c: [entries[i] for i in numbers] for c, entries in getattr(self, name).items()}
            setattr(taken, name, columns)
        return taken

    def with_prompt(self, prompt: str | Sequence[str], column: str) -> "Records":
        """The same records, with `prompt` as the text in a column of those without one."""
        texts = self.texts.get(column, [ABSENT] * len(self))
        return self.with_texts(**{column: [prompt if text is ABSENT else text for text in texts]})

    def with_texts(self, **columns: list[Any]) -> "Records":
        """The same records with other texts in these columns."""
        changed = copy.copy(self)
        changed.texts = self.texts | columns
        return changed

    def described(self) -> Iterator[str]:
        """All of each record but where its images are, as a text."""
        sizes, texts = (self._by_record(columns) for columns in (self.sizes, self.texts))
        return map(repr, zip(self.names, self.repeats, sizes, texts, strict=True))

    def _by_record(self, columns: Mapping[str, list[Any]]) -> Iterator[list[tuple[str, Any]]]:
        """The columns that a record has and its values, sorted, for each record."""
        pairs = [zip(itertools.repeat(column), values) for column, values in sorted(columns.items())]
        rows = zip(*pairs, strict=False) if pairs else itertools.repeat((), len(self))
        if not any(ABSENT in values for values in columns.values()):
            return map(list, rows)
        return ([pair for pair in row if pair[1] is not ABSENT] for row in rows)
