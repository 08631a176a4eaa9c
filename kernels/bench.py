"""Check and time the kernels: `python -m minisd.kernels.bench [--out DIR] [--only attention]`.

A table of ops and shapes, those of Stable Diffusion v1.5 at 512 and 768 pixels and its VAE: median time and
spread, TFLOP/s or GB/s, speed relative to torch's fastest version in the same run (for attention each SDPA
backend, otherwise eager and compiled), and share of the speed that this GPU reaches in a large matrix product
and a large copy. Each kernel is checked first: at most twice torch's error against float64.

On a CPU, with TRITON_INTERPRET=1, the small cases of the tests are checked and nothing is timed.
"""

import argparse
import datetime
import functools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import minisd.kernels.checks as checks
import minisd.kernels.launch as L
import torch
import triton
from minisd.kernels.kernel import Case, Kernel, select

# ------------------------------ Timing


def quantiles(fn: Callable) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile in ms; do_bench empties the cache between runs."""
    return tuple(triton.testing.do_bench(fn, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8]))


def peers(kernel: Kernel) -> dict[str, Callable]:
    """Return torch's versions of the operation by name."""
    if kernel.peers:
        return dict(kernel.peers)
    torch.compiler.reset()  # else the ninth shape exceeds the recompilation limit and silently runs eager
    return {"eager": kernel.reference, "compiled": torch.compile(kernel.reference, dynamic=False)}


def modes(fn: Callable, tensors: dict, constants: dict) -> dict[str, Callable]:
    """Return calls of the forward (without autograd), the backward alone, and both."""
    present = [t for t in tensors.values() if t is not None]
    outputs = functools.partial(checks.outputs, fn, tensors, constants)
    ys = outputs()
    dys = [torch.randn_like(y) for y in ys]
    return {
        "forward": torch.no_grad()(outputs),
        "backward": lambda: torch.autograd.grad(ys, present, dys, retain_graph=True),
        "both": lambda: torch.autograd.grad(outputs(), present, dys),
    }


def time_case(
    kernel: Kernel, case: Case, dtype: torch.dtype, limits: dict, device: str = "cuda"
) -> list[dict]:
    """Time every mode of the kernel and of torch's versions; return a row of the table for each mode."""
    times: dict[str, dict[str, tuple]] = {}  # version -> mode -> quantiles
    for name, fn in {"minisd": kernel, **peers(kernel)}.items():
        try:
            calls = modes(fn, *checks.inputs(case, dtype, device))
            times[name] = {mode: quantiles(call) for mode, call in calls.items()}
        except RuntimeError as error:  # a backend that does not support this shape
            print(f"    {name}: {str(error).splitlines()[0]}")
    rows = []
    work = dict(forward=(1.0, 1.0), backward=(2.5, case.back), both=(3.5, 1 + case.back))
    for mode, (flops, moved) in work.items():
        by_name = {name: measured[mode] for name, measured in times.items()}
        median, low, high = by_name.pop("minisd")
        best = min(by_name, key=lambda name: by_name[name][0])
        flops, moved = flops * case.flops, moved * case.elements * dtype.itemsize
        bound = max(flops / limits["flops"], moved / limits["bytes"]) * 1e3
        rows.append(dict(
            op=kernel.name, case=case.name, mode=mode, ms=median, low=low, high=high, best=best,
            best_ms=by_name[best][0], ratio=by_name[best][0] / median, of_limit=bound / median,
            rate=f"{flops / median / 1e9:.0f} TFLOP/s" if flops else f"{moved / median / 1e6:.0f} GB/s",
            all={name: quantile[0] for name, quantile in by_name.items()},
        ))  # fmt: skip
    return rows


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Measure this GPU's speed: FLOP/s of a large matrix product, bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    big = torch.empty(2**29, device="cuda", dtype=torch.int8)
    flops = 2 * 8192**3 / quantiles(lambda: a @ a)[0] * 1e3
    return dict(flops=flops, bytes=2 * big.numel() / quantiles(lambda: big.clone())[0] * 1e3)


# ------------------------------ The table

HEADING = "| op | shape | mode | ms (20-80%) | rate | best of torch | ratio | of limit |"
ROW = "| {op} | {case} | {mode} | {ms:.4f} ({low:.4f}-{high:.4f}) | {rate} | {best} {best_ms:.4f} "
ROW += "| {ratio:.2f} | {of_limit:.0%} |"


def markdown(table: list[dict], about: dict) -> str:
    ratios: dict[str, list[float]] = {}
    for row in table:
        ratios.setdefault(f"{row['op']} {row['mode']}", []).append(row["ratio"])
    means = (f"{k}: geometric mean ratio {statistics.geometric_mean(v):.2f}  " for k, v in ratios.items())
    rows = [HEADING, "|---" * 8 + "|", *(ROW.format(**row) for row in table)]
    return "\n".join([*(f"{k}: {v}  " for k, v in about.items()), "", *rows, "", *means, ""])


def time_all(chosen: list[tuple[Kernel, Case]], dtype: torch.dtype, out: Path) -> None:
    """Print the table, and write it with the versions to kernels.json and kernels.md."""
    reach = limits(dtype)
    versions = dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version())
    about = dict(device=torch.cuda.get_device_name(), **versions, dtype=str(dtype).removeprefix("torch."))
    about |= dict(date=datetime.date.today().isoformat(), **{k: f"{v:.3g}/s" for k, v in reach.items()})
    table = []
    for kernel, case in chosen:
        for row in time_case(kernel, case, dtype, reach):
            table.append(row)
            print(ROW.format(**row), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(dict(about=about, rows=table), indent=1))
    (out / "kernels.md").write_text(markdown(table, about))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only the ops or shapes whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", default=".", help="folder for kernels.json and kernels.md")
    options = parser.parse_args()
    gpu = torch.cuda.is_available() and not L.INTERPRET
    if not (gpu or L.INTERPRET):
        parser.error("no CUDA device; TRITON_INTERPRET=1 checks the kernels without one")
    dtype, device = (getattr(torch, options.dtype), "cuda") if gpu else (torch.float32, "cpu")
    print(f"correctness ({'on the GPU' if gpu else 'interpreter'}, {dtype}): at most twice torch's error")
    chosen, wrong = select("timed" if gpu else "cases", options.only), 0
    for kernel, case in chosen:
        try:
            faults = checks.faults(kernel, case, dtype, device)
        except torch.OutOfMemoryError:  # float64 attention holds the whole score matrix several times
            faults = ["not checked, float64 does not fit"]
        wrong += bool(faults)
        print(f"  {kernel.name:<16} {case.name:<26} {'; '.join(faults) or 'ok'}", flush=True)
    if gpu:
        time_all(chosen, dtype, Path(options.out))
    else:
        print("no CUDA device: nothing was timed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
