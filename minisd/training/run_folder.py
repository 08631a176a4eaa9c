"""The folder of a run: options.json, run.json, log.jsonl, report.html, images and checkpoint-STEP."""

import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import files, graph, reading, registry
from minisd.data import images
from minisd.data.datasets import Captioned, Prior
from minisd.methods._base import Method
from minisd.options import Run, free_flags, require
from minisd.training import checkpoint, report, trackers
from minisd.training.lock import Lock
from minisd.training.step import Trainer


class RunFolder(AbstractContextManager):
    """--output_dir of a run, and the trackers of its curves and images. `recorded` are the options;
    `on_update(step, values)` hears what is logged."""

    def __init__(self, method: str, options: Run, on_update: Callable[[int, dict], None] | None = None):
        self.path: Path = options.output_dir
        self.options = options
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
        del values["hub_token"]
        code = {name: sha for name in [method, *values.values()] if (sha := registry.digest(str(name)))}
        self.recorded = {"method": method, **({"code": code} if code else {})} | values
        self.trackers: list = []
        self.lock: Lock | None = None
        self.asked: Path | None = None  # the checkpoint that the user named, which rotation leaves alone
        self.conditions: dict = {}  # see `conditions`
        self.writer, self.writing = ThreadPoolExecutor(1), None  # the checkpoint that is being written
        self.on_update = on_update

    def __exit__(self, *error: object) -> None:
        """Let a checkpoint be finished, close the trackers, and let other runs have the folder."""
        try:
            self.writer.shutdown()
            for tracker in self.trackers:
                tracker.close()
        finally:
            if self.lock:
                self.lock.release()

    def start(self, step: int) -> None:
        """Make the folder, or remove from it what an earlier run left after update `step`; write the options,
        and on what and where the run began; start the trackers."""
        self.lock = self.lock or Lock(self.path)
        for path in [*files.leftovers(self.path), *(self.checkpoints() if step == 0 else [])]:
            files.remove(path)
        self.rotate(step)  # a run may have been killed before it could
        log = self.path / "log.jsonl"
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            files.write_text(log, "".join(line + "\n" for line in lines if 0 < step_of(line) <= step))
        files.write_text(self.path / "options.json", json.dumps(self.recorded, indent=2) + "\n")
        facts = self.path / "run.json"
        if step == 0 or not facts.is_file():
            files.write_json(facts, self.conditions | machine(self.conditions.get("device", "")))
        self.trackers = trackers.start(self.options, self.recorded)

    def log(self, step: int, **values: float) -> None:
        """Add a line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for tracker in self.trackers:
            tracker.scalars(step, values)
        if self.on_update:
            self.on_update(step, values)

    def save_image(self, step: int, name: str, image: Image.Image, path: str) -> None:
        """Write a PNG at `path` within the folder."""
        images.save_png(image, self.path / path)
        for tracker in self.trackers:
            tracker.image(step, name, image)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        numbered = [p for p in self.path.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()]
        return sorted(numbered, key=number)

    def results(self) -> list[str]:
        """The files in the folder that a finished run leaves, of any method and of diffusers' scripts too; if
        nothing is to be resumed, those that a run begins with as well."""
        names = ["*.safetensors", "*.bin", "model_index.json", "result.png"]
        names += [] if self.options.resume_from_checkpoint else ["options.json", "log.jsonl"]
        found = [path.name for name in names for path in sorted(self.path.glob(name))]
        return [name for name in found if "-steps-" not in name]

    def resume(self) -> Path | None:
        """The checkpoint to continue from, or None to start at 0. ValueError if another run is using the
        folder, if the flags do not say clearly which checkpoint, if that is damaged, or if they differ from
        its flags, or if the folder has another's results. `latest` passes over damaged ones."""
        for name in ("model", "data", "class_data_dir"):
            given = self.recorded.get(name)
            same = given is not None and reading.real(given) == reading.real(self.path)
            require(not same, f"--output_dir {self.path} is --{name} as well, which the run would change")
        if self.path.is_dir():
            self.lock = Lock(self.path)
        source, existing = self.options.resume_from_checkpoint, self.checkpoints()
        if not existing and not self.options.overwrite_output_dir and (names := self.results()):
            raise ValueError(
                f"--output_dir {self.path} has {names[0]} of an earlier run: --overwrite_output_dir "
                "replaces it, another --output_dir keeps it"
            )
        if source is None:
            if existing and not self.options.overwrite_output_dir:
                raise ValueError(
                    f"--output_dir {self.path} has checkpoints, up to {existing[-1].name}: "
                    "--resume_from_checkpoint latest continues it, --overwrite_output_dir starts over"
                )
            return None
        if source == "latest":
            if not existing:
                print(f"--resume_from_checkpoint latest: none in {self.path} yet, so this run starts at 0")
                return None
            path, state = self.newest_whole(existing, say=print)
            if path is None:
                raise ValueError(
                    f"--resume_from_checkpoint latest: none of the checkpoints in {self.path} is whole; "
                    "--overwrite_output_dir starts over"
                )
        else:
            path = next((p for p in (Path(source), self.path / Path(source).name) if p.is_dir()), None)
            if path is None:
                raise ValueError(f"--resume_from_checkpoint: there is no folder {source}")
            self.asked, state = reading.real(path), checkpoint.check(path)
        earlier = state["options"]
        compared = earlier.keys() & self.recorded.keys() - free_flags(type(self.options))
        if not getattr(self.options, "bucket", False):  # whose rounds are as large as these say
            compared -= SHARES
        changed = sorted(k for k in compared if earlier[k] != self.recorded[k])
        if changed:
            flags = ("the code was another" if k == "code" else f"--{k} was {earlier[k]}" for k in changed)
            flags = ", ".join(flags)
            raise ValueError(f"{path} is of a run with other flags ({flags}): give the same, or start over")
        print(f"continuing from {path}")
        return path

    def newest_whole(self, paths: list[Path], say=lambda line: None) -> tuple[Path | None, dict]:
        """The newest checkpoint that is whole and the content of its state.json, or None. What is wrong with
        those that are newer goes to `say`."""
        for path in reversed(paths):
            try:
                return path, checkpoint.check(path)
            except ValueError as e:
                say(f"passing over {path.name}: {e}")
        return None, {}

    def restore(self, trainer: Trainer, path: Path) -> None:
        """Continue from a checkpoint. ValueError if it is of other data or another number of images in an
        update, with which the run would not be the one that was begun; other versions, and another number of
        processes, are only reported."""
        state, now = reading.read_json(path / checkpoint.STATE), self.conditions
        then = state.get("conditions", now)
        if "conditions" not in state and trainer.processes.first:
            print(f"{path} is of an earlier version: its files and data cannot be checked", file=sys.stderr)
        if state["samples"] != state["step"] * trainer.images_per_update:
            raise ValueError(
                f"{path} is of {state['samples']} images in {state['step']} updates, which are of "
                f"{trainer.images_per_update} images here: start as many processes as then, or give a "
                "--train_batch_size that makes up for it"
            )
        if then["data"] != now["data"]:
            raise ValueError(
                f"{path} is of a run on other data: the images, their order, sizes or captions have changed "
                f"({then['images']} images then, {now['images']} now); restore the data, or start over"
            )
        pairs = [(k, then[k], now.get(k)) for k in VERSIONS if k in then]
        differing = [f"{k} {before}, now {after}" for k, before, after in pairs if before != after]
        if differing and trainer.processes.first:
            print(f"{path} was written with {'; '.join(differing)}: the last digits of the result may differ")
        checkpoint.restore(trainer, path)

    def save_checkpoint(self, trainer: Trainer, verdicts: dict[str, str]) -> None:
        """Write checkpoint-STEP in a thread, from a copy of what trains, or without one, waiting for it, as
        the options say. An error of its writing is raised by the next call of `written`. All processes call
        this, and the first writes."""
        self.written()
        self.require_finite(trainer)
        first = trainer.processes.first
        state = checkpoint.State.of(trainer, copied=first and self.options.background_checkpoints)
        if not first:
            return
        conditions = self.conditions | ({"kernels": verdicts} if verdicts else {})
        self.writing = self.writer.submit(self._write_checkpoint, state, conditions)
        if not self.options.background_checkpoints:
            self.written()

    def written(self, *, wait: bool = True) -> None:
        """Wait for the checkpoint that is being written, or only look at it unless `wait`. ValueError if that
        failed."""
        if self.writing and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            writing.result()

    def _write_checkpoint(self, state: checkpoint.State, conditions: dict) -> None:
        """Write a checkpoint, whole or not at all; then remove those that are too many."""
        step = state.numbers["step"]
        with files.new_folder(self.path / f"checkpoint-{step}") as folder:
            state.save(folder, self.recorded, conditions)
        self.rotate(step)

    def rotate(self, step: int) -> None:
        """Remove the oldest checkpoints beyond the limit, but not the one that the user named, nor those
        after update `step`, of an earlier attempt."""
        limit = self.options.checkpoints_total_limit
        ours = [p for p in self.checkpoints() if number(p) <= step]
        for path in ours[: -limit if limit else 0]:
            if reading.real(path) != self.asked:
                files.remove(path)

    def require_finite(self, trainer: Trainer) -> None:
        """ValueError, naming the last good checkpoint, unless all that has been trained is finite, in all
        processes, which all call this."""
        found = checkpoint.not_finite({**trainer.trained, **checkpoint.slots(trainer)}.items())
        if name := next(filter(None, trainer.processes.gather(found)), None):
            raise ValueError(
                f"update {trainer.step} left values in {name} that are not finite; nothing of it was saved. "
                + self.advice(trainer.step)
            )

    def advice(self, step: int) -> str:
        """What to do after update `step` has failed."""
        self.written()
        path, _ = self.newest_whole([p for p in self.checkpoints() if number(p) <= step])
        found = f"{path.name} is the last checkpoint with finite values" if path else "There is no checkpoint"
        return f"{found}. A lower --learning_rate, or --mixed_precision bf16 or no, may help"

    def save_result(self, trainer: Trainer) -> list[str]:
        """Write the result and the image of it, which all processes draw; return the names of these files
        within the folder."""
        first, names = trainer.processes.first, []
        self.require_finite(trainer)
        with trainer.averaged():
            if first:
                with files.new_folder(self.path, keep=True) as fresh:
                    trainer.method.save(fresh)
                    names = sorted(p.relative_to(fresh).as_posix() for p in fresh.rglob("*") if p.is_file())
            sheet = self.result_sheet(trainer.method)
        if first:
            self.save_image(trainer.step, "result", sheet, "result.png")
        return [*names, "result.png"]

    def save_before(self, trainer: Trainer, earlier: Path | None) -> None:
        """Write what the model draws before the first update, by all processes, or in a new folder take it
        from that of the checkpoint `earlier`."""
        place, there = self.path / BEFORE, earlier and earlier.parent / BEFORE
        first = trainer.processes.first
        if trainer.step == 0:
            with trainer.averaging.whole():  # an average is what it is of
                image = trainer.method.preview("before")
            if first:
                files.remove(place)
            if first and image:
                self.save_image(0, "validation", image, BEFORE)
            graph.forget()  # whose memory the updates need
        elif first and not place.exists() and there and there.is_file():
            files.write_bytes(place, there.read_bytes())

    def result_sheet(self, method: Method) -> Image.Image:
        """What was trained on, what the model drew before, and what it draws after from the same noise."""
        shown = method.trained_on()
        sheets = [images.labelled_rows([("trained on", shown)])] if shown else []
        if (before := self.path / BEFORE).is_file():
            sheets.append(images.open_image(before))
        return images.stack([*sheets, method.preview("after")])


