"""MINISD_AUTOTUNE=1: the first call of an (op, shape class) times candidates on this GPU and keeps the best.

The fastest tiles are written to ~/.cache/minisd/tiles.json (or $MINISD_TILES) under the device's name, so the
search runs once per machine. It times a typical shape of the class on tensors of its own, not the caller's,
and is skipped while a CUDA graph is captured. Without the variable the kernels' own tables are used.
"""

import contextlib
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

# Raised for a tile that needs more than the GPU has
UNFIT = OutOfResources, PTXASError, CompilationError


def sample(tiles: Tiles, shape_class: int | str, device: torch.device) -> Callable:
    """Return a call that runs the launch on the typical case of its shape class, in bf16."""
    kernel = next(kernel for kernel in discover().values() if tiles in kernel.tiles)
    randn = functools.partial(torch.randn, device=device)
    tensors, constants = checks.inputs(kernel.typical(shape_class), torch.bfloat16, device, randn=randn)
    return kernel.launchers(*tensors.values(), *constants.values())[tiles.backward]


def milliseconds(call: Callable) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def search(tiles: Tiles, shape_class: int | str, device: torch.device) -> dict:
    """Return the fastest of the table's tile and the candidates, without those that do not fit the GPU."""
    usual = tiles.pick(shape_class, device)
    call = sample(tiles, shape_class, device)
    times: list[tuple[float, dict]] = []
    for tile in [usual, *(t for t in tiles.candidates if t != usual)]:
        with tiles.only(tile), contextlib.suppress(*UNFIT):
            times.append((milliseconds(call), tile))
    return min(times, key=lambda timed: timed[0])[1]


def path() -> Path:
    return Path(os.environ.get("MINISD_TILES") or Path.home() / ".cache" / "minisd" / "tiles.json")


@functools.cache
def stored() -> dict[str, dict]:
    return json.loads(path().read_text()) if path().exists() else {}


def store(key: str, tile: dict) -> None:
    """Write the file atomically, so that no reader sees half of it; the last writer wins."""
    stored()[key] = tile
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as file:
        json.dump(stored(), file, indent=1, sort_keys=True)
    os.replace(file.name, path())


_searching = False


def winner(tiles: Tiles, shape_class: int | str, device: torch.device) -> dict | None:
    """Return the tile to use instead of the table's, or None; search for it if this is the first call."""
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
