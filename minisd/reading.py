"""Text and JSON that others wrote, with one line for whatever is wrong with it.

Standard library only. What is read must be a regular file of a bounded size: reading a pipe or a
device may never end.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MOST = 1 << 26  # bytes


def real(path: Path | str) -> Path:
    """The absolute path without links. Unlike Path.resolve before Python 3.13, no loop of links is a
    RuntimeError: whoever opens it gets an OSError."""
    return Path(os.path.realpath(path))


def check_regular(path: Path | str, most: float = MOST) -> None:
    """Raise a ValueError, naming the path, unless it is a regular file of at most `most` bytes."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            raise ValueError(f"{path} does not exist") from None
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # a name that no file can have
        raise ValueError(f"{path} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a file")
    if status.st_size > most:
        raise ValueError(f"{path} has {status.st_size:,} bytes; at most {most:,} are read")


def text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. ValueError, naming the file, if there
    is none."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}") from None


def lines(path: Path, flag: str) -> list[str]:
    """The lines of a text file that are not empty. ValueError, naming the flag, if there are none."""
    try:
        found = [line.strip() for line in text(path).splitlines() if line.strip()]
    except ValueError as e:
        raise ValueError(f"--{flag}: {e}") from None
    if not found:
        raise ValueError(f"--{flag} {path} has no prompt")
    return found


def parse_json(text: str, source: Path | str) -> Any:
    """The value of a JSON text. ValueError, naming `source`, if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{source}: bad JSON: {error.msg} at {where}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too deep
        raise ValueError(f"{source}: bad JSON: {str(error).splitlines()[0]}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError, naming the file, if there is none."""
    return an_object(parse_json(text(path), path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. ValueError, naming the file, if there is none."""
    import tomllib  # for few commands

    try:
        return tomllib.loads(text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: bad TOML: {error}") from None


def an_object(value: Any, source: Path | str) -> dict[str, Any]:
    """`value`, if it is a JSON object. ValueError, naming `source`, if it is something else."""
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a {type(value).__name__}, not a JSON object")
    return value
