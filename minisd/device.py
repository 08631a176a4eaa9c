"""How this process computes on its device, by the flags of a run, and how tensors get there."""

import functools
import math
import os
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from minisd import files, graph, ops

if TYPE_CHECKING:
    from minisd.options import Precision
    from minisd.sampling.options import Loading

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def configure(options: "Precision | Loading", *, search: bool = False) -> None:
    """Choose kernels and graphs, and with --deterministic only what gives the same bytes every time; without
    that, cuDNN may `search` for the fastest convolution of each shape. Call this before CUDA starts: cuBLAS
    reads the size of its workspace then."""
    fixed = options.deterministic
    if fixed:
        os.environ.setdefault(WORKSPACE, ":4096:8")
    # The same as use_deterministic_algorithms, which imports torch's compiler: two seconds.
    torch.set_deterministic_debug_mode("error" if fixed else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check that would cost a kernel per tensor
    torch.backends.cudnn.deterministic = fixed
    torch.backends.cudnn.benchmark = search and not fixed
    # "auto" goes by measured times, and these differ.
    ops.choose("torch" if fixed and options.kernels == "auto" else options.kernels)
    graph.choose(options.graph)


@contextmanager
def unchanged() -> Iterator[None]:
    """After the block, all is as before that `configure` or a run sets for the whole process, the state of
    torch's random numbers and the current GPU, too."""
    cudnn, products, fixed = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    names = [(cudnn, "deterministic"), (cudnn, "benchmark"), (cudnn, "allow_tf32"), (products, "allow_tf32")]
    settings = [(o, n, getattr(o, n)) for o, n in [*names, (fixed, "fill_uninitialized_memory")]]
    mode, workspace = torch.get_deterministic_debug_mode(), os.environ.get(WORKSPACE)
    kernels, graphs = ops.choose("auto"), graph.choose("auto")
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        for module, name, value in settings:
            setattr(module, name, value)
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        ops.choose(kernels)
        graph.choose(graphs)
        for gpu in gpus:
            torch.cuda.set_device(gpu)


@functools.cache
def has_fast_bf16(kind: str) -> bool:
    """Whether devices of this kind compute faster in bf16 than in fp32. Of CPUs with the instructions some
    multiply in bf16 at half the speed of fp32, others at twice that or more; to try takes some hundredths of
    a second."""
    if kind != "cpu":
        return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not ops.has_bf16():
        return False
    least, matrices = {}, [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for m in matrices * 4:
        started = time.perf_counter()
        m @ m
        least[m.dtype] = min(time.perf_counter() - started, least.get(m.dtype, math.inf))
    return least[torch.float32] > 1.2 * least[torch.bfloat16]


@contextmanager
def swapped(parameters: Iterable[Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """Within the context, the parameters have these values, and the values theirs; all stay in their
    places in memory, which others may share."""
    pairs = list(zip(parameters, values, strict=True))

    @torch.no_grad()
    def swap() -> None:
        for p, value in pairs:
            before = p.detach().clone()
            p.copy_(value)
            value.copy_(before)

    swap()
    try:
        yield
    finally:
        swap()


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names; "auto": fp16 on a GPU, bf16 on a CPU where that is faster, or fp32."""
    if name == "auto":
        fast = {"cuda": "fp16", "cpu": "bf16" if has_fast_bf16("cpu") else "fp32"}
        name = fast.get(device.type, "fp32")
    return DTYPES[name]


def usable(name: str) -> torch.device:
    """The device of that name. ValueError, naming the flag, if this machine or this torch has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        there = [str(d) for d in (torch.accelerator.current_accelerator(check_available=True), "cpu") if d]
        why = textwrap.shorten(files.first_line(error).partition(". ")[0], 100)
        raise ValueError(f"--device {name}: torch can use {' or '.join(there)} here ({why})") from error


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. To a GPU it is copied from pinned memory, so that the program does not
    wait for the work that the GPU has to do first."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.to(device) if device.type == "mps" else tensor.pin_memory().to(device, non_blocking=True)
