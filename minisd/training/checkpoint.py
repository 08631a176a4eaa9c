"""Checkpoints, from which a run can be resumed to the same bytes.

A checkpoint holds the trained tensors, the optimizer's state and a few numbers. It needs no random state,
because every draw is a function of the seed and the number of its sample (minisd/noise.py).
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from minisd import files, reading
from minisd.training.step import Trainer


def save(trainer: Trainer, folder: Path, recorded: dict) -> None:
    """Write trained.safetensors, optimizer.safetensors with the optimizer's state as NAME|KEY and the average
    as NAME|average, and state.json with the options, `recorded`."""
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
    numbers = reading.read_json(folder / "state.json")
    trainer.step, trainer.samples = numbers["step"], numbers["samples"]
    if numbers["scaler"]:
        trainer.scaler.load_state_dict(numbers["scaler"])
