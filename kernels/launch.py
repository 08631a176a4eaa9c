"""What every launcher needs: whether a kernel can run on these tensors, which tile it takes, and the call.

    why_not(q, k, v, dtypes=HALF)         why kernels cannot run on these tensors, or an empty string
    Tiles(...).pick(shape_class, device)  the tile of the table, a dict of constexprs and compile options
    launch(kernel, grid, *args, **meta)   the call; inside `record` it is recorded and not run

Tiles are fixed by (launch, shape class, GPU family) and not searched: every candidate would take 1 to 3 s to
compile.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)

# ------------------------------ The GPU

FAMILIES = (80, 86, 90, 100)  # compute capabilities at which the tile tables may change


def capability(device: torch.device) -> int:
    """Ten times the compute capability: 80 for an A100, 90 for an H100; 80 on the CPU (interpreter)."""
    if _recording is not None:
        return _recording[0]
    if device.type != "cuda":
        return 80
    # of the functions that return it, the one that torch.compile treats as a constant
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def family(capability: int) -> int:
    """Return the tile tables' key for a compute capability; 12.x has the shared memory and mma of 8.6."""
    return 86 if capability >= 120 else max([f for f in FAMILIES if f <= capability], default=80)


# ------------------------------ Tile tables


class Tiles:
    """The tiles of a launch: shape class -> GPU family -> tile; a missing family takes the next older one."""

    def __init__(self, name: str, table: dict):
        self.name, self.table = name, table

    def pick(self, shape_class: int | str, device: torch.device) -> dict:
        """Return a copy of the table's tile for this device."""
        row = self.table[shape_class]
        return dict(row[max(f for f in row if f <= family(capability(device)))])


# ------------------------------ Whether kernels can run


def why_not(*tensors: Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    """Return why kernels cannot run on these tensors (device or dtype), or an empty string."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if any(t.device != device for t in tensors):
        return f"the tensors are on different devices, {sorted({str(t.device) for t in tensors})}"
    if INTERPRET and device.type == "cpu":
        # The interpreter is meant for fp32, and in bf16 its matrix product silently multiplies the raw bits
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
    """Return "channels_last" for a 4-d tensor that is dense in that order, otherwise "contiguous"."""
    nhwc = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if nhwc else "contiguous"


def dense(t: Tensor, like: Tensor | None = None) -> Tensor:
    """Return t made dense, in its own layout or that of `like`: gradients may be expanded or transposed."""
    last = layout(t if like is None else like) == "channels_last"
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ------------------------------ The call


_recording: tuple[int, list] | None = None  # a compute capability, and the calls recorded for it


@contextlib.contextmanager
def record(capability: int) -> Iterator[list[tuple]]:
    """Yield a list; inside, `launch` appends (kernel, arguments, constants) to it and runs nothing, and every
    device counts as a GPU of this capability."""
    global _recording
    calls: list[tuple] = []
    _recording = capability, calls
    try:
        yield calls
    finally:
        _recording = None


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """Run kernel[grid](*args, **meta) on the device of the first argument."""
    if not INTERPRET:
        # Triton 3.9 warns that the default will change; without it every a * b + c is two instructions
        meta["enable_fp_fusion"] = True
    if _recording is not None:
        return _recording[1].append((kernel, args, meta))
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta)


# Triton's own versions of these two also work in kernels, and take 5 us each, several times a launch


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
