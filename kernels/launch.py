"""What every kernel needs before its first line: may this tensor take it, which tile, and the call itself.

    why_not(q, k, v)                     "" if a kernel can run on these tensors, else the reason
    tile("attention_fwd", 40, device)    the tile of the table, a dict of constexprs and compile options
    launch(kernel, grid, *args, **meta)  the call; while `record()` is open it is written down instead of run

Tiles are fixed by (op, shape class, GPU family) and not searched at start-up: a search compiles every
candidate, 1 to 3 s each. `MINISD_AUTOTUNE=1` searches once and keeps what it found: see tune.py.
"""

import contextlib
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

AUTOTUNE = os.environ.get("MINISD_AUTOTUNE") == "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)
TRITON_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}

# GPU families on which `pytest -m gpu` and the benchmark have been run. On others `auto` leaves the work to
# torch: a kernel that nobody has timed on a chip may be slower there, and one that nobody has run, wrong.
MEASURED: frozenset[int] = frozenset()

# ------------------------------ Tile tables


def T(BLOCK_M: int, BLOCK_N: int, num_warps: int, num_stages: int = 2, **more) -> dict:
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages, **more)


# op -> shape class -> GPU family -> tile. Attention: the class is the head width rounded up to 32, 40, 64,
# 80, 128 or 160; BLOCK_M counts queries, BLOCK_N keys. A missing family takes the next older one. Found by
# compiling, not yet by timing: `python -m minisd.kernels.aot` prints what each takes of the chip.
TILES: dict[str, dict[int | str, dict[int, dict]]] = {
    "attention_fwd": {
        32: {80: T(64, 64, 4), 90: T(128, 64, 8)},
        40: {80: T(64, 64, 4), 90: T(128, 64, 8)},
        64: {80: T(64, 64, 4), 90: T(128, 64, 8)},
        80: {80: T(64, 64, 4), 90: T(64, 64, 4)},
        128: {80: T(64, 32, 4), 90: T(64, 64, 4)},
        160: {80: T(64, 32, 4), 90: T(64, 64, 4)},
    },
    "attention_bwd_dq": {
        32: {80: T(64, 64, 4)},
        40: {80: T(64, 64, 4)},
        64: {80: T(64, 64, 4)},
        80: {80: T(64, 32, 4), 90: T(64, 64, 4)},
        128: {80: T(64, 32, 4), 90: T(64, 64, 4)},
        160: {80: T(64, 32, 4), 90: T(64, 64, 4)},
    },
    "attention_bwd_dkdv": {
        32: {80: T(32, 64, 4), 90: T(64, 64, 4)},
        40: {80: T(32, 64, 4), 90: T(64, 64, 4)},
        64: {80: T(32, 64, 4), 90: T(64, 64, 4)},
        80: {80: T(32, 64, 4), 90: T(64, 64, 4)},
        128: {80: T(32, 64, 8), 90: T(32, 64, 4)},
        160: {80: T(32, 64, 4), 86: T(16, 64, 8), 90: T(32, 64, 8)},
    },
    "cross_attention_fwd": {
        **{c: {80: dict(BLOCK_M=64, num_warps=4)} for c in (32, 40, 64, 80, 128)},
        160: {80: dict(BLOCK_M=64, num_warps=8), 90: dict(BLOCK_M=64, num_warps=4)},
    },
    "cross_attention_bwd": {
        32: {80: dict(BLOCK_M=64, num_warps=8)},
        40: {80: dict(BLOCK_M=32, num_warps=8), 90: dict(BLOCK_M=64, num_warps=8)},
        64: {80: dict(BLOCK_M=32, num_warps=8)},
        80: {80: dict(BLOCK_M=32, num_warps=8)},
    },
    "geglu": {"any": {80: dict(BLOCK_N=1024, num_warps=4)}},
    # BLOCK_N pixels, BLOCK_C channels; a warp should read whole 128-byte lines in either layout
    "group_norm_fwd": {
        "channels_last": {80: dict(BLOCK_N=64, BLOCK_C=64, num_warps=4)},
        "contiguous": {80: dict(BLOCK_N=512, BLOCK_C=8, num_warps=4)},
    },
    "group_norm_bwd": {
        "channels_last": {80: dict(BLOCK_N=32, BLOCK_C=64, num_warps=4)},
        "contiguous": {80: dict(BLOCK_N=256, BLOCK_C=8, num_warps=4)},
    },
}


