"""Checkpoints, from which a run can be resumed to the same bytes.

A checkpoint holds the trained tensors, the optimizer's state and a few numbers. It needs no random state,
because every draw is a function of the seed and the number of its sample (minisd/noise.py).
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minisd import files
from minisd.options import Run, free_flags
from minisd.training.step import Trainer


def save(trainer: Trainer, folder: Path, recorded: dict) -> None:
    """Write a checkpoint: trained.safetensors, the optimizer's state as NAME|KEY and the average as
    NAME|average in optimizer.safetensors, and state.json with `recorded`, the options."""
    names, slots = list(trainer.trained), trainer.optimizer.state_dict()["state"]
    tensors = {f"{names[i]}|{k}": torch.as_tensor(v) for i, slot in slots.items() for k, v in slot.items()}
    if trainer.ema:
        tensors |= {f"{name}|average": a for name, a in zip(names, trainer.ema.average, strict=True)}
    files.write(folder / "trained.safetensors", {name: p.detach() for name, p in trainer.trained.items()})
    files.write(folder / "optimizer.safetensors", tensors)
    numbers = {"step": trainer.step, "samples": trainer.samples, "scaler": trainer.scaler.state_dict()}
    files.write_text(folder / "state.json", json.dumps(numbers | {"options": recorded}, indent=2))


@torch.no_grad()
def restore(trainer: Trainer, folder: Path) -> None:
    """Continue from a checkpoint."""
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in trainer.trained}
    for key, value in files.read(folder / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        parameter, copy = trainer.trained[name], torch.empty_like(value)
        if value.shape == parameter.shape:  # then in the same memory layout too
            copy = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
        slots[name][kind] = copy.copy_(value)
    averages = [slot.pop("average", None) for slot in slots.values()]
    groups = trainer.optimizer.state_dict()["param_groups"]
    by_number = {i: slot for i, slot in enumerate(slots.values()) if slot}
    trainer.optimizer.load_state_dict({"state": by_number, "param_groups": groups})
    for name, value in files.read(folder / "trained.safetensors").items():
        trainer.trained[name].copy_(value)
    if trainer.ema:
        torch._foreach_copy_(trainer.ema.average, averages)
    numbers = files.read_json(folder / "state.json")
    trainer.step, trainer.samples = numbers["step"], numbers["samples"]
    if numbers["scaler"]:
        trainer.scaler.load_state_dict(numbers["scaler"])


class Checkpoints:
    """The folders checkpoint-STEP of a run. `recorded` are its options as options.json has them."""

    def __init__(self, options: Run, recorded: dict):
        self.folder: Path = options.output_dir
        self.options = options
        self.recorded = recorded

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        numbered = [p for p in self.folder.glob("checkpoint-*") if p.name[11:].isdigit() and p.is_dir()]
        return sorted(numbered, key=lambda p: int(p.name[11:]))

    def resume(self) -> Path | None:
        """The checkpoint to continue from, or None to start at 0. ValueError if the flags do not say clearly
        which, or differ from those of the checkpoint."""
        source, existing = self.options.resume_from_checkpoint, self.all()
        if source is None:
            if existing and not self.options.overwrite_output_dir:
                raise ValueError(
                    f"--output_dir {self.folder} has checkpoints, up to {existing[-1].name}: "
                    "--resume_from_checkpoint latest continues it, --overwrite_output_dir starts over"
                )
            return None
        if source == "latest" and not existing:
            print(f"--resume_from_checkpoint latest: none in {self.folder} yet, so this run starts at 0")
            return None
        paths = existing[-1:] if source == "latest" else [Path(source), self.folder / Path(source).name]
        path = next((p for p in paths if p.is_dir()), None)
        if path is None:
            raise ValueError(f"--resume_from_checkpoint: there is no folder {source}")
        earlier = files.read_json(path / "state.json")["options"]
        compared = earlier.keys() & self.recorded.keys() - free_flags(type(self.options))
        changed = [k for k in sorted(compared) if earlier[k] != self.recorded[k]]
        if changed:
            before = ", ".join(f"--{k} was {earlier[k]}" for k in changed)
            raise ValueError(f"{path} is of a run with other flags ({before}): give the same, or start over")
        print(f"continuing from {path}")
        return path

    def save(self, trainer: Trainer) -> None:
        """Write checkpoint-STEP, whole or not at all; then remove those over the limit."""
        with files.new_folder(self.folder / f"checkpoint-{trainer.step}") as folder:
            save(trainer, folder, self.recorded)
        limit = self.options.checkpoints_total_limit
        for path in self.all()[: -limit if limit else 0]:
            shutil.rmtree(path)
