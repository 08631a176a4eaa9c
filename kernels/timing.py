"""Times on a GPU: CUDA graphs that take turns, and what the GPU reaches at best."""

import statistics
from collections.abc import Callable

import minisd.kernels.launch as L
import torch
import triton
import triton.language as tl

GPU = torch.cuda.is_available() and not L.INTERPRET


def captured(each: list[Callable], graph: bool = GPU) -> Callable:
    """The calls as one CUDA graph, captured on the current stream; without `graph`, one after the other."""

    def run():
        return [call() for call in each]

    if not graph:
        return run
    run()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graphed = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which would empty the caches; other threads, as of a data loader, may go on
    graphed.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graphed.capture_end()
    return lambda kept=each: graphed.replay()  # a graph does not keep the tensors that it reads


def interleaved(runs: dict[str, Callable], rounds: int = 30, *, wait: bool = False) -> dict[str, list[float]]:
    """The times of each in ms, sorted. They take turns, so that clocks and heat are the same for all. With
    `wait` each begins on an idle GPU, so that its time is the host's or the GPU's, whichever is longer."""
    events: dict[str, list] = {name: [] for name in runs}
    for name in list(runs) * (rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[name]()
        end.record()
        events[name].append((start, end))
        if wait:
            end.synchronize()
    end.synchronize()
    return {name: sorted(a.elapsed_time(b) for a, b in pairs[3:]) for name, pairs in events.items()}


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of sorted times."""
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


@triton.jit
def exp_kernel(y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK) / BLOCK
    for _ in range(N):
        x = tl.exp2(-x)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def limits(dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches in a second: FLOPs of a large matrix product, bytes of a large copy, and
    exponentials."""
    a, big = torch.randn(8192, 8192, device="cuda", dtype=dtype), torch.empty(2**29, device="cuda")
    y, n = torch.empty(2**14 * 1024, device="cuda"), 512
    runs = {"flops": lambda: a @ a, "bytes": big.clone, "exps": lambda: exp_kernel[(2**14,)](y, n, 1024)}
    work = {"flops": 2 * 8192**3, "bytes": 2 * big.nbytes, "exps": y.numel() * n}
    return {name: work[name] / quantiles(times)[0] * 1e3 for name, times in interleaved(runs).items()}
