"""Which of a kernel and torch computes a call on this GPU: tried once, remembered, and then constant.

A kernel must be right, and 5 % faster than torch. Whatever fails or is wrong is torch, with one line, and
stays so. Calls of similar size have one key, and so one verdict. It is looked for in the record of the run
that goes on, in this process, and in the user's cache, in a file for this GPU, these versions and kernels.
"""

import hashlib
import json
import math
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import minisd.kernels.report as report
import minisd.kernels.trial as trial
import torch
import triton
from minisd.kernels.kernel import Kernel, discover
from minisd.kernels.trial import TORCH, Call, quantiles

try:
    import fcntl
except ImportError:  # Windows: of two processes that write at once, one may have to try again some day
    fcntl = None

MARGIN = 1.05  # a kernel must be so many times as fast as torch
BUDGET = 300.0  # seconds that a process spends on trials
HANGS = 600.0  # seconds after which a trial counts as hanging

# ------------------------------ Keys and decisions


def key(call: Call) -> str:
    """Return what calls have in common that share a verdict."""
    specs, shape, stride = call.specs, call.specs[0].shape, call.specs[0].stride
    channels_last = len(shape) == 4 and stride[1] == 1 < shape[1] and shape[2] * shape[3] > 1
    words = [
        call.op,
        "graph" if call.graph else "",
        "training " + "".join("01"[s.requires_grad] for s in specs) if call.training else "inference",
        "+".join(dict.fromkeys(str(s.dtype).removeprefix("torch.") for s in specs)),
        "autocast" if call.autocast else "",
        "channels_last" if channels_last else "",
        discover()[call.op].size_class(*(a[0] if isinstance(a, tuple) else a for a in call.arguments)),
    ]
    return " ".join(word for word in words if word)


def candidates(call: Call) -> list[Kernel]:
    """Return the op's kernel, and those of its variants that take these types."""
    kernel, types = discover()[call.op], {spec.dtype for spec in call.specs}
    return [kernel, *(k for k in kernel.variants if types <= {*k.dtypes})]


def fastest(times: dict[str, list[float]]) -> str:
    """Return the candidate with the lowest median of those that are faster than torch by the margin and
    beyond the noise: their 80th percentile is below torch's 20th. If there is none, torch."""
    found = {name: quantiles(sorted(ms)) for name, ms in times.items()}
    median, low, _ = found[TORCH]
    faster = [name for name, q in found.items() if q[0] * MARGIN <= median and q[2] < low]
    return min(faster, key=found.__getitem__, default=TORCH)


def say(text: str) -> None:
    print(f"kernels: {text}", file=sys.stderr)


