"""Command lines from option dataclasses. Standard library only, so that `--help` answers at once."""

import argparse
import ctypes
import difflib
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path

from minisd import registry
from minisd.options import TINY
from minisd.sampling import infotext, sweep
from minisd.sampling.options import Job, Sample, default_of

WORDS = {None: "none", False: "no", True: "yes", "": "none"}  # how defaults are shown in the help


def spellings(cls: type, f: Field) -> list[str]:
    """The field's own name first, then its other ones."""
    return [f.name, *_metadata(cls, f.name).get("also", ())]


def _metadata(cls: type, name: str) -> Mapping:
    """Help and aliases from the nearest class that gives any: redeclaring a field changes its default alone."""
    for c in cls.__mro__:
        f = c.__dict__.get("__dataclass_fields__", {}).get(name)
        if f is not None and "help" in f.metadata:
            return f.metadata
    return {}


def _declared_in(cls: type, name: str) -> type:
    """The base-most class that declares a field: its group in the help."""
    return [c for c in cls.__mro__ if name in c.__dict__.get("__annotations__", {})][-1]


def _help(cls: type, f: Field) -> str:
    """The help of a flag, with its default unless that is said in words."""
    metadata, default = _metadata(cls, f.name), default_of(f)
    text = metadata.get("help", "")
    if "listing" in metadata:
        text += ": " + ", ".join(registry.names(metadata["listing"]))
    if default is not MISSING and not (default in (None, []) and "default" in text):
        shown = " ".join(map(str, default)) or "none" if isinstance(default, list) else default
        shown = WORDS.get(shown, shown) if isinstance(shown, bool | str | None) else shown
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _add_flag(group, cls: type, f: Field, hint) -> None:
    # What is not given is not in the namespace: the dataclass has the defaults.
    default = default_of(f)
    kwargs = {"dest": f.name, "required": default is MISSING, "default": argparse.SUPPRESS}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None, and Literal[...] | None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if hint is bool:
        kwargs["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is typing.Literal:
        kwargs["choices"] = typing.get_args(hint)
    elif typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        choices = typing.get_args(item)  # of list[Literal[...]]
        kwargs |= {"nargs": "+", **({"choices": choices} if choices else {"type": item, "metavar": "X"})}
        if not default:
            kwargs["action"] = "extend"  # given twice, it adds up
    else:
        kwargs |= {"type": hint, "metavar": hint.__name__.upper()}
    group.add_argument(*(f"--{name}" for name in spellings(cls, f)), help=_help(cls, f), **kwargs)


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2: the usage of fifty flags would bury the reason."""

    where = ""  # what is parsed, if it is not the command line itself

    def error(self, message):
        print(f"{self.prog}: error: {self.where}{message}", file=sys.stderr)
        sys.exit(2)


def parser_of(cls: type, prog: str, description: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=110),
    )
    hints = typing.get_type_hints(cls)
    for owner in cls.__mro__:  # the command's own flags first, then the shared groups
        declared = (
            [f for f in fields(cls) if _declared_in(cls, f.name) is owner] if owner is not object else []
        )
        if declared:
            group = parser.add_argument_group((owner.__doc__ or owner.__name__).partition("\n")[0])
            for f in declared:
                _add_flag(group, cls, f, hints[f.name])
    return parser


def parse(
    parser: Parser,
    cls: type,
    argvs: Mapping[str, list[str]],
    command: str,
    owners: Callable[[str], list[str]] = lambda name: [],
):
    """The options that several command lines come to, the last of which has priority; errors in one begin
    with its key. Exits with status 2 and one line if they are wrong; `owners(name)` are the methods that have
    a flag which this command lacks. Without --model, the tiny model's defaults for `command` hold."""
    known, values = parser._option_string_actions, {}
    for parser.where, argv in argvs.items():
        for name in (arg.partition("=")[0] for arg in argv):  # before argparse complains of what is missing
            if not name.startswith("--") or name == "--" or name in known:
                continue
            if others := owners(name[2:]):
                parser.error(f"{name} is not a flag of this method; it belongs to: {', '.join(others)}")
            close = difflib.get_close_matches(name, known, n=1)
            parser.error(f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else ""))
        values |= vars(parser.parse_args(argv))
    if any(f.name == "model" for f in fields(cls)) and values.get("model") is None:
        defaults = json.loads((TINY / "defaults.json").read_text()).get(command, {})
        values = {"model": str(TINY), **defaults, **values}
        say("no --model: the tiny one in the box (64x64 emoji); for SD v1.x give its folder, file or hub id")
    try:
        return cls(**values)
    except ValueError as e:
        parser.error(str(e))


@functools.cache
def say(line: str) -> None:
    """Print it, but once."""
    print(line)


def options_of(method: str) -> type:
    return registry.load("methods", method).Options


