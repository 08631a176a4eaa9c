"""Rows of text columns: metadata.jsonl, .csv and .parquet beside pictures, and the package `datasets`."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

# Files whose rows describe the pictures of their folder and of those below it; the first that is there
# counts. prompt.json holds ControlNet's {"source", "target", "prompt"} lines.
NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "prompt.json", "prompt.jsonl")

Row = tuple[str, dict]  # where it stands ("metadata.csv, line 3"), and its columns


def read(path: Path) -> list[Row]:
    """All rows of a metadata file. ValueError, naming file and line, where it is broken."""
    readers: dict[str, Callable] = {".csv": _csv, ".parquet": _parquet}
    rows = readers.get(path.suffix, _jsonl)(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    where, first = rows[0]
    for other, row in rows:
        if row.keys() != first.keys():
            raise ValueError(
                f"{other}: the columns are {', '.join(row)}, but those of {where} are {', '.join(first)}"
            )
    return rows


def text(path: Path) -> str:
    """The content of a file in UTF-8, with or without a byte order mark. ValueError if it is not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not in UTF-8: {e.reason} at byte {e.start}") from None


def _jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines: a caption may hold U+2028, which ends no line of JSON.
    for number, line in enumerate(text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}, line {number}: bad JSON: {e.msg} at column {e.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object: {line.strip()[:40]}")
        rows.append((f"{path}, line {number}", row))
    return rows


def _csv(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(text(path), newline=""), strict=True)
    header, rows, line = None, [], 1
    try:
        for cells in reader:
            # A quoted cell may span lines: the row is named by its first one.
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: a column is named twice: {', '.join(header)}")
            elif len(cells) != len(header):
                raise ValueError(
                    f"{where}: {len(cells)} cells under {len(header)} columns ({', '.join(header)}); "
                    "a text with a comma in it stands in double quotes"
                )
            else:
                rows.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as e:
        raise ValueError(f"{path}, line {line}: {e}") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'minisd[datasets]'") from None
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(table)]


def find(files: list[Path]) -> tuple[Path | None, list[Path]]:
    """The metadata file among the files of a folder, and the further ones, which do not count."""
    by_name = {p.name: p for p in files}
    found = [
        by_name[n] for n in NAMES if n in by_name and (n.startswith("metadata") or _is_pairs(by_name[n]))
    ]
    return (found[0], found[1:]) if found else (None, [])


def _is_pairs(path: Path) -> bool:
    """Whether a prompt.json is ControlNet's: it may be anybody's."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(100_000)
    return '"source"' in first and '"target"' in first


def split(row: dict) -> tuple[dict, dict]:
    """The file names of a row by the column of their pictures, and its texts by column."""
    names = {}
    for column, value in row.items():
        if column == "file_name":
            names["image"] = value
        elif column.endswith("_file_name"):
            names[column.removesuffix("_file_name")] = value
        elif column in ("source", "target") and {"source", "target"} <= row.keys():
            names[column] = value
    files = {"file_name", *(f"{n}_file_name" for n in names)} | ({"source", "target"} & names.keys())
    return names, {column: value for column, value in row.items() if column not in files}


def needs_datasets(folder: Path) -> bool:
    """Whether a folder is one of the package `datasets`: saved by it, or with parquet files for pictures."""
    saved = any((folder / n).is_file() for n in ("dataset_info.json", "dataset_dict.json"))
    return saved or any(p.name != "metadata.parquet" for p in folder.rglob("*.parquet"))


def load_dataset(name: str, config: str | None, cache_dir: str | None, *, flag: str):
    """The split "train" of a dataset on the hub, of one saved in a folder, or of a local parquet file, its
    pictures left undecoded; the names of its columns of pictures, and of those of texts."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{flag} {name} needs the package `datasets`: pip install 'minisd[datasets]'"
        ) from None
    path = Path(name)
    if path.suffix == ".parquet" and not path.is_file():
        raise ValueError(f"{flag}: there is no {path}")
    try:
        if path.suffix == ".parquet":
            data = datasets.load_dataset("parquet", data_files=name, split="train", cache_dir=cache_dir)
        elif any((path / n).is_file() for n in ("dataset_info.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data["train"] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, config, split="train", cache_dir=cache_dir)
    except Exception as e:  # of many kinds: its own, the network's, the hub's
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{flag} {name}: {lines[0]}") from e
    pictures, texts = [], []
    for column, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
            pictures.append(column)
        elif (isinstance(kind, dict) and "bytes" in kind) or _dtype(kind) in ("binary", "large_binary"):
            pictures.append(column)  # parquet that something else has written
        elif _dtype(kind) in ("string", "large_string"):
            texts.append(column)
    return data, pictures, texts


def _dtype(kind) -> str | None:
    """That of a column, or of what its lists hold."""
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(inner, "dtype", None)