BEFORE = "validation/step-000000.png"
REPORT_EVERY = 60.0  # seconds, and at each validation and checkpoint
# Within 80 columns for every method; the bar gets what is left of them.
BAR = "{desc} {n_fmt}/{total_fmt} {rate_noinv_fmt} {remaining} left{postfix} {bar}"
VERSIONS = "minisd", "torch", "device", "processes"
SHARES = {"train_batch_size", "gradient_accumulation_steps"}  # how an update's images are shared out


def machine(device: str) -> dict[str, str]:
    """Where a run is computed, and by which commit, if minisd is a clone and not installed."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    facts = {"machine": f"{platform.system()}, {name}", "python": platform.python_version()}
    if (registry.HERE.parent / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            ask = ["git", "-C", str(registry.HERE.parent), "describe", "--always", "--dirty", "--abbrev=40"]
            answer = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True)
            facts["commit"] = answer.stdout.strip()
    return facts


def conditions(dataset: Captioned | Prior, processes: int, device: torch.device) -> dict:
    """What a resumed run has to find again, besides its flags, to end with the same bytes: the number of
    processes, the data (names, sizes, order, repeats and captions), and, nearly, the versions."""
    sha = hashlib.sha256()
    parts = [part.described.records for part in getattr(dataset, "parts", (dataset,))]
    for records in parts:
        sha.update("".join(records.described()).encode())
    versions = {"torch": torch.__version__, "device": device.type}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["minisd"] = importlib.metadata.version("minisd")
    return {"processes": processes, "images": sum(map(len, parts)), "data": sha.hexdigest()} | versions


def number(path: Path) -> int:
    """N of checkpoint-N."""
    return int(path.name[11:])


def step_of(line: str) -> int:
    """The update that a line of log.jsonl is about; -1 if the line is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1


