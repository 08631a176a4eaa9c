"""A folder is a registry: what minisd can do is the listing of its folders. Standard library only."""

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def names(package: str) -> list[str]:
    """The modules of minisd/<package>/, sorted; a file whose name begins with `_` is not one of them."""
    return sorted(path.stem for path in (HERE / package).glob("[!_]*.py"))


def load(package: str, name: str) -> ModuleType:
    """Import minisd.<package>.<name>. ValueError if the folder has no such file."""
    if name not in names(package):
        raise ValueError(f"{name!r} is not one of minisd/{package}: {', '.join(names(package))}")
    return importlib.import_module(f"minisd.{package}.{name}")


def summary(package: str, name: str) -> str:
    """First line of a module's docstring, read without running the file."""
    text = (HERE / package / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def match(package: str, subject: Any) -> ModuleType:
    """The module whose `matches(subject)` is true. ValueError if there is none."""
    modules = {name: load(package, name) for name in names(package)}
    modules = {name: module for name, module in modules.items() if hasattr(module, "matches")}
    for module in modules.values():
        if module.matches(subject):
            return module
    known = "; ".join(f"{name}: {summary(package, name).rstrip('.')}" for name in modules)
    raise ValueError(f"{subject} is none of the formats that minisd reads ({known})")
