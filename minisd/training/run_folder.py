"""The folder of a run: options.json, log.jsonl, images and the checkpoints checkpoint-STEP."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import files, reading
from minisd.data import images
from minisd.options import Run, free_flags
from minisd.training import checkpoint, trackers
from minisd.training.step import Trainer


class RunFolder:
    """--output_dir of a run, and the trackers of its curves and images. `recorded` are the options."""

    def __init__(self, method: str, options: Run):
        self.path: Path = options.output_dir
        self.options = options
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
        del values["hub_token"]
        self.recorded = {"method": method} | values
        self.trackers: list = []

    def start(self, step: int) -> None:
        """Make the folder, or remove from it what an earlier run left after update `step`; write the options
        and start the trackers."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--output_dir {self.path}: {e.strerror}") from None
        for path in [*files.leftovers(self.path), *(self.checkpoints() if step == 0 else [])]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        log = self.path / "log.jsonl"
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            files.write_text(log, "".join(line + "\n" for line in kept))
        files.write_text(self.path / "options.json", json.dumps(self.recorded, indent=2) + "\n")
        self.trackers = trackers.start(self.options, self.recorded)

    def log(self, step: int, **values: float) -> None:
        """Add a line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def save_image(self, step: int, name: str, image: Image.Image, path: str) -> None:
        """Write a PNG at `path` within the folder."""
        images.save_png(image, self.path / path)
        for tracker in self.trackers:
            tracker.image(step, name, image)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        numbered = [p for p in self.path.glob("checkpoint-*") if p.name[11:].isdigit() and p.is_dir()]
        return sorted(numbered, key=lambda p: int(p.name[11:]))

    def resume(self) -> Path | None:
        """The checkpoint to continue from, or None to start at 0. ValueError if the flags do not say clearly
        which, or differ from those of the checkpoint."""
        source, existing = self.options.resume_from_checkpoint, self.checkpoints()
        if source is None:
            if existing and not self.options.overwrite_output_dir:
                raise ValueError(
                    f"--output_dir {self.path} has checkpoints, up to {existing[-1].name}: "
                    "--resume_from_checkpoint latest continues it, --overwrite_output_dir starts over"
                )
            return None
        if source == "latest" and not existing:
            print(f"--resume_from_checkpoint latest: none in {self.path} yet, so this run starts at 0")
            return None
        paths = existing[-1:] if source == "latest" else [Path(source), self.path / Path(source).name]
        path = next((p for p in paths if p.is_dir()), None)
        if path is None:
            raise ValueError(f"--resume_from_checkpoint: there is no folder {source}")
        earlier = reading.read_json(path / "state.json")["options"]
        compared = earlier.keys() & self.recorded.keys() - free_flags(type(self.options))
        changed = [f"--{k} was {earlier[k]}" for k in sorted(compared) if earlier[k] != self.recorded[k]]
        if changed:
            raise ValueError(
                f"{path} is of a run with other flags ({', '.join(changed)}): give the same, or start over"
            )
        print(f"continuing from {path}")
        return path

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Write checkpoint-STEP, whole or not at all; then remove the oldest ones beyond the limit."""
        with files.new_folder(self.path / f"checkpoint-{trainer.step}") as folder:
            checkpoint.save(trainer, folder, self.recorded)
        limit = self.options.checkpoints_total_limit
        for path in self.checkpoints()[: -limit if limit else 0]:
            shutil.rmtree(path)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


class Log:
    """The progress bar and the values of updates, whose losses and norms stay on the device until `flush`, so
    that logging does not hold up the GPU."""

    def __init__(self, folder: RunFolder, step: int, total: int, *, show: bool):
        name = folder.recorded["method"]
        self.folder = folder
        self.bar = tqdm(total=total, initial=step, desc=name, dynamic_ncols=True, disable=not show)
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Remember the values of an update, and advance the bar."""
        self.pending.append((step, loss, grad_norm, lr))
        self.bar.update()

    def flush(self) -> None:
        """Write what was added since the last call. ValueError if a loss is not a number."""
        if not self.pending:
            return
        steps, losses, norms, rates = zip(*self.pending, strict=True)
        self.pending.clear()
        values = zip(steps, torch.stack(losses).tolist(), torch.stack(norms).tolist(), rates, strict=True)
        for step, loss, norm, lr in values:
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of update {step} is {loss}; it was not saved, the last checkpoint is good. "
                    "A lower --learning_rate, or --mixed_precision bf16 or no, may help"
                )
            self.folder.log(step, loss=loss, lr=lr, grad_norm=norm)
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2g}", mem=peak_memory(), refresh=False)


def peak_memory() -> str:
    """The peak of the GPU's memory, or of the process's without a GPU."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}G"
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}G"
