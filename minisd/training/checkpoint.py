"""Checkpoints, from which a run can be resumed to the same bytes.

A checkpoint holds the trained tensors, the optimizer's state and a few numbers. It needs no random state,
because every draw is a function of the seed and the number of its sample (minisd/noise.py). state.json
has the tensors and the digest of each file, and a digest of its own: only what was written is ever loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from minisd import files, reading
from minisd.options import require
from minisd.training.optim import Outside
from minisd.training.step import Trainer

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
NUMBERS = {float: torch.float64, int: torch.int64, bool: torch.bool}  # as tensors without dimensions
KINDS = {"step": int, "samples": int, "scaler": dict, "options": dict}  # what state.json holds at least


@dataclass
class State:
    """What a checkpoint holds: the tensors of trained.safetensors by name, and of optimizer.safetensors the
    optimizer's state as NAME|KEY and the average as NAME|average; and the numbers of state.json."""

    tensors: dict[str, dict[str, Tensor]]
    numbers: dict

    @classmethod
    def of(cls, trainer: Trainer, *, copied: bool) -> "State":
        """As it is now, or as it stays while training goes on if `copied`, to the CPU. The first process gets
        what is in parts as a whole, on the CPU."""
        tensors = {f: {n: gathered(trainer, n, t) for n, t in ts.items()} for f, ts in own(trainer).items()}
        if copied:
            tensors = {f: {n: t.to("cpu", copy=True) for n, t in ts.items()} for f, ts in tensors.items()}
        numbers = {"step": trainer.step, "samples": trainer.samples, "scaler": trainer.scaler.state_dict()}
        return cls(tensors, numbers)

    def save(self, folder: Path, recorded: dict, conditions: dict | None = None) -> None:
        """Write the files, with the options, `recorded`, and the `conditions` of the run in state.json."""
        for name, tensors in self.tensors.items():
            files.write(folder / name, tensors)
        listed = {n: {"sha256": digest(folder / n), "tensors": layout(t)} for n, t in self.tensors.items()}
        state = self.numbers | {"conditions": conditions or {}, "options": recorded, "files": listed}
        files.write_text(folder / STATE, json.dumps(state | {"sha256": own_digest(state)}, indent=2))


def verdicts(folder: Path) -> dict[str, str]:
    """The kernels' verdicts with which the run of a checkpoint goes on."""
    return reading.read_json(folder / STATE).get("conditions", {}).get("kernels", {})


def places(trainer: Trainer) -> dict[str, dict]:
    """What the optimizer keeps: by what trains, and another than AdamW also by the number of a group, where
    settings that stay are left out."""
    optimizer = trainer.optimizer
    state = {name: optimizer.state.get(p, {}) for name, p in trainer.trained.items()}
    for i, group in enumerate(optimizer.param_groups if isinstance(optimizer, Outside) else ()):
        state[str(i)] = {k: v for k, v in group.items() if isinstance(v, Tensor)}
        state[str(i)] |= {
            k: v for k, v in group.items() if type(v) in NUMBERS and v != optimizer.defaults.get(k)
        }
    return state


