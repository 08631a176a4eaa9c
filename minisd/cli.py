"""Command lines from option dataclasses. Standard library only, so that `--help` answers at once."""

import argparse
import ctypes
import difflib
import functools
import io
import json
import os
import re
import shutil
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import NoReturn

from minisd import launcher, presets, reading, registry, terminal
from minisd.options import TINY, default_of
from minisd.sampling import infotext, sweep
from minisd.sampling.options import Job, Page, Sample
from minisd.spelling import ELSEWHERE, SPELLED

LINKS = {*"a an the of in on at with and by for from to".split()}  # words that join others to one prompt
WORDS = {"None": "none", "": "none", "False": "no", "True": "yes"}  # how defaults are shown in the help


def names_of(cls: type) -> dict[str, Field]:
    """The field of each flag name, aliases included."""
    return {name: f for f in fields(cls) for name in (f.name, *f.metadata.get("also", ()))}


def _help(f: Field) -> str:
    """The help of a flag, with its default unless the text describes that."""
    text, default = f.metadata.get("help", ""), default_of(f)
    if listing := f.metadata.get("listing"):
        text += f" one of: {', '.join(registry.names(listing))}; or FILE.py, one of your own"
    if isinstance(default, list):
        default = " ".join(map(str, default)) or None
    if default is not MISSING and not (default is None and "default" in text):
        text += f" (default: {WORDS.get(str(default), default)})"
    return text.replace("%", "%%")


def _add_flag(group, f: Field, hint) -> None:
    # Flags that are not given stay out of the namespace: the dataclass has the defaults.
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
        if default is MISSING or not default:
            kwargs["action"] = "extend"  # a flag that is given twice adds up
    else:
        kwargs |= {"type": {float: finite, int: bounded}.get(hint, hint), "metavar": hint.__name__.upper()}
    if kwargs.get("type") in (str, Path):
        kwargs["type"] = functools.partial(_expand, kwargs["type"])
    names = (f.name, *f.metadata.get("also", ()))
    group.add_argument(*(f"--{name}" for name in names), help=_help(f), **kwargs)


def _expand(kind: type, text: str) -> str | Path:
    """A text or a path, with the ~ of a home folder expanded, which shells do not do after = or in quotes."""
    home = kind is Path or re.match(r"~[\w.-]*/", text)
    return kind(os.path.expanduser(text) if home else text)


def finite(text: str) -> float:
    """The number in a text; ValueError if it is none, or too large for fp32, which all is computed in."""
    value = float(text)
    if not abs(value) < 2.0**127:  # so written, it includes NaN
        raise ValueError
    return value


def bounded(text: str) -> int:
    """The integer in a text; ValueError if it takes more than 64 bits, or is none."""
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError
    return value


