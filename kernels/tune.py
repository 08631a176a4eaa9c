"""MINISD_AUTOTUNE=1: the first call of an (op, shape class) times candidates on this GPU and keeps the best.

Winners go to ~/.cache/minisd/tiles.json (or $MINISD_TILES) under the device's name, so the search runs once
on a machine. It times a typical shape of the class on tensors of its own, never the caller's, and is skipped
while a CUDA graph is captured. Without the variable the kernels' tables hold, and nothing is searched.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import minisd.kernels.checks as checks
import torch
import triton
from minisd.kernels.kernel import discover
from minisd.kernels.launch import Tiles
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

# What a tile raises that the chip cannot take
UNFIT = OutOfResources, PTXASError, CompilationError


def sample(tiles: Tiles, shape_class: int | str, device: torch.device) -> Callable:
    """A call that runs the launch on the typical case of its shape class, in bf16."""
    kernel = next(kernel for kernel in discover().values() if tiles in kernel.tiles)
    case = kernel.typical(shape_class)
    tensors, constants = case.make(functools.partial(torch.randn, device=device))
    tensors = checks.place(tensors, torch.bfloat16, device, case.layout)
    return kernel.launchers(*tensors.values(), *constants.values())[tiles.backward]


def milliseconds(call: Callable) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def search(tiles: Tiles, shape_class: int | str, device: torch.device) -> dict:
    """The fastest candidate, the table's tile among them; those that do not fit the chip are left out."""
    usual = tiles.pick(shape_class, device)
    call = sample(tiles, shape_class, device)
    times: list[tuple[float, dict]] = []
    for tile in [usual, *(t for t in tiles.candidates if t != usual)]:
        try:
            with tiles.only(tile):
                times.append((milliseconds(call), tile))
        except UNFIT:
            continue
    return min(times, key=lambda timed: timed[0])[1]


def path() -> Path:
    return Path(os.environ.get("MINISD_TILES") or Path.home() / ".cache" / "minisd" / "tiles.json")


@functools.cache
def stored() -> dict[str, dict]:
    return json.loads(path().read_text()) if path().exists() else {}


def store(key: str, tile: dict) -> None:
    """Written beside and renamed, so that a reader never meets half a file; the last writer wins."""
    stored()[key] = tile
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as file:
        json.dump(stored(), file, indent=1, sort_keys=True)
    os.replace(file.name, path())


_searching = False


def winner(tiles: Tiles, shape_class: int | str, device: torch.device) -> dict | None:
    """The tile to use instead of the table's, or None."""
    global _searching
    key = f"{torch.cuda.get_device_name(device)}/{tiles.name}/{shape_class}"
    if key not in stored() and not _searching and not torch.cuda.is_current_stream_capturing():
        _searching = True
        try:
            with torch.no_grad():
                store(key, search(tiles, shape_class, device))
        finally:
            _searching = False
        print(f"tuned {key}: {stored()[key]}", file=sys.stderr)
    return stored().get(key)