def slots(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's state as NAME|KEY, numbers with 64 bits, the averages as NAME|average, and what the
    method keeps."""
    state = ((f"{name}|{k}", v) for name, slot in places(trainer).items() for k, v in slot.items())
    tensors = {key: torch.as_tensor(v, dtype=NUMBERS.get(type(v))) for key, v in state if v is not None}
    if trainer.ema:
        averages = zip(trainer.trained, trainer.ema.average, strict=True)
        tensors |= {f"{name}|average": average for name, average in averages}
    return tensors | trainer.method.kept


def own(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """What this process has of a checkpoint's tensors, by file and name."""
    return {TRAINED: {n: p.detach() for n, p in trainer.trained.items()}, OPTIMIZER: slots(trainer)}


def gathered(trainer: Trainer, key: str, own: Tensor) -> Tensor:
    """A whole tensor of a checkpoint, on the CPU if it was in parts. All processes call this for each; the
    first gets it."""
    whole = trainer.averaging.joined(key, own)
    if whole is own:
        return own
    whole = whole.full_tensor()
    return whole.cpu() if trainer.processes.first else own


def layout(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type and shape of each tensor, such as "F32 [320, 4, 3, 3]"."""
    return {name: f"{files.DTYPES.get(t.dtype, t.dtype)} {[*t.shape]}" for name, t in tensors.items()}


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_digest(state: dict) -> str:
    """The SHA-256 of the content of state.json, without this digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sums(networks: Iterable[Module], folder: Path | None) -> dict[str, int]:
    """The sum of the bytes of every tensor of the networks, and of a checkpoint."""
    tensors = {f"{i}.{k}": t for i, n in enumerate(networks) for k, t in n.state_dict().items()}
    for name in (TRAINED, OPTIMIZER) if folder else ():
        tensors |= {f"{name} {k}": t for k, t in files.read(folder / name).items()}
    return {k: t.reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item() for k, t in tensors.items()}


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number."""
    floats = ((name, tensor.float()) for name, tensor in tensors if tensor.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)


def check(folder: Path) -> dict:
    """The content of state.json. ValueError, saying what is wrong, if it or one of the tensors' files is not
    what was written. Those of an earlier version have no digests; their values have to be finite."""
    state = reading.read_json(folder / STATE)
    wrong = [name for name, kind in KINDS.items() if type(state.get(name)) is not kind]
    if wrong or min(state["step"], state["samples"]) < 0:
        raise ValueError(f"{folder / STATE} is damaged: it has no valid {' and '.join(wrong or ['step'])}")
    if not {"files", "sha256", "conditions"} & state.keys():
        for name in (TRAINED, OPTIMIZER):
            if bad := not_finite(files.read(folder / name).items()):
                raise ValueError(f"{folder / name} has values in {bad} that are not finite")
        return state
    if state.pop("sha256", None) != own_digest(state):
        raise ValueError(f"{folder / STATE} is damaged: it is not what was written")
    for name, listed in state["files"].items():
        here, there = layout(files.read(folder / name)), listed["tensors"]
        if changed := [n for n in here.keys() | there.keys() if here.get(n) != there.get(n)]:
            n = min(changed)
            raise ValueError(f"{folder / name} has {n} as {here.get(n)}; {there.get(n)} was written")
        if digest(folder / name) != listed["sha256"]:
            raise ValueError(f"{folder / name} is damaged: it is not what was written")
    return state


@torch.no_grad()
def restore(trainer: Trainer, folder: Path) -> None:
    """Continue from a checkpoint. ValueError, naming the file, if it does not fit what trains."""
    trained, share, numbers = trainer.trained, trainer.averaging, reading.read_json(folder / STATE)
    saved = {name: files.read(folder / name) for name in (TRAINED, OPTIMIZER)}
    updated = {key.rpartition("|")[0] for key in saved[OPTIMIZER] if not key.endswith("|average")}
    require(updated or not numbers["step"], f"{folder / OPTIMIZER} has no state of an optimizer")
    if isinstance(trainer.optimizer, Outside):
        fill(trainer, saved[OPTIMIZER])
    else:
        for name in updated & trained.keys():
            trainer.optimizer.slot(trained[name])
    here = own(trainer)
    rates = {k: v for k, v in here[OPTIMIZER].items() if k.endswith(("|lr", "|peak"))}
    saved[OPTIMIZER] = rates | saved[OPTIMIZER]  # 8-bit Adam's of an earlier version have none
    for file in saved:
        fits = layout(saved[file]) == layout({n: share.joined(n, t) for n, t in here[file].items()})
        require(fits, f"{folder / file} is not of what trains here, by name, type or shape")
    for file in saved:
        for name, value in saved[file].items():
            here[file][name].copy_(share.part(name, value))
    trainer.step, trainer.samples = numbers["step"], numbers["samples"]
    if numbers["scaler"]:
        trainer.scaler.load_state_dict(numbers["scaler"])


def fill(trainer: Trainer, saved: Mapping[str, Tensor]) -> None:
    """Give another optimizer than AdamW its saved state. As in torch, a count is on the CPU, unless fused."""
    optimizer, known, place = trainer.optimizer, places(trainer), trainer.parameters[0].device
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in saved.items():
        name, _, part = key.rpartition("|")
        if part != "average" and name in known:
            p, count = trainer.trained.get(name), not value.ndim
            slot = optimizer.param_groups[int(name)] if p is None else optimizer.state[p]
            tensor = value.to("cpu" if count and not fused else place, copy=True)
            slot[part] = value.item() if count and value.dtype in NUMBERS.values() else tensor