def parse_train(argv: list[str]) -> tuple[str, object]:
    """(method name, its Options). Exits with status 2 and one clear line when the flags are wrong."""
    early = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    early.add_argument("--method")
    known, rest = early.parse_known_args(argv)
    names = registry.names("methods")
    if known.method is None:
        if "-h" in rest or "--help" in rest:
            methods = "".join(f"  {name:20} {registry.summary('methods', name)}\n" for name in names)
            print(f"usage: train.py --method METHOD [flags]\n\nmethods:\n{methods}")
            print("train.py --method METHOD --help lists the flags of one method")
            sys.exit(0)
        early.error(f"--method is required, one of: {', '.join(names)}")
    try:
        method = registry.find("methods", known.method)
    except ValueError as e:
        early.error(str(e))

    def owners(name: str) -> list[str]:
        return [m for m in names if any(name in spellings(options_of(m), f) for f in fields(options_of(m)))]

    cls = options_of(method)
    parser = parser_of(cls, f"train.py --method {method}", registry.summary("methods", method))
    return method, parse(parser, cls, {"": rest}, method, owners)


def parse_sample(argv: list[str]) -> list[Job]:
    """What to draw: what argv says; where it says nothing, what the picture of --like says; and once for each
    row of --csv, which has priority over both."""
    early = Parser(prog="sample.py", add_help=False, allow_abbrev=False)
    for flag in ("--like", "--csv"):
        early.add_argument(flag, type=Path)
    files = early.parse_known_args(argv)[0]
    parser = parser_of(Sample, "sample.py", "Draw pictures with a Stable Diffusion v1.x model.")
    argvs, rows = {}, {"": {}}
    try:
        if files.like:
            argvs[f"--like {files.like}: "] = as_flags(like(files.like, argv))
        argvs[""] = argv
        if files.csv:
            rows = {f"--csv {files.csv} line {line}: ": row for line, row in sweep.read(files.csv)}
        for parser.where, row in rows.items():
            for name in {"csv", "like", "output", "export"} & row.keys():
                raise ValueError(f"--{name} is for all rows: give it on the command line")
            as_flags(row)
    except ValueError as e:
        parser.error(str(e))
    return [
        Job(parse(parser, Sample, {**argvs, **({where: as_flags(row)} if row else {})}, "sample"), row, where)
        for where, row in rows.items()
    ]


def as_flags(values: Mapping[str, list[str]]) -> list[str]:
    """Flags and their values, from files, as a command line has them."""
    argv = []
    switches = {f.name for f in fields(Sample) if f.type in (bool, bool | None)}
    for name, texts in values.items():
        if name in switches and texts:
            known = {"true": "", "yes": "", "1": "", "false": "no-", "no": "no-", "0": "no-"}
            if texts[-1].lower() not in known:
                raise ValueError(f"--{name} is yes or no, not {texts[-1]!r}")
            argv.append(f"--{known[texts[-1].lower()]}{name}")
        elif len(texts) == 1:
            argv.append(f"--{name}={texts[0]}")  # whatever it begins with
        elif texts:
            argv += [f"--{name}", *texts]
    return argv


def like(path: Path, argv: list[str]) -> dict[str, list[str]]:
    """The flags that a picture was drawn with, and their values, for a command line with `argv`. Prints which
    of its keys are ignored. ValueError if it does not say how it was drawn, or where the model is."""
    names = {spelling: f.name for f in fields(Sample) for spelling in spellings(Sample, f)}
    given = {names.get(arg.partition("=")[0].removeprefix("--").removeprefix("no-")) for arg in argv}
    flags, about, ignored = infotext.flags(infotext.read(path))
    if "strength" in flags and "image" not in given | flags.keys():  # A1111 does not say of which image
        del flags["strength"]
        ignored.append("Denoising strength")
    if "model" not in given | flags.keys() and about.get("Model") != TINY.name:
        raise ValueError(
            f"--like {path}: drawn by the model {about.get('Model', '')!r}: say where it is by --model"
        )
    if "scheduler" in flags and "scheduler" not in given:
        try:
            registry.find("schedulers", flags["scheduler"][0])
        except ValueError as e:
            raise ValueError(f"--like {path}: {e}; or choose one by --scheduler") from None
    if ignored:
        print(f"--like {path}: ignored (unsupported): {', '.join(ignored)}")
    if about.get("RNG") != "CPU":
        print(f"--like {path}: its noise was not drawn on a CPU, as ours is: the picture will be another")
    if "prompt_file" in given:
        del flags["prompt"]
    return flags


def keep_memory() -> None:
    """Let glibc keep up to 1 GB of what is freed for the next request. By default it returns every large block
    at once, and the next activation of that size faults in each of its pages anew: on a CPU up to a fourth of
    the time. The peak stays."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_max, 0)


def run(prog: str, main: Callable[[], int | None]) -> None:
    """Exit as `main()` says; what is wrong with the input gets one line and status 2, and no traceback unless
    MINISD_DEBUG is set."""
    keep_memory()
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        if os.environ.get("MINISD_DEBUG"):
            raise
        print(f"{prog}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
