"""The folder of a run: options.json, log.jsonl, images and checkpoints."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd import files
from minisd.data import images
from minisd.options import Run
from minisd.training import trackers
from minisd.training.checkpoint import Checkpoints


class RunFolder:
    """--output_dir of a run, and the trackers that its curves and images go to as well."""

    def __init__(self, method: str, options: Run):
        self.path: Path = options.output_dir
        self.options = options
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
        del values["hub_token"]
        self.recorded = {"method": method} | values
        self.checkpoints = Checkpoints(options, self.recorded)
        self.trackers: list = []

    def start(self, step: int) -> None:
        """Make the folder, or remove from it what is not of a run that continues after update `step`; leave
        the options in it and start the trackers."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--output_dir {self.path}: {e.strerror}") from None
        for path in [*files.leftovers(self.path), *(self.checkpoints.all() if step == 0 else [])]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._truncate_log(step)
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

    def _truncate_log(self, step: int) -> None:
        """Remove what an interrupted run logged after update `step`."""
        path = self.path / "log.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


class Log:
    """The progress bar, and the losses and norms of updates, which stay on the device until `flush`, so that
    logging does not hold up the GPU."""

    def __init__(self, folder: RunFolder, step: int, total: int, *, show: bool):
        name = folder.recorded["method"]
        self.folder = folder
        self.bar = tqdm(total=total, initial=step, desc=name, dynamic_ncols=True, disable=not show)
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Remember what an update came to."""
        self.pending.append((step, loss, grad_norm, lr))
        self.bar.update()

    def flush(self) -> None:
        """Write what was added since. ValueError if a loss is not a number."""
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
    """The most memory that the run has held so far, of the GPU or of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}G"
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}G"