def family(capability: int) -> int:
    """The tile tables' key for a compute capability; 12.x has the shared memory and mma of 8.6."""
    if capability >= 120:
        return 86
    return max((f for f in (80, 86, 90, 100) if f <= capability), default=80)


def measured(device: torch.device) -> bool:
    return family(capability(device)) in MEASURED


def tile(op: str, shape_class, device: torch.device) -> dict:
    """A copy of the table's tile for this device, or of the one that MINISD_AUTOTUNE=1 found on it."""
    if AUTOTUNE and device.type == "cuda" and _recorder is None:
        import minisd.kernels.tune as tune

        if found := tune.winner(op, shape_class, device):
            return dict(found)
    row = TILES[op][shape_class]
    return dict(row[max(f for f in row if f <= family(capability(device)))])


# ------------------------------ May a tensor take a kernel?


@torch.compiler.assume_constant_result
@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100; the oldest supported one where no chip is asked (interpreter)."""
    if _recorder is not None:
        return _recorder.capability
    if device.type != "cuda":
        return 80
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def why_not(*tensors: Tensor, dtypes: tuple = HALF) -> str:
    """An empty string if kernels can run on these tensors (one device, an allowed type), else the reason."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if any(t.device != device for t in tensors):
        return f"the tensors are on different devices, {sorted({str(t.device) for t in tensors})}"
    if INTERPRET and device.type == "cpu":
        # fp32 is what the interpreter is for; its bf16 matrix product multiplies the raw bits, without a word
        if dtypes == HALF and dtype == torch.bfloat16:
            return "Triton's interpreter gets bfloat16 products wrong"
        dtypes = FLOAT
    elif device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels run on CUDA"
    elif torch.version.hip:
        return "the kernels are not made for ROCm"
    elif capability(device) < 80:
        return f"compute capability {capability(device) / 10}, the kernels need 8.0"
    wrong = {t.dtype for t in tensors if t.dtype not in dtypes}
    if wrong:
        have, take = (", ".join(sorted(str(d).removeprefix("torch.") for d in s)) for s in (wrong, dtypes))
        return f"{have} input, the kernel takes {take}"
    if any(t.numel() == 0 for t in tensors):
        return f"an empty tensor of {dtype}"
    return ""


# ------------------------------ Layouts


def layout(x: Tensor) -> str:
    """`channels_last` for a 4-d tensor dense in that order, otherwise `contiguous`."""
    nhwc = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if nhwc else "contiguous"


def dense(t: Tensor, like: Tensor | None = None) -> Tensor:
    """t without gaps in the layout of `like` or its own: a gradient may come expanded or in the other."""
    last = layout(t if like is None else like) == "channels_last"
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ------------------------------ The call


class Recorder:
    """Calls written down instead of run: kernel, arguments and constants, for one compute capability."""

    def __init__(self, capability: int):
        self.capability = capability
        self.calls: list[tuple] = []


_recorder: Recorder | None = None


@contextlib.contextmanager
def record(capability: int):
    """Inside, `launch` only writes calls down, and every device counts as one of this capability."""
    global _recorder
    _recorder = Recorder(capability)
    try:
        yield _recorder
    finally:
        _recorder = None


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """kernel[grid](*args, **meta) on the device of the first argument."""
    if _recorder is not None:
        _recorder.calls.append((kernel, args, meta))
        return
    if not INTERPRET:
        meta["enable_fp_fusion"] = (
            True  # 3.9 warns that the default will turn; without it every a*b+c is two steps
        )
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def function(forward: Callable, setup_context: Callable, backward: Callable):
    """An autograd.Function of the pieces that a torch.library operator takes."""
    pieces = dict(forward=forward, setup_context=setup_context, backward=backward)
    return type("Kernel", (torch.autograd.Function,), {k: staticmethod(v) for k, v in pieces.items()})


def call(operator, eager, *arguments):
    """The operator under torch.compile and, for its CPU reference, on the CPU; else the eager function.

    Both run the same launchers; the autograd of an operator costs some 80 us a call more, 150 times a UNet.
    """
    x = arguments[0]
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return eager.apply(*arguments) if plain and (x.is_cuda or INTERPRET) else operator(*arguments)


def compile_options(meta: dict) -> tuple[dict, dict]:
    """Split what `launch` got into (constexprs, compile options)."""
    options = {k: v for k, v in meta.items() if k in ("num_warps", "num_stages", "maxnreg")}
    return {k: v for k, v in meta.items() if k not in options}, options


# Triton's own versions of these two are traceable, and slow: 5 us each, several times a call


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest one that is at least n."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
