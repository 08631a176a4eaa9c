"""A folder is a registry: each file in it is one method, scheduler or format. Standard library only."""

import ast
import difflib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def names(package: str) -> list[str]:
    """The modules of minisd/<package>/, sorted, without those whose name begins with `_`."""
    return sorted(path.stem for path in (HERE / package).glob("[!_]*.py"))


def find(package: str, name: str) -> str:
    """The module of this name, or of this name in A1111 or diffusers, in any case and spacing. ValueError,
    with the nearest name, if there is none."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9+]", "", text.lower())

    if name in names(package):
        return name
    known = {plain(alias): n for n in names(package) for alias in (n, *_other_names(package, n))}
    if plain(name) in known:
        return known[plain(name)]
    close = difflib.get_close_matches(plain(name), known, n=1)
    advice = f"did you mean {known[close[0]]!r}?" if close else f"one of: {', '.join(names(package))}"
    raise ValueError(f"unknown {package.removesuffix('s')} {name!r}; {advice}")


def find_scheduler(name: str) -> tuple[str, bool]:
    """The scheduler of this name, and whether the name ends in " Karras" as A1111's older ones do. ValueError
    if there is none."""
    plain = re.sub(r"[\s_]+karras$", "", name.strip(), flags=re.IGNORECASE)
    return find("schedulers", plain), plain != name.strip()


def load(package: str, name: str) -> ModuleType:
    """Import minisd.<package>.<name>. ValueError if the folder has no such file."""
    return importlib.import_module(f"minisd.{package}.{find(package, name)}")


def load_class(package: str, name: str) -> type:
    """The class of a module that has the file's name without underscores, in any case: `TextToImage` in
    `text_to_image`."""
    module = load(package, name)
    return next(value for key, value in vars(module).items() if key.lower() == name.replace("_", ""))


def _source(package: str, name: str) -> str:
    return (HERE / package / f"{name}.py").read_text(encoding="utf-8")


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
