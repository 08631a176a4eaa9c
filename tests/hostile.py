"""Damaged and hostile inputs by kind, each a function of a seed, and what comes of them.

    python tests/hostile.py                              200 cases of each kind
    python tests/hostile.py prompts --cases 20 --seed 3  20 cases of one kind

A case is a command line of sample.py or train.py in a folder of its own. It runs in a child process with
limits on time and memory. It passes if the command says one line and exits with status 2, having written
nothing, or if it ends with status 0 and images that are not all black, unless what is damaged must be
refused. In no case may a file that was there be changed. The table counts what was tried, refused and
accepted, and lists the failures.
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisd import cli  # noqa: E402
from minisd.formats import parts  # noqa: E402
from minisd.models import tokenizer  # noqa: E402
from tests import hostile_files, hostile_mixed, hostile_runs, hostile_texts  # noqa: E402
from tests.hostile_files import Assets, Case  # noqa: E402

KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = (
    hostile_files.KINDS | hostile_texts.KINDS | hostile_mixed.KINDS | hostile_runs.KINDS
)
SECONDS = 20
MEMORY = 6 * 2**30  # bytes beyond what the process has


@dataclass
class Outcome:
    """What came of a case; `failure` is empty if it passed."""

    kind: str
    seed: int
    case: Case
    status: int
    failure: str
    output: str


def run(kind: str, seed: int, assets: Assets) -> Outcome:
    """Make the case of this kind and seed, and run it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = KINDS[kind](random.Random(f"{kind} {seed}"), assets, folder)
        before = snapshot(folder) | assets.digests
        children = [start(case, case.flags, case.environment, folder)]
        if case.second:
            children.append(start(case, *case.second, folder))
        ends = wait(children, case.signals)
        status, output = max(ends, key=lambda end: end[0] != 0)  # the first that failed
        kept = {path: digest for path, digest in before.items() if path not in case.replaces}
        changed = [path for path, digest in kept.items() if digest_of(path) != digest]
        new = [path for path in snapshot(folder) if path not in before]
        failures = [judge(case, *end, new) for end in ends]
        if len({status == 0 for status, _ in ends}) > 1:
            failures.append("one process goes on without the other")
        failures.append(f"changed {changed[0]}" if changed else "")
        failure = next(filter(None, failures), "")
    return Outcome(kind, seed, case, status, failure, output)


def judge(case: Case, status: int, output: str, new: list[Path]) -> str:
    """Why the case failed, or an empty string."""
    errors = [line for line in output.splitlines() if ": error: " in line]
    if "Traceback (most recent call last)" in output:
        return "a traceback"
    if status not in case.ends:
        return {-signal.SIGKILL: f"killed after {SECONDS} s"}.get(status, f"status {status}")
    if status == 2:
        if len(errors) != 1:
            return f"{len(errors)} lines of error"
        if len(errors[0]) > 1000:
            return f"a line of {len(errors[0])} characters"
        return f"refused, and left {new[0].name}" if new and not case.leaves else ""
    if status:
        return ""
    if case.refuse:
        return "accepted"
    black = [
        path for path in new if path.suffix == ".png" and not any(Image.open(path).convert("L").getextrema())
    ]
    return f"{black[0].name} is black" if black else ""


