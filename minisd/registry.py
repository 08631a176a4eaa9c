"""A folder is a registry: what minisd can do is the listing of its folders. Standard library only."""

import ast
import difflib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def names(package: str) -> list[str]:
    """The modules of minisd/<package>/, sorted; a file whose name begins with `_` is not one of them."""
    return sorted(path.stem for path in (HERE / package).glob("[!_]*.py"))


def find(package: str, name: str) -> str:
    """The module of this name, or that A1111 calls so, in any case and spacing. ValueError, with the nearest
    name, if there is none."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9+]", "", text.lower())

    if name in names(package):
        return name
    known = {plain(n): n for n in names(package)}
    known |= {plain(_constant(package, n, "A1111") or n): n for n in names(package)}
    if plain(name) in known:
        return known[plain(name)]
    close = difflib.get_close_matches(plain(name), known, n=1)
    advice = f"did you mean {known[close[0]]!r}?" if close else f"one of: {', '.join(names(package))}"
    raise ValueError(f"unknown {package.removesuffix('s')} {name!r}; {advice}")


def load(package: str, name: str) -> ModuleType:
    """Import minisd.<package>.<name>. ValueError if the folder has no such file."""
    return importlib.import_module(f"minisd.{package}.{find(package, name)}")


def _parsed(package: str, name: str) -> ast.Module:
    return ast.parse((HERE / package / f"{name}.py").read_text(encoding="utf-8"))


def _constant(package: str, name: str, constant: str) -> Any:
    """What a module assigns to `constant`, read without running the file; None if nothing."""
    for node in _parsed(package, name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return ast.literal_eval(node.value)
    return None


def summary(package: str, name: str) -> str:
    """First line of a module's docstring, read without running the file."""
    return (ast.get_docstring(_parsed(package, name)) or "").partition("\n")[0]


def match(package: str, subject: Any) -> ModuleType:
    """The module whose `matches(subject)` is true. ValueError if there is none."""
    modules = {name: load(package, name) for name in names(package)}
    modules = {name: module for name, module in modules.items() if hasattr(module, "matches")}
    for module in modules.values():
        if module.matches(subject):
            return module
    known = "; ".join(f"{name}: {summary(package, name).rstrip('.')}" for name in modules)
    raise ValueError(f"{subject} is none of the formats that minisd reads ({known})")
