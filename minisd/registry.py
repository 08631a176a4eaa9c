"""A folder is a registry: each file in it is one method, scheduler or format. Standard library only.

A method or a scheduler may also be a file from outside, by its path, which ends in .py. Such a path is code,
so it is taken only from who runs the program: see `admit`.
"""

import ast
import difflib
import functools
import hashlib
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from minisd import reading

HERE = Path(__file__).parent
# What a file from outside defines.
NEEDED = {"methods": ("Options",), "schedulers": ("SETTINGS", "sample"), "rewards": ("reward",)}
_admitted: dict[str, str] = {}  # the source of each, by its path as it was given
_classes: set[str] = set()  # MODULE.CLASS that was admitted


def admit(name: str) -> None:
    """Read the file `name` if it is a path that ends in .py: from here on it stands for a module. Another
    name may be a MODULE.CLASS, which may then be imported. To be called with what the user typed, and never
    with a name from a file, which may be a stranger's. ValueError if the file cannot be read."""
    if name.endswith(".py"):
        _admitted[name] = reading.text(Path(name))
    else:
        _classes.add(name)


def find_class(path: str) -> Any:
    """What MODULE.CLASS names in an installed package. ValueError if it was not admitted."""
    module, _, name = path.rpartition(".")
    if path not in _classes:
        raise ValueError("it is code, and runs only if the command line names it")
    return getattr(importlib.import_module(module), name)


def digest(name: str) -> str | None:
    """The SHA-256 of the source of a file from outside; None for what is in the folders."""
    return hashlib.sha256(_admitted[name].encode()).hexdigest() if name in _admitted else None


def names(package: str) -> list[str]:
    """The modules of minisd/<package>/, sorted, without those whose name begins with `_`."""
    return sorted(path.stem for path in (HERE / package).glob("[!_]*.py"))


def find(package: str, name: str) -> str:
    """The module of this name, or of this name in A1111 or diffusers, in any case and spacing; or the path of
    a file that was admitted. ValueError, with the nearest name, if there is none."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9+]", "", text.lower())

    if name in names(package) or name in _admitted:
        return name
    if name.endswith(".py"):
        raise ValueError(f"{name} is code: it runs only if the command line names it")
    known = {plain(alias): n for n in names(package) for alias in (n, *_other_names(package, n))}
    if plain(name) in known:
        return known[plain(name)]
    close = difflib.get_close_matches(plain(name), known, n=1)
    listed = f"one of: {', '.join(names(package))}" if known else "give FILE.py, one of your own"
    advice = f"did you mean {known[close[0]]!r}?" if close else listed
    raise ValueError(f"unknown {package.removesuffix('s')} {name!r}; {advice}")


def find_scheduler(name: str) -> tuple[str, str | None]:
    """The scheduler of this name, and the schedule type with which the name ends, as A1111's older ones such
    as "DPM++ 2M Karras" do. ValueError if there is no such scheduler."""
    plain, kind = split_scheduler(name)
    return find("schedulers", plain), kind


def split_scheduler(name: str) -> tuple[str, str | None]:
    """A scheduler's name, and the schedule type with which it ends."""
    words = re.fullmatch(r"(.*?)[\s_]+(karras|exponential|sgm[\s_]uniform)", name.strip(), re.IGNORECASE)
    return (words[1], re.sub(r"\s", "_", words[2].lower())) if words else (name.strip(), None)


def load(package: str, name: str) -> ModuleType:
    """Import minisd.<package>.<name>, or run the file from outside. ValueError if there is no such file, or
    if the one from outside does not run, or lacks what the package needs."""
    name = find(package, name)
    if name not in _admitted:
        return importlib.import_module(f"minisd.{package}.{name}")
    module = _run(package, name, _admitted[name])
    for needed in NEEDED[package]:
        if not hasattr(module, needed):
            raise ValueError(f"{name} is not one of the {package}: it has no {needed}")
    return module


@functools.cache
def _run(package: str, name: str, source: str) -> ModuleType:
    """The module of a file from outside, run once for all of its users."""
    module = ModuleType(f"outside.{package}.{Path(name).stem}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(source, name, "exec"), vars(module))
    except (Exception, SystemExit) as e:
        line, trace = getattr(e, "lineno", None), e.__traceback__
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == name else line
            trace = trace.tb_next
        raise ValueError(f"{name} line {line}: {type(e).__name__}: {e}") from e
    return module


def load_class(package: str, name: str) -> type:
    """The class of a module that has the file's name without underscores, in any case: `TextToImage` in
    `text_to_image`. ValueError if a file from outside has none."""
    module, plain = load(package, name), re.sub(r"[\W_]", "", Path(name).stem).lower()
    for key, value in vars(module).items():
        if key.lower() == plain and isinstance(value, type):
            return value
    raise ValueError(f"{name} has no class of its name, {plain!r} in any case")


def _source(package: str, name: str) -> str:
    return _admitted.get(name) or (HERE / package / f"{name}.py").read_text(encoding="utf-8")


def _other_names(package: str, name: str) -> list[str]:
    """The module's constants A1111 and DIFFUSERS, those that it has, read without running the file."""
    return re.findall(r'^(?:A1111|DIFFUSERS) = "(.+)"', _source(package, name), re.MULTILINE)


def summary(package: str, name: str) -> str:
    """First line of a module's docstring, read without running the file."""
    return (ast.get_docstring(ast.parse(_source(package, name))) or "").partition("\n")[0]


def match(package: str, subject: Any) -> ModuleType:
    """The module whose `matches(subject)` is true. ValueError if there is none."""
    modules = {name: load(package, name) for name in names(package)}
    modules = {name: module for name, module in modules.items() if hasattr(module, "matches")}
    for module in modules.values():
        if module.matches(subject):
            return module
    known = "; ".join(f"{name}: {summary(package, name).rstrip('.')}" for name in modules)
    raise ValueError(f"{subject} is none of the formats that minisd reads ({known})")
