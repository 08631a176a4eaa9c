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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisd import cli  # noqa: E402
from minisd.formats import parts  # noqa: E402
from minisd.models import tokenizer  # noqa: E402
from tests import hostile_files, hostile_mixed, hostile_texts  # noqa: E402
from tests.hostile_files import Assets, Case  # noqa: E402

KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = (
    hostile_files.KINDS | hostile_texts.KINDS | hostile_mixed.KINDS
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
        status, output = in_child(case, folder)
        kept = {path: digest for path, digest in before.items() if path not in case.replaces}
        changed = [path for path, digest in kept.items() if digest_of(path) != digest]
        new = [path for path in snapshot(folder) if path not in before]
        failure = judge(case, status, output, new) or (f"changed {changed[0]}" if changed else "")
    return Outcome(kind, seed, case, status, failure, output)


def judge(case: Case, status: int, output: str, new: list[Path]) -> str:
    """Why the case failed, or an empty string."""
    errors = [line for line in output.splitlines() if ": error: " in line]
    if status == 2:
        if len(errors) != 1:
            return f"{len(errors)} lines of error"
        if len(errors[0]) > 1000:
            return f"a line of {len(errors[0])} characters"
        return f"refused, and left {new[0].name}" if new and not case.leaves else ""
    if status:
        return {-signal.SIGKILL: f"killed after {SECONDS} s"}.get(status, f"status {status}")
    if case.refuse:
        return "accepted"
    black = [
        path for path in new if path.suffix == ".png" and not any(Image.open(path).convert("L").getextrema())
    ]
    return f"{black[0].name} is black" if black else ""


def in_child(case: Case, folder: Path) -> tuple[int, str]:
    """(exit status or minus the signal, output) of the case's command."""
    log = folder.parent / f"{folder.name}.log"
    child = os.fork()
    if not child:
        try:
            os.setsid()  # so that its own children end with it
            limit(MEMORY)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")  # as Python's own
            os._exit(execute(case, folder))
        finally:  # a child never goes on as its parent
            os._exit(1)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return os.waitstatus_to_exitcode(status), output


def limit(more: int) -> None:
    """Bound this process's address space to `more` bytes beyond what it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def execute(case: Case, folder: Path) -> int:
    """The command in this process: its exit status, 1 after a traceback."""
    import sample
    import train

    os.chdir(folder)
    os.environ.update(case.environment)
    sys.argv = [case.program, *case.flags]
    try:
        cli.run(case.program, {"sample.py": sample, "train.py": train}[case.program].main)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
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
    """All modules are imported, and the whole tokenizers are read once, not anew in each child."""
    import sample  # noqa: F401
    import train  # noqa: F401
    from minisd.sampling import api, run  # noqa: F401

    def files_of(folder: Path) -> tuple[str, str]:
        return os.path.realpath(folder / "vocab.json"), os.path.realpath(folder / "merges.txt")

    read = tokenizer.byte_pairs
    known = {files_of(f): read(f) for f in (assets.model / "tokenizer", parts.TOKENIZER)}
    tokenizer.byte_pairs = lambda folder: known.get(files_of(folder)) or read(folder)
    gc.freeze()  # a collection in a child would copy every page
    yield
    gc.unfreeze()
    tokenizer.byte_pairs = read


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
