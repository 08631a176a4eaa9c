"""What every launcher needs: whether a kernel can run on these tensors, which tile it takes, and the call.

    why_not(q, k, v, dtypes=HALF)         why kernels cannot run on these tensors, or an empty string
    Tiles(...).pick(shape_class, device)  the tile of the table, a dict of constexprs and compile options
    @remembered                           decides tiles and grids once for each kind of arguments
    Launch(kernel, grid, ...)(*tensors)   the call; inside `record` it is recorded and not run

Tiles are fixed by (launch, shape class, GPU family) and not searched at start-up: a search compiles every
candidate, 1 to 3 s each. `MINISD_AUTOTUNE=1` searches once and keeps the fastest: see tune.py.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

AUTOTUNE = os.environ.get("MINISD_AUTOTUNE") == "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)

# GPU families on which `pytest -m gpu` and the benchmark have been run. On all others `auto` uses torch: a
# kernel that has not been timed on a GPU may be slower there, and one that has not been run may be wrong.
MEASURED: frozenset[int] = frozenset()

# ------------------------------ The GPU

FAMILIES = (80, 86, 90, 100)  # compute capabilities at which the tile tables may change


_capabilities: dict[int, int] = {}  # by index; a plain dictionary, which torch.compile reads as a constant


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
    """Read the capability of every GPU, which must have happened before torch.compile traces a kernel."""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        _capabilities[index] = 10 * properties.major + properties.minor
    if _capabilities:  # a device without an index is the current one
        _capabilities[None] = _capabilities[torch.cuda.current_device()]


def family(capability: int) -> int:
    """Return the tile tables' key for a compute capability; 12.x has the shared memory and mma of 8.6."""
    return 86 if capability >= 120 else max([f for f in FAMILIES if f <= capability], default=80)


# ------------------------------ Tile tables


class Tiles:
    """The tiles of one launch: shape class -> GPU family -> tile; a missing family takes the next older one.

    MINISD_AUTOTUNE=1 also tries `candidates`, timing the kernel's forward or, if `backward`, its backward.
    """

    def __init__(self, name: str, table: dict, candidates: list[dict], *, backward: bool = False):
        self.name, self.table, self.candidates, self.backward = name, table, candidates, backward
        self._only: dict | None = None

    def pick(self, shape_class: int | str, device: torch.device) -> dict:
        """Return a copy of the table's tile for this device, or of the one found by MINISD_AUTOTUNE=1."""
        if self._only is not None:
            return dict(self._only)
        if AUTOTUNE and device.type == "cuda" and _recording is None:
            import minisd.kernels.tune as tune

            if winner := tune.winner(self, shape_class, device):
                return dict(winner)
        row = self.table[shape_class]
        return dict(row[max(f for f in row if f <= family(capability(device)))])

    @contextlib.contextmanager
    def only(self, tile: dict) -> Iterator[None]:
        """Inside, `pick` returns this tile for every shape class and device."""
        before, self._only = self._only, tile
        try:
            yield
        finally:
            self._only = before


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


class Recorded(NamedTuple):
    """A call that was not run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict


_recording: tuple[int, list] | None = None  # a compute capability, and the calls recorded for it
_plans: dict[tuple, Any] = {}
MOST_PLANS = 4096


@contextlib.contextmanager
def record(capability: int) -> Iterator[list[Recorded]]:
    """Yield a list; inside, launches are appended to it and not run, nothing is remembered, and every device
    counts as a GPU of this capability."""
    global _recording
    calls: list[Recorded] = []
    _recording = capability, calls
    try:
        yield calls
    finally:
        _recording = None


def remembered(plan: Callable) -> Callable:
    """Make `plan`, which sees no tensor's values, run once for tensors of the same shapes, strides, types and
    device and the same constants. It returns launches, for tensors whose types follow from its arguments."""

    @functools.wraps(plan)
    def recall(*arguments):
        if _recording is not None:
            return plan(*arguments)
        kind = [(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in arguments]
        key = (plan, *kind)
        found = _plans.get(key)
        if found is None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            found = _plans[key] = plan(*arguments)
        return found

    return recall


class Launch:
    """kernel[grid](*tensors, *scalars, **constants), of which the tensors are given in each call.

    Triton looks at all arguments in every call, in 5 to 10 us. What it found for the first tensors holds for all
    that are as well aligned, so that they go to the compiled kernel directly, as JITFunction.run passes them.
    """

    def __init__(self, kernel, grid: tuple[int, ...], scalars: tuple = (), **constants):
        if not INTERPRET:
            # Triton 3.9 warns that the default will change; without it every a * b + c is two instructions
            constants["enable_fp_fusion"] = True
        self.kernel, self.grid, self.scalars, self.constants = kernel, grid, scalars, constants
        self.direct: tuple | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Run on the device of the first tensor."""
        if _recording is not None:
            return _recording[1].append(
                Recorded(self.kernel, self.grid, tensors + self.scalars, self.constants)
            )
        addresses, bits = [], 0
        for t in tensors:
            address = t.data_ptr()
            addresses.append(address)
            bits |= address
        if bits % 16 == 0 and self.direct is not None:
            run, grid, handles, rest, device, current_device, stream, knobs = self.direct
            hooks = knobs.launch_enter_hook  # a profiler's
            if not getattr(hooks, "calls", hooks) and current_device() == device:
                return run(*grid, stream(device), *handles, None, None, None, *addresses, *rest)
        with torch.cuda.device_of(tensors[0]):
            compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
            if bits % 16 == 0 and hasattr(compiled, "packed_metadata"):
                self._remember(compiled, tensors[0].get_device(), len(tensors))

    def _remember(self, compiled, device: int, count: int) -> None:
        from triton import knobs
        from triton.runtime import driver

        grid = (*self.grid, 1, 1)[:3]
        names = self.kernel.arg_names[count + len(self.scalars) :]
        rest = (*self.scalars, *(self.constants[name] for name in names))
        handles = compiled.function, compiled.packed_metadata
        current = driver.active.get_current_device, driver.active.get_current_stream
        self.direct = compiled.run, grid, handles, rest, device, *current, knobs.runtime


# Triton's own versions of these two also work in kernels, and take 5 us each, several times a launch


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