def start(case: Case, flags: list[str], environment: dict[str, str], folder: Path) -> tuple[int, Path]:
    """Start a command of the case in a child process. Returns its number and where its output goes."""
    descriptor, log = tempfile.mkstemp(dir=folder.parent, suffix=".log")
    child = os.fork()
    if child:
        os.close(descriptor)
        return child, Path(log)
    try:
        os.setsid()  # so that its own children end with it
        limit(MEMORY)
        os.dup2(silent(case.stdout) if case.stdout else descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")  # as Python's own
        os._exit(execute(case.program, flags, environment, folder))
    finally:  # a child never goes on as its parent
        os._exit(1)


def silent(where: str) -> int:
    """A descriptor of an output that takes nothing: a pipe without a reader, or the file of that name."""
    if where != "pipe":
        return os.open(where, os.O_WRONLY)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def wait(children: list[tuple[int, Path]], signals: Sequence[tuple[float, int]]) -> list[tuple[int, str]]:
    """(exit status or minus the signal, output) of each child; the first one gets the signals."""
    began, due, ended = time.monotonic(), list(signals), {}
    while len(ended) < len(children):
        passed = time.monotonic() - began
        for child in {child for child, _ in children} - ended.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ended[child] = os.waitstatus_to_exitcode(status)
            elif passed > SECONDS:
                os.killpg(child, signal.SIGKILL)
            elif child == children[0][0] and due and passed > due[0][0]:
                os.kill(child, due.pop(0)[1])
        time.sleep(0.005)
    texts = [log.read_text(encoding="utf-8", errors="replace") for _, log in children]
    for _, log in children:
        log.unlink()
    return [(ended[child], text) for (child, _), text in zip(children, texts, strict=True)]


def limit(more: int) -> None:
    """Bound this process's address space to `more` bytes beyond what it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def execute(program: str, flags: list[str], environment: dict[str, str], folder: Path) -> int:
    """The command in this process: its exit status, 1 after a traceback."""
    import sample
    import train

    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [program, *flags]
    try:
        cli.run(program, {"sample.py": sample, "train.py": train}[program].main)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for output in (sys.stderr, sys.stdout):
            with contextlib.suppress(Exception):
                output.flush()
    return 0


def digest_of(path: Path) -> str:
    """A digest of a regular file, or what else the path is."""
    if not path.is_file():
        return "missing" if not path.is_symlink() and not path.exists() else "special"
    about = path.stat()
    return digest(path, about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size)


@functools.cache
def digest(path: Path, *_: int) -> str:
    """The digest of a file's content, computed once as long as the file is not touched."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def warm(assets: Assets) -> Iterator[None]:
    """All modules are imported, and the whole tokenizers are read once, not anew in each child. Processes
    wait for each other for seconds, not minutes."""
    import sample  # noqa: F401
    import train  # noqa: F401
    from minisd.sampling import api, run  # noqa: F401
    from minisd.training import distributed

    def files_of(folder: Path) -> tuple[str, str]:
        return os.path.realpath(folder / "vocab.json"), os.path.realpath(folder / "merges.txt")

    read = tokenizer.byte_pairs
    known = {files_of(f): read(f) for f in (assets.model / "tokenizer", parts.TOKENIZER)}
    tokenizer.byte_pairs = lambda folder: known.get(files_of(folder)) or read(folder)
    patience, distributed.JOIN = distributed.JOIN, timedelta(seconds=5)
    gc.freeze()  # a collection in a child would copy every page
    yield
    gc.unfreeze()
    tokenizer.byte_pairs, distributed.JOIN = read, patience


def snapshot(folder: Path) -> dict[Path, str]:
    """The digests of all files below a folder; a link is not followed."""
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {path: digest_of(path) for path in found}


def campaign(kinds: list[str], cases: int, first: int, assets: Assets) -> list[Outcome]:
    return [run(kind, seed, assets) for kind in kinds for seed in range(first, first + cases)]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: what was tried, refused, accepted and failed, by kind; then the failures."""
    lines = ["| kind | tried | refused in one line | accepted | failed |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(o.kind for o in outcomes):
        of_kind = [o for o in outcomes if o.kind == kind]
        counts = Counter(
            "failed" if o.failure else "refused" if o.status == 2 else "accepted" for o in of_kind
        )
        cells = (kind, len(of_kind), counts["refused"], counts["accepted"], counts["failed"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failed = [o for o in outcomes if o.failure]
    return "\n".join([*lines, *map(describe, failed)])


def describe(outcome: Outcome) -> str:
    flags = " ".join(
        flag if len(flag) < 80 else f"{flag[:60]!r}... ({len(flag)})" for flag in outcome.case.flags
    )
    last = [line for line in outcome.output.strip().splitlines() if line.strip()][-3:]
    return (
        f"{outcome.kind} {outcome.seed}: {outcome.case.what}: {outcome.failure}\n    {flags[:300]}\n"
        + "\n".join(f"    > {line[:300]}" for line in last)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kinds", nargs="*", default=list(KINDS), metavar="KIND", help=f"of: {', '.join(KINDS)}"
    )
    parser.add_argument("--cases", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        assets = hostile_files.make_assets(Path(folder))
        with warm(assets):
            outcomes = campaign(options.kinds, options.cases, options.seed, assets)
    print(table(outcomes))
    sys.exit(any(o.failure for o in outcomes))


if __name__ == "__main__":
    main()
