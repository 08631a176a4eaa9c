"""--check_data: what a run would find wrong with the data, by decoding all of it, and what else is odd."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from minisd.data.images import Cell
from minisd.data.records import ABSENT
from minisd.data.source import Source
from minisd.methods._base import Method
from minisd.models.tokenizer import Tokenizer

SHOWN = 20  # names in a line


def report(method: Method) -> int:
    """Print a report on the method's data. ValueError if a run would refuse it, or stop at a bad image."""
    source = method.read()  # every image has been decoded, and the bad ones are left out
    problems, dataset = list(source.bad), None
    method.setup()
    # Class images need not be there yet, and what is held out is to be in the report.
    unused = {"with_prior_preservation": False, "validation_split": 0.0}
    unused = {name: value for name, value in unused.items() if name in vars(method.options)}
    method.options = replace(method.options, **unused)
    try:
        dataset, _ = method.datasets()
    except ValueError as e:
        problems.append(str(e))
    print((dataset or source).summary())
    column = dataset.caption_column if dataset else source.guess_captions()
    report_captions(source, column, None if method.sd.is_pixels else method.sd.tokenizer)
    print(f"  the same content: {listed([' = '.join(group) for group in duplicates(source)])}")
    for problem in problems:
        print(f"  wrong: {problem}")
    if problems:
        raise ValueError(f"--check_data: problems in {source.name}: {len(problems)}")
    return 0


def report_captions(source: Source, column: str | None, tokenizer: Tokenizer | None) -> None:
    """Print which captions in a column are missing, and which are cut off."""
    if column is None or tokenizer is None:
        return
    missing, long, most = [], [], tokenizer.max_length - 2  # without start and end
    texts = source.records.texts.get(column, [ABSENT] * len(source))
    for name, text in zip(source.records.names, texts, strict=True):
        if text in (ABSENT, None, ""):
            missing.append(name)
        elif any(len(tokenizer.encode(t)) > most for t in ([text] if isinstance(text, str) else text)):
            long.append(name)
    print(f"  without a caption: {listed(missing)}")
    print(f"  captions of more than {most} tokens, which are cut off: {listed(long)}")


def listed(names: Sequence[str]) -> str:
    """The number of names, and the first of them."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})" if names else "0"


def duplicates(source: Source) -> list[list[str]]:
    """The images that have the same content, byte by byte."""
    pictures = source.records.different_pictures()
    lengths = [None if isinstance(p, Cell) else os.path.getsize(p) for p in pictures]
    often = Counter(lengths)
    candidates = [p for p, length in zip(pictures, lengths, strict=True) if often[length] > 1]
    same = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for picture, digest in zip(candidates, pool.map(_digest, candidates), strict=True):
            same[digest].append(str(picture))
    return [group for group in same.values() if len(group) > 1]


def _digest(picture: str | Cell) -> bytes:
    content = picture.read_bytes() if isinstance(picture, Cell) else Path(picture).read_bytes()
    return hashlib.blake2b(content).digest()
