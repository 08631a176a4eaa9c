"""MINISD_AUTOTUNE=1: the first call of an (op, shape class) times candidates on this GPU and keeps the best.

Winners go to ~/.cache/minisd/tiles.json (or $MINISD_TILES) under the device's name, so the search runs once
on a machine. It times a typical shape of the class on tensors of its own, never the caller's, and is skipped
while a CUDA graph is captured. Without the variable launch.py's tables hold, and nothing is searched.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import minisd.kernels.launch as L
import torch
import triton
from minisd.kernels.launch import T

ATTENTION = [T(64, 32, 4), T(32, 64, 4), T(64, 64, 4), T(64, 128, 4), T(128, 64, 8), T(128, 128, 8)]
CROSS = [dict(BLOCK_M=m, num_warps=w) for m, w in ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8))]
ROWS = [
    dict(BLOCK_N=n, BLOCK_C=c, num_warps=w)
    for n, c, w in ((32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 4))
]
PIXELS = [dict(BLOCK_N=n, BLOCK_C=c, num_warps=4) for n, c in ((256, 8), (512, 8), (1024, 4), (512, 4))]
CANDIDATES = {
    "attention_fwd": ATTENTION + [t | dict(ANCHOR=True) for t in ATTENTION],  # bf16 alone uses the anchor
    "attention_bwd_dq": ATTENTION,
    "attention_bwd_dkdv": ATTENTION,
    "cross_attention_fwd": CROSS,
    "cross_attention_bwd": CROSS,
    "group_norm_fwd": ROWS + PIXELS,
    "group_norm_bwd": ROWS + PIXELS,
    "geglu": [dict(BLOCK_N=n, num_warps=w) for n, w in ((512, 2), (512, 4), (1024, 4), (2048, 8))],
}
TOKENS = {32: 1024, 40: 4096, 64: 4096, 80: 1024, 128: 1024, 160: 256}  # of an SD layer with such heads


def sample(op: str, shape_class, device: torch.device) -> Callable:
    """A call that runs `op` on a typical shape of its class, in bf16."""
    import minisd.kernels.attention as attention
    import minisd.kernels.cross_attention as cross_attention
    import minisd.kernels.geglu as geglu
    import minisd.kernels.group_norm as group_norm

    empty = functools.partial(torch.zeros, dtype=torch.bfloat16, device=device)
    if op == "geglu":
        x = empty(4, 4096, 2560)
        return lambda: geglu.forward(x)
    if op.startswith("group_norm"):
        layout = getattr(torch, "channels_last" if shape_class == "channels_last" else "contiguous_format")
        x, w = empty(4, 320, 64, 64).contiguous(memory_format=layout), empty(320)
        y, mean, rstd = group_norm._forward(x, w, w, None, 32, 1e-5, True)
        if op.endswith("fwd"):
            return lambda: group_norm._forward(x, w, w, None, 32, 1e-5, True)
        return lambda: group_norm._backward(y, x, w, w, None, mean, rstd, 32, True)
    module = cross_attention if op.startswith("cross") else attention
    n = TOKENS[shape_class]
    q, k = empty(4, n, 8, shape_class), empty(4, 77 if module is cross_attention else n, 8, shape_class)
    o, lse = module.forward(q, k, k)
    if op.endswith("fwd"):
        return lambda: module.forward(q, k, k)
    return lambda: module.backward(o, q, k, k, o, lse)


def milliseconds(call: Callable) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def search(op: str, shape_class, device: torch.device) -> dict:
    """The fastest candidate, the table's among them; what does not fit the chip raises, and is out."""
    usual = dict(L.tile(op, shape_class, device))
    call, row = sample(op, shape_class, device), L.TILES[op][shape_class]
    times: list[tuple[float, dict]] = []
    for tile in [usual, *(t for t in CANDIDATES[op] if t != usual)]:
        L.TILES[op][shape_class] = {80: tile}
        with contextlib.suppress(
            triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError
        ):
            times.append((milliseconds(call), tile))
    L.TILES[op][shape_class] = row
    return min(times, key=lambda found: found[0])[1]


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


def winner(op: str, shape_class, device: torch.device) -> dict | None:
    """The tile to use instead of the table's, or None."""
    global _searching
    key = f"{torch.cuda.get_device_name(device)}/{op}/{shape_class}"
    if key not in stored() and not _searching and not torch.cuda.is_current_stream_capturing():
        _searching = True
        try:
            with torch.no_grad():
                store(key, search(op, shape_class, device))
        finally:
            _searching = False
        print(f"tuned {key}: {stored()[key]}", file=sys.stderr)
    return stored().get(key)
