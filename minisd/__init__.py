"""minisd: Stable Diffusion v1.x, small enough to read.

import minisd

sd = minisd.load("v1-5-pruned-emaonly.safetensors")
sd.attach("lora.safetensors", 0.8)
images = sd.generate("a photo of a cat", steps=20, seed=0)

run = minisd.train("lora", data="./cat", instance_prompt="a photo of sks cat", max_train_steps=500)
sd.attach(run.path)

`minisd.Method`, `minisd.Problem` and `minisd.SigmaSchedule`, with the settings that these read, are what
methods and schedulers in files of your own are made from (docs/research.md).
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.methods._base import Method as Method
    from minisd.sampling.api import Model, PixelModel
    from minisd.schedulers._problem import CLIPPING as CLIPPING
    from minisd.schedulers._problem import TIMESTEPS as TIMESTEPS
    from minisd.schedulers._problem import Problem as Problem
    from minisd.schedulers._sigmas import SIGMAS as SIGMAS
    from minisd.schedulers._sigmas import SigmaSchedule as SigmaSchedule
    from minisd.training.report import RunData


__version__ = "0.1.0"


def load(model: str | Path, **options) -> Model | PixelModel:
    """Load the model in a folder, a file or a hub id; by default on the GPU and in fp16 if there is one, else
    in bf16 on a CPU that is faster in it.
    `options` are those of StableDiffusion.load."""
    import torch

    from minisd.device import precision
    from minisd.sampling import api

    options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    options.setdefault("dtype", precision("auto", torch.device(options["device"])))
    return api.load(model, **options)


def train(
    method: str, *, on_update: Callable[[int, dict[str, float]], None] | None = None, **flags
) -> RunData | None:
    """Train as train.py does, by the same flags, and return the run: its folder, `path`, which `load` or
    `attach` takes, its `options`, and the rows of its `log`; None with --check_data or --plan.
    `on_update(step, values)` hears of each update (loss, lr, grad_norm; on a GPU of ten at a time) and of
    held-out losses. ValueError, naming the flag, as in train.py. A signal counts once the run has saved a
    checkpoint."""
    from minisd import keywords

    options = keywords.options(method, flags)

    from minisd import device, terminal
    from minisd.training import loop, report
    from minisd.training.run_folder import RunFolder

    with terminal.shared(), device.unchanged():
        folder = RunFolder(method, options, on_update)
        status = loop.start(folder)
    if status:
        signal.raise_signal(status - 128)
    return report.RunData.read(folder.path) if folder.conditions else None


OFFERED = {
    "Method": "methods._base", "Problem": "schedulers._problem", "TIMESTEPS": "schedulers._problem",
    "CLIPPING": "schedulers._problem", "SIGMAS": "schedulers._sigmas", "SigmaSchedule": "schedulers._sigmas",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """The names for files of one's own, imported when they are asked for."""
    if name not in OFFERED:
        raise AttributeError(f"module minisd has no attribute {name!r}")
    return getattr(importlib.import_module(f"minisd.{OFFERED[name]}"), name)