class Log:
    """The progress bar and the values of updates, whose losses and norms stay on the device until `flush`, so
    that logging does not hold up the GPU."""

    def __init__(self, folder: RunFolder, step: int, total: int, *, show: bool):
        name = Path(folder.recorded["method"]).stem
        self.folder = folder
        shown = {"desc": name, "bar_format": BAR, "dynamic_ncols": True, "disable": not show}
        self.bar = tqdm(total=total, initial=step, **shown)
        self.pending: list[tuple[int, Tensor, Tensor, dict[str, float]]] = []
        self.reported = time.monotonic()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, rates: dict[str, float]) -> None:
        """Remember the values of an update, and advance the bar."""
        self.pending.append((step, loss, grad_norm, rates))
        self.bar.update()

    def flush(self) -> None:
        """Write what was added since the last call. ValueError if a loss is not a number."""
        if not self.pending:
            return
        steps, losses, norms, rates = zip(*self.pending, strict=True)
        self.pending.clear()
        values = zip(steps, torch.stack(losses).tolist(), torch.stack(norms).tolist(), rates, strict=True)
        for step, loss, norm, lrs in values:
            if not math.isfinite(loss):
                advice = self.folder.advice(step)
                raise ValueError(f"the loss of update {step} is {loss}, which was not saved. {advice}")
            self.folder.log(step, loss=loss, **lrs, grad_norm=norm)
        if time.monotonic() - self.reported > REPORT_EVERY:
            report.write(self.folder.path)
            self.reported = time.monotonic()
        lr = next(iter(lrs.values()))
        self.bar.set_postfix_str(f"loss {loss:.3g} lr {lr:.2g} {peak_memory()}", refresh=False)


def peak_memory() -> str:
    """The peak of the GPU's memory, or of the process's without a GPU."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}G"
    try:
        import resource
    except ImportError:  # Windows
        return "?"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # there in bytes, elsewhere in KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f}G"
