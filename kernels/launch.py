"""What every launcher needs: whether a kernel can run on these tensors, which tile it takes, and the call.

Tiles are fixed by (launch, size, GPU family) and not searched: every candidate would take 1 to 3 s to
compile.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from operator import itemgetter, or_

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)
INT32, GRID_YZ = 2**31 - 1, 65535  # the first axis of a grid takes as much as an integer, the others 65535

# ------------------------------ The GPU

_capabilities: dict[int | None, int] = {}  # by device index; to torch.compile, constants


def capability(device: torch.device) -> int:
    """Ten times the compute capability: 80 for an A100, 90 for an H100; 80 on the CPU (interpreter)."""
    if _recording is not None:
        return _recording[0]
    if device.type != "cuda":
        return 80
    if device.index not in _capabilities:
        survey()
    return _capabilities[device.index]


def survey() -> None:
    """Look at every GPU. It is done when kernels are loaded, before torch.compile traces one."""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _capabilities[index] = 10 * properties.major + properties.minor
    _capabilities[None] = _capabilities.get(0, 80)  # a device without an index


def pick(tiles: dict[int, dict[int, tuple[int, ...]]], size: int, device: torch.device) -> tuple[int, ...]:
    """Return a tile from a table: size -> compute capability -> tile. A missing size takes the next larger
    one, a missing capability the next lower one; 12.x has the shared memory and mma of 8.6."""
    row, chip = tiles[min(s for s in tiles if s >= size)], capability(device)
    newest = chip if chip < 120 or 120 in row else 86
    return row[max(c for c in row if c <= newest)]


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


def layout(x: Tensor) -> torch.memory_format:
    """Return channels-last for a 4-d tensor that is dense in that order, otherwise contiguous."""
    nhwc = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def dense(t: Tensor, like: Tensor | None = None) -> Tensor:
    """Return t made dense, in its own layout or that of `like`: gradients may be expanded or transposed."""
    return t.contiguous(memory_format=layout(t if like is None else like))


# ------------------------------ The call

_recording: tuple[int, list] | None = None  # a compute capability, and the calls recorded for it


@contextlib.contextmanager
def record(capability: int) -> Iterator[list[tuple]]:
    """Yield a list; inside, `launch` appends (kernel, grid, arguments, constants) to it and runs nothing, and
    every device counts as a GPU of this capability."""
    global _recording
    _recording = capability, []
    try:
        yield _recording[1]
    finally:
        _recording = None


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor, contiguous and by default of the type of `like`; without a shape, one
    of the shape, type and layout of `like`."""
    made = like.new_empty(shape, dtype=dtype or like.dtype) if shape else torch.empty_like(like)
    if notes := getattr(_running, "notes", None):
        notes[0].append((like, shape, made))
    return made


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """Run kernel[grid](*args, **meta), tensors first, on the device of the first."""
    if not INTERPRET:
        # Triton 3.9 warns that the default will change; without it every a * b + c is two instructions
        meta["enable_fp_fusion"] = True
    if _recording is not None:
        return _recording[1].append((kernel, grid, args, meta))
    with torch.cuda.device_of(args[0]):
        compiled = kernel[grid](*args, **meta)
    if notes := getattr(_running, "notes", None):
        notes[1].append((kernel, compiled, grid, args, meta))


# ------------------------------ The same call again

# The Python of a launcher and Triton's look at every argument take 10 to 30 us a launch, which is longer than
# many kernels run. So the first call of a launcher is written down, what it allocates and launches, and the
# next one with tensors of the same kind repeats that with its own tensors.

_running = threading.local()  # its notes: what the call that is being written down allocates and launches
_tapes: dict[tuple, Callable] = {}  # by launcher and arguments; without one, Triton looks at the next call
MOST_TAPES = 4096


