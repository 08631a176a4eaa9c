"""README and docs: the files, flags and links in them are there, and the code in them runs."""

import functools
import importlib.util
import re
import shlex
import string
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from minisd import cli, registry
from minisd.sampling.options import Sample
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    ROOT / "minisd" / "tiny" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each code block."""
    return ((m[1], m[2]) for m in BLOCK.finditer(page.read_text(encoding="utf-8")))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """Those of train.py and sample.py in the code blocks, with the variables that are set there filled in."""
    for language, content in blocks(page):
        if language:
            continue
        variables = {}
        for name, value in re.findall(r'^([A-Z]+)="(.*?)"$', content, re.MULTILINE | re.DOTALL):
            variables[name] = string.Template(value).safe_substitute(variables)
        for line in content.replace("\\\n", " ").splitlines():
            if re.search(r"\b(train|sample)\.py ", line):
                yield shlex.split(string.Template(line).safe_substitute(variables), comments=True)


# --- Files and links ---------------------------------------------------------------------------------------


@pages
def test_files_that_are_named_exist(page):
    """Those of the repository: below one of its folders, or with a suffix that users' files do not have."""
    tops = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    named = set(re.findall(r"(?<![\w./-])[\w./-]+\.py\b", page.read_text()))
    named |= {n for n in re.findall(r"`([\w./-]+)`", prose(page)) if "/" in n and n.partition("/")[0] in tops}
    assert named
    for name in named - {"__init__.py"}:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text()), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in slugs, target


def test_every_page_can_be_found():
    """From the README, by one link or two; and every method has its recipe."""
    readme, link = PAGES[0], re.compile(r"\]\(([\w/.]+\.md)")
    reached = {ROOT / name for name in link.findall(readme.read_text())}
    reached |= {(page.parent / name).resolve() for page in reached for name in link.findall(page.read_text())}
    assert set(PAGES[1:]) <= reached
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    for method in registry.names("methods"):
        assert f"`{method}`" in readme.read_text() and f"--method {method} " in recipes, method


# --- Flags -------------------------------------------------------------------------------------------------


@pages
def test_commands_parse(page, tmp_path, monkeypatch):
    """As train.py and sample.py would parse them, from a folder with the files that these read at once."""
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "minisd"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "sweep.csv").write_text("seed\n1\n")
    (tmp_path / "samples").mkdir()
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "a cat\nSteps: 20, Sampler: DDIM, Seed: 1, Model: tiny")
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "00000-seed-0.png", pnginfo=about)
    for command in commands(page):
        for script, parse in (("train.py", cli.parse_train), ("sample.py", cli.parse_sample)):
            if script in command:
                parse(command[command.index(script) + 1 :])


@functools.cache
def known_flags() -> set[str]:
    """Those of train.py, of sample.py, and of the tools in the repository."""
    classes = {c for m in registry.names("methods") for c in registry.load("methods", m).Options.__mro__}
    declared = [f for c in classes | {*Sample.__mro__} if is_dataclass(c) for f in fields(c)]
    known = {f"--{name}" for f in declared for name in (f.name, *f.metadata.get("also", ()))}
    folders = "kernels", "minisd", "minisd/tiny", "tests"
    tools = [p for folder in folders for p in (ROOT / folder).glob("*.py")]
    return known | {flag for p in tools for flag in re.findall(r'"(--\w+)"', p.read_text())}


@pages
def test_flags_in_the_text_exist(page):
    for flag in re.findall(r"`(--[\w-]+)", prose(page)):
        assert {flag, flag.replace("--no-", "--", 1)} & known_flags(), flag


# --- Code --------------------------------------------------------------------------------------------------


@pages
def test_what_code_imports_is_there(page):
    for name in re.findall(r"(?:python -m|import) (minisd[.\w]*)", page.read_text()):
        assert importlib.util.find_spec(name), name
    for language, content in blocks(page):
        if language == "python":
            lines = [line for line in content.splitlines() if re.match(r"(import|from) minisd", line)]
            exec("\n".join(lines), {})