finite.__name__, bounded.__name__ = "float", "int"  # for argparse's messages


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2: the usage of fifty flags would bury the reason."""

    where = ""  # how messages begin: the file that is parsed, if it is not the command line
    methods: tuple[str, ...] = ()  # methods to name in the message about an unknown flag

    def error(self, message):
        sys.exit(terminal.complain(self.prog, f"{self.where}{message}"))

    def read(self, argv: list[str]) -> dict[str, object]:
        """The flags in `argv` and their values. Exits with one line if they are wrong."""
        known = self._option_string_actions
        for name in (arg.partition("=")[0] for arg in argv):  # before argparse reports missing flags
            if name in known:
                SPELLED[known[name].dest] = name.removeprefix("--").removeprefix("no-")
            elif name.startswith("--") and name != "--":
                self.unknown(name)
        return vars(self.parse_args(argv))

    def read_values(self, where: str, cls: type, flags: Mapping[str, object]) -> dict[str, object]:
        """The values of flags that a file has, which are then no longer required. Exits with one line, which
        begins with `where` they are, if they are wrong."""
        self.where, required = where, [a for a in self._actions if a.required]
        for action in required:
            action.required = False
        texts = {}
        for name, value in flags.items():
            values = value if isinstance(value, list | tuple) else [] if value is None else [value]
            if name == "config" or any(isinstance(v, dict | list | tuple) for v in values):
                self.error(f"{name} is no value of a flag")
            texts[name] = [str(v) for v in values]
            if not texts[name] and f"--{name}" not in self._option_string_actions:
                self.unknown(f"--{name}")
        try:
            found = self.read(as_flags(texts, cls))
        except ValueError as e:
            self.error(str(e))
        for action in required:
            action.required = action.dest not in found
        self.where = ""
        return found

    def unknown(self, name: str) -> NoReturn:
        """Exit with a line about an unknown flag: the methods that have it, or the nearest flag."""
        ours = ELSEWHERE.get(name[2:], name[2:])
        if f"--{ours}" in self._option_string_actions:
            self.error(f"unknown flag {name}; did you mean --{ours}?")
        if owners := [m for m in self.methods if ours in names_of(options_of(m))]:
            here = name if ours == name[2:] else f"{name}, here --{ours},"
            self.error(f"{here} is not a flag of this method; it belongs to: {', '.join(owners)}")
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        self.error(f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else ""))

    def build(self, cls: type, values: dict[str, object], command: str):
        """The options with these values; without --model, those of the tiny model for `command`."""
        tiny = any(f.name == "model" for f in fields(cls)) and values.get("model") is None
        try:
            if precision := cls.__dataclass_fields__.get("mixed_precision"):  # of training
                values = values | launcher.flags(values, default_of(precision))
            kinds = ["tiny"] if tiny else kinds_of(cls, command)
            chosen = presets.flags(cls, kinds, values) if values.get("preset") else {}
            if tiny:
                known, excluded = tiny_defaults(cls, command), cls.excluded(values)
                known = {name: value for name, value in known.items() if name not in excluded}
                values = {"model": str(TINY), **known, **chosen, **values}
            options = cls(**chosen | values)
        except ValueError as e:
            self.error(str(e))
        if tiny:
            line = "no --model (a folder, file or hub id): using the tiny one, of 64x64 emoji"
            say(line, "stderr" if cls in (Page, Sample) else "stdout")  # sample.py's stdout has paths alone
        return options

    def read_own(self, argv: list[str], cls: type) -> dict[str, object]:
        """As `read`, of the command line itself, which alone may name files of code."""
        values = self.read(argv)
        declared = {name: cls.__dataclass_fields__[name].metadata for name in values}
        for name in [name for name in values if {"listing", "code"} & declared[name].keys()]:
            try:
                registry.admit(values[name])
            except ValueError as e:
                self.error(f"--{name}: {e}")
        return values


def kinds_of(cls: type, command: str) -> list[str]:
    """`command`, and the methods whose Options are bases of `cls`, the nearest first."""
    return [command, *(base.__module__.rpartition(".")[2] for base in cls.__mro__)]


def tiny_defaults(cls: type, command: str) -> dict[str, object]:
    """The flags that suit the tiny model: those of the first known of `kinds_of`, or else of most methods,
    as far as `cls` has them."""
    known = json.loads((TINY / "defaults.json").read_text())
    chosen = known[next(kind for kind in [*kinds_of(cls, command), "methods"] if kind in known)]
    return {name: value for name, value in chosen.items() if name in cls.__dataclass_fields__}


def parser_of(cls: type, prog: str, description: str, kind: type[Parser] = Parser) -> Parser:
    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    parser = kind(
        prog=prog,
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=width),
    )
    about = "read flags from TOML or JSON, such as a run's options.json; others come first (default: none)"
    parser.add_argument("--config", metavar="PATH", default=argparse.SUPPRESS, help=about)  # see `config`
    hints = typing.get_type_hints(cls)
    # A flag belongs to the base-most class that declares it.
    owners = {name: c for c in cls.__mro__ for name in c.__dict__.get("__annotations__", {})}
    for owner in cls.__mro__:  # the command's own flags first, then the shared groups
        group = parser.add_argument_group((owner.__doc__ or owner.__name__).partition("\n")[0])
        for f in fields(cls):
            if owners[f.name] is owner:
                _add_flag(group, f, hints[f.name])
    return parser


@functools.cache
def say(line: str, stream: str = "stderr") -> None:
    """Print a line, but only once."""
    print(line, file=getattr(sys, stream))


def options_of(method: str) -> type:
    return registry.load("methods", method).Options


def parse_train(argv: list[str], prog: str = "train.py") -> tuple[str, object]:
    """(method name, its Options). If the flags are wrong, exits with status 2 and one line."""
    SPELLED.clear()
    early = Parser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--method", type=functools.partial(_expand, str))
    known, rest, written = config(early, argv)
    names, name = registry.names("methods"), known.method or written.get("method")
    written.pop("method", None)
    if name is None:
        if "-h" in rest or "--help" in rest:
            methods = "".join(f"  {name:20} {registry.summary('methods', name)}\n" for name in names)
            print(f"usage: {prog} --method METHOD [flags]\n\nmethods:\n{methods}")
            print("or the path of a file of your own, which ends in .py\n")
            print(f"{prog} --method METHOD --help lists the flags of one method")
            sys.exit(0)
        early.error(f"--method is required, one of: {', '.join(names)}")
    try:
        registry.admit(known.method or "")  # that of --config may be a stranger's
        method = registry.find("methods", str(name))
        cls = options_of(method)
    except ValueError as e:
        early.error(f"--method: {e}" if str(name).endswith(".py") else str(e))

    parser = parser_of(cls, f"{prog} --method {method}", registry.summary("methods", method))
    parser.methods = names
    values = parser.read_values(f"--config {known.config}: ", cls, written) | parser.read_own(rest, cls)
    return method, parser.build(cls, values, method)


def parse_sample(argv: list[str], prog: str = "sample.py") -> list[Job]:
    """The jobs of a command line: one, or one for each row of --csv. A row has priority over the flags, these
    over those of --config, and these over the settings in the image of --like."""
    SPELLED.clear()
    known, rest, written = config(Parser(prog=prog, add_help=False, allow_abbrev=False), argv)
    parser = parser_of(Sample, prog, "Generate images with a Stable Diffusion v1.x model.")
    written = parser.read_values(f"--config {known.config}: ", Sample, written)
    values, rows, jobs, notices = parser.read_own(rest, Sample), {"": {}}, [], []
    words = values.get("prompt", [])
    if len(words) > 1 and not any(" " in word for word in words):
        if LINKS & {*map(str.lower, words)} and max(map(len, words)) > 2:
            values["prompt"] = [" ".join(words)]
            notices.append(f"--prompt: read as {values['prompt'][0]!r}; quotes make several words one prompt")
        else:
            notices.append(f"--prompt: {len(words)} prompts of a word each; quotes would make one of them")
    values = written | values
    try:
        if path := values.get("like"):
            parser.where = f"--like {path}: "
            flags, said = like(path, values)
            notices += said
            values = parser.read(as_flags(flags)) | values
            parser.where = ""
        if path := values.get("csv"):
            rows = {f"--csv {path} line {line}: ": row for line, row in sweep.read(path)}
        for parser.where, row in rows.items():
            for name in row:
                if name.partition("=")[0] in ("csv", "like", "config", "output", "export", "overwrite"):
                    parser.error(f"--{name} is for all rows: give it on the command line")
            options = parser.build(Sample, values | parser.read(as_flags(row)), "sample")
            jobs.append(Job(options, row, parser.where))
    except ValueError as e:
        parser.error(str(e))
    for notice in notices:
        say(notice)
    return jobs


def config(early: Parser, argv: list[str]) -> tuple[argparse.Namespace, list[str], dict[str, object]]:
    """The flags of `early` and --config; the other arguments; and the flags in that file: TOML, or a run's
    options.json, which then begins anew. Exits with a line if it is neither."""
    early.add_argument("--config", type=functools.partial(_expand, Path))
    known, rest = early.parse_known_args(argv)
    if known.config is None:
        return known, rest, {}
    try:
        if known.config.suffix == ".toml":
            return known, rest, reading.read_toml(known.config)
        once = "resume_from_checkpoint", "overwrite_output_dir", "code"  # of that run alone
        flags = reading.read_json(known.config)
        return known, rest, {name: value for name, value in flags.items() if name not in once}
    except ValueError as e:
        early.error(f"--config {e}")


def as_flags(values: Mapping[str, list[str]], cls: type = Sample) -> list[str]:
    """Flags and values that were read from a file, as command-line arguments."""
    argv = []
    kinds = {name: f.type for name, f in names_of(cls).items()}
    prefixes = {"true": "", "yes": "", "1": "", "false": "no-", "no": "no-", "0": "no-"}
    for name, texts in values.items():
        for text in texts:
            if kinds.get(name) not in (bool, bool | None):
                argv.append(f"--{name}={text}")  # with =, a value may begin with a dash
            elif text.lower() in prefixes:
                argv.append(f"--{prefixes[text.lower()]}{name}")
            else:
                raise ValueError(f"--{name} is yes or no, not {text!r}")
    return argv


def like(path: Path, given: Mapping[str, object]) -> tuple[dict[str, list[str]], list[str]]:
    """The flags that an image was generated with, and their values, where the `given` flags leave them open;
    and what to say of keys that are ignored. ValueError if the image has no parameters, or not the model's
    path."""
    (flags, about, ignored), notices = infotext.flags(infotext.read(path)), []
    if "strength" in flags and "image" not in {*given, *flags}:  # A1111 does not record the initial image
        del flags["strength"]
        ignored.append("Denoising strength")
    if "model" not in {*given, *flags} and about.get("Model") != TINY.name:
        raise ValueError(f"generated by the model {about.get('Model', '')!r}: give its path by --model")
    own = about.get("Sampler digest")
    if own and "scheduler" not in given:
        raise ValueError(f"drawn by a scheduler from a file, {about['Sampler']}: name it by --scheduler")
    if own and own != infotext.digest(given["scheduler"]):
        notices.append(f"--like {path}: the image will differ, as it was drawn by another scheduler")
    if "use_karras_sigmas" in given or registry.split_scheduler(given.get("scheduler", ""))[1]:
        flags.pop("schedule_type", None)
    if "scheduler" in flags and "scheduler" not in given:
        try:
            registry.find_scheduler(flags["scheduler"][0])
        except ValueError as e:
            raise ValueError(f"{e}; or choose one by --scheduler") from None
    if ignored:
        notices.append(f"--like {path}: ignored (unsupported): {', '.join(ignored)}")
    if "RNG" not in about:
        notices.append(
            f"--like {path}: does not say whose noise it has: taken to be a GPU's (--rng cpu if not)"
        )
    if "prompt_file" in given:
        del flags["prompt"]
    return flags, notices


def keep_memory() -> None:
    """Let glibc keep up to 2 GB of freed memory for the next request. By default it returns every large block
    at once, and the next activation of that size faults in each of its pages anew, which takes up to a fourth
    of the time on a CPU. The peak stays the same."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)  # the weights of a UNet in bf16, and more
        libc.mallopt(mmap_max, 0)


def run(prog: str, main: Callable[[], int | None]) -> None:
    """Exit with the status that `main()` returns; for wrong input, with status 2 and one line, or with a
    traceback if MINISD_DEBUG is set."""
    keep_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # the names of files may be no valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with terminal.interruptible(), terminal.shared():
            status = main()
            sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # what read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + 13)  # as a shell says it, SIGPIPE
    except (ValueError, OSError, OverflowError) as e:
        if os.environ.get("MINISD_DEBUG"):
            raise
        sys.exit(terminal.complain(prog, str(e)))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (MemoryError, RecursionError, RuntimeError) as e:
        if os.environ.get("MINISD_DEBUG"):
            raise
        # of torch: memory on a CPU, which has no type of its own, or on a GPU, or what was not foreseen
        text = str(e) or type(e).__name__
        if isinstance(e, MemoryError) or "memory" in text:
            sys.exit(terminal.complain(prog, f"not enough memory: {text}"))
        terminal.complain(prog, f"{type(e).__name__}: {text} (MINISD_DEBUG=1 shows where)")
        sys.exit(1)