def tape(arguments: tuple, made: list, launched: list, results: Tensor | tuple) -> Callable | None:
    """Return what repeats a call for other arguments, or None if that cannot be repeated."""
    given = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    tensors = [arguments[i] for i in given] + [t for *_, t in made]
    number = {id(t): i for i, t in enumerate(tensors)}
    # What is compiled for addresses divisible by 16 is right for others that are
    if len(number) < len(tensors) or any(t.data_ptr() % 16 for t in tensors):
        return None
    device, launches = as_tuple(results)[0].get_device(), []
    try:
        allocations = [(number[id(like)], shape, t.dtype) for like, shape, t in made]
        returned = itemgetter(*[number[id(t)] for t in as_tuple(results)])
        for kernel, compiled, grid, args, meta in launched:
            handles = compiled.function, compiled.packed_metadata, None, None, None
            taken = [number[id(a)] for a in args if isinstance(a, Tensor)]
            rest = *args[len(taken) :], *(meta[name] for name in kernel.arg_names[len(args) :])
            launches.append((compiled.run, (*grid, 1, 1)[:3], handles, itemgetter(*taken), rest))
    except (AttributeError, KeyError):  # another version of Triton, or its interpreter; a copy of an argument
        return None

    def again(arguments: tuple) -> Tensor | tuple[Tensor, ...] | None:
        """Return the results, or None if addresses, the current device, a profiler or the version of Triton
        do not allow it."""
        tensors = [arguments[i] for i in given]
        for like, shape, dtype in allocations:
            like = tensors[like]
            tensors.append(like.new_empty(shape, dtype=dtype) if shape else torch.empty_like(like))
        addresses = [t.data_ptr() for t in tensors]
        try:
            driver, hooks = triton.runtime.driver.active, triton.knobs.runtime.launch_enter_hook
            aligned = not functools.reduce(or_, addresses) % 16
            if not aligned or getattr(hooks, "calls", hooks) or driver.get_current_device() != device:
                return None
            stream = driver.get_current_stream(device)
            for run, grid, handles, taken, rest in launches:  # as JITFunction.run does
                run(*grid, stream, *handles, *taken(addresses), *rest)
        except (AttributeError, TypeError):  # this version of Triton is launched in another way
            return None
        return returned(tensors)

    return again


def remembered(launcher: Callable) -> Callable:
    """Make `launcher`, which sees no values of tensors, repeat its first call on tensors of the same shapes,
    strides, types and device, with the same constants. A caller that has a `key` of all these gives it."""

    @functools.wraps(launcher)
    def call(*arguments, key: tuple | None = None):
        if _recording is not None or getattr(_running, "notes", None):
            return launcher(*arguments)
        key = key or [
            (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments
        ]
        key = launcher, *key
        if again := _tapes.get(key):
            results = again(arguments)
            return launcher(*arguments) if results is None else results
        _running.notes = notes = [], []
        try:
            results = launcher(*arguments)
        finally:
            _running.notes = None
        if again := tape(arguments, *notes, results):
            _tapes.clear() if len(_tapes) >= MOST_TAPES else None
            _tapes[key] = again
        return results

    return call


def as_tuple(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else values


# Triton's own versions of these two also work in kernels, and take 5 us each, several times a launch


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << int(n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------ Partial sums


@triton.jit
def _sum_kernel(
    part_ptr,  # (splits, 2, size) fp32
    first_ptr, second_ptr,  # (size,)
    splits, size,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    half, at = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = part_ptr + (s.to(tl.int64) * 2 + half)[:, None] * size
        total += tl.load(rows + at[None, :], mask=(s < splits)[:, None] & (at < size)[None, :], other=0.0)
    sum_ptr = second_ptr if half else first_ptr
    tl.store(sum_ptr + at, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=at < size)


def add_up(part: Tensor, first: Tensor, second: Tensor) -> None:
    """Write the sum over the first dimension of part (splits, 2, ...) to `first` and `second`, added up in a
    fixed order: what backwards end with, where others would use atomics."""
    splits, size = len(part), first.numel()
    block = min(32, power_of_two(splits))
    tile = dict(BLOCK_S=block, BLOCK_N=1024 // block, num_warps=4)
    launch(_sum_kernel, (cdiv(size, tile["BLOCK_N"]), 2), part, first, second, splits, size, **tile)