class Verdicts:
    """The decisions of a process. `pinned` are those of the run that goes on, choices by key; `share(key,
    decide)` returns what the first of several processes decides, and `bench` has the parts of a trial."""

    def __init__(self, table: "Table", pinned: dict[str, str], share: Callable | None = None, bench=trial):
        self.table, self.pinned, self.bench = table, pinned, bench
        self.share = share or (lambda key, decide: decide())
        self.choices: dict[tuple, str] = {}  # call -> name of a kernel or "", torch; what an op looks up
        self.rows: dict[str, str] = {}  # key -> choice
        self.seconds = 0.0

    def decide(self, call: tuple, why_not: str = "") -> str:
        """Decide a call, and return its choice; `why_not` is why kernels cannot compute it. ValueError if one
        of the run that goes on cannot."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        backward = torch._C._current_graph_task_id() != -1  # where checkpointing computes again
        call, start = Call(*call), time.monotonic()
        k = key(call)
        if why_not or capturing or backward:
            self._leave(k, why_not)
        elif k not in self.rows:
            try:
                if self.pinned.get(k, TORCH) != TORCH:
                    self.bench.check({c.name: c for c in candidates(call)}[self.pinned[k]], call)
            except torch.OutOfMemoryError:
                pass  # it was right when the run began
            except Exception as error:
                self._leave(k, report.reason(error))
            self.rows[k] = self.pinned.get(k) or self.share(k, lambda: self._look_up(k, call))["choice"]
            self.seconds += time.monotonic() - start
        self.choices[tuple(call)] = choice = "" if why_not or self.rows[k] == TORCH else self.rows[k]
        return choice

    def _leave(self, k: str, why_not: str) -> None:
        """Leave a key that cannot be tried now to torch, for good, unless it has a verdict. ValueError if
        kernels can never compute it, which is `why_not`, and the run that goes on used one."""
        pinned = self.pinned.get(k, TORCH)
        if why_not and pinned != TORCH:
            raise ValueError(
                f"--kernels auto: this run computes `{k}` by the kernel {pinned}, which cannot run here "
                f"({why_not}); --kernels torch continues it without kernels, and with other last digits"
            )
        self.rows.setdefault(k, pinned)

    def record(self) -> dict[str, str]:
        """Return the choices of this run by key."""
        return dict(sorted((self.pinned | self.rows).items()))

    def summary(self) -> str:
        """Return how many keys of each op a kernel computes, and how long that took to find."""
        tried = Counter(k.split()[0] for k in sorted(self.rows))
        won = Counter(k.split()[0] for k, choice in self.rows.items() if choice != TORCH)
        counts = ", ".join(f"{op} {won[op]} of {count}" for op, count in tried.items())
        return f"{counts} on {self.table.about['GPU']} (settled in {self.seconds:.1f} s)"

    def _look_up(self, k: str, call: Call) -> dict:
        """Return the row of the table, after a trial if there is none, or one that is not kept."""
        row, kept = self.table.read().get(k, {}), None
        if "choice" in row:
            return row
        if dead(row):
            row = dict(choice=TORCH, reason="a process ended or hung while it tried the kernel")
            say(f"{k}: torch, {row['reason']}")
            return self.table.write({k: row})[k]
        if self.seconds > BUDGET:
            return dict(choice=TORCH)  # the next process may try it
        self.table.write({k: dict(trying=[socket.gethostname(), os.getpid(), time.time()])})
        try:
            kept = self._try(k, call)
        except torch.OutOfMemoryError:
            pass
        finally:  # an interruption is no verdict, and neither is too little memory
            rows = self.table.write({k: kept})
        return rows.get(k) or kept or dict(choice=TORCH)

    def _try(self, k: str, call: Call) -> dict:
        reasons: dict[str, str] = {}

        def attempt(name: str, part: Callable, *arguments):
            try:
                return part(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or a driver raises
                reasons[name] = report.reason(error)
                say(f"{k}: not {name}, {reasons[name]}")

        kernels = candidates(call)
        errors = {c.name: attempt(c.name, self.bench.check, c, call) for c in kernels}
        right = [c for c in kernels if c.name not in reasons]
        times = attempt("timed", self.bench.time_ms, right, call) if right else None
        ms = {name: statistics.median(t) for name, t in (times or {}).items()}
        return dict(choice=fastest(times) if times else TORCH, ms=ms, errors=errors, reasons=reasons)


# ------------------------------ On disk


def dead(row: dict) -> bool:
    """Whether a row is the mark of a process that ended or hangs in a trial."""
    host, pid, since = row.get("trying", ("", 0, math.inf))
    if time.time() - since > HANGS or (host, pid) == (socket.gethostname(), os.getpid()):
        return True  # a mark with this process's number is that of an earlier one
    try:
        os.kill(pid, 0) if host == socket.gethostname() and os.name == "posix" else None  # sends nothing
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


class Table:
    """The verdicts by key in a file that several processes may write. One that cannot be written is empty."""

    def __init__(self, path: Path, about: dict[str, str]):
        self.path, self.about, self.failed = path, about, False

    def read(self) -> dict[str, dict]:
        """Return the rows. A file that is not readable counts as empty; the next write replaces it."""
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["verdicts"]
            return {k: row for k, row in rows.items() if "choice" in row or "trying" in row}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, rows: dict[str, dict | None]) -> dict[str, dict]:
        """Add rows, None to delete a mark, and return all. A verdict that is there already stays."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Other writers wait. The system unlocks the file when a process ends, however it does.
            with self.path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX) if fcntl else None
                before = self.read()
                verdicts = {k: row for k, row in before.items() if "choice" in row}
                rows = {k: row for k, row in (before | rows | verdicts).items() if row}
                text = json.dumps(dict(about=self.about, verdicts=rows), indent=1, sort_keys=True)
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                    file.write(text)
                os.replace(file.name, self.path)
        except OSError as error:
            if not self.failed:
                say(f"verdicts are not kept, {self.path}: {error.strerror}")
            self.failed = True
        return {k: row for k, row in rows.items() if row}


def of(device: torch.device, pinned: dict[str, str], share: Callable | None) -> Verdicts:
    """Return the verdicts for this GPU, these versions and these kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    p = torch.cuda.get_device_properties(device)
    versions = dict(torch=torch.__version__, CUDA=str(torch.version.cuda), triton=triton.__version__)
    about = dict(GPU=p.name, capability=f"{p.major}.{p.minor}", **versions, kernels=digest.hexdigest())
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisd" / "kernels"
    name = f"{re.sub('[^A-Za-z0-9]+', '-', p.name)}-{name}.json"
    return Verdicts(Table(cache / name, about), pinned, share)
