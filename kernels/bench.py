"""How fast and how right: `python -m minisd.kernels.bench [--out DIR] [--only attention]`.

A table of ops and shapes, Stable Diffusion v1.5 at 512 and 768 pixels and its VAE: median time and spread,
TFLOP/s or GB/s, ratio to the best that torch offers in the same run (for attention each SDPA backend on its
own, for the rest eager and compiled), and the share of what this very chip reached on a large product and a
large copy. Before a row is timed it is checked: at most twice torch's own error against float64.

On a CPU there is nothing to time, and the correctness half runs alone, on small shapes; TRITON_INTERPRET=1
makes it run the kernels, and without that it runs their CPU references.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import minisd.kernels.attention as attention
import minisd.kernels.checks as checks
import minisd.kernels.cross_attention as cross_attention
import minisd.kernels.geglu as geglu
import minisd.kernels.group_norm as group_norm
import minisd.kernels.launch as L
import minisd.kernels.layer_norm as layer_norm
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip

# ------------------------------ What is compared


def our_attention(q, k, v):
    short = k.shape[1] <= cross_attention.MAX_KEYS
    return (cross_attention.cross_attention if short else attention.attention)(q, k, v)


def backend(which: SDPBackend) -> Callable:
    def run(q, k, v):
        with sdpa_kernel(which):
            return attention.reference(q, k, v)

    return run


@dataclass(frozen=True)
class Row:
    op: str
    case: checks.Case
    flops: float  # of the forward's matrix products, 0 where bytes count; the backward has 2.5 times as many
    elements: int  # read and written by the forward; the backward moves `back` times as many
    back: float = 2.0

    def ours(self) -> Callable:
        kernels = group_norm.group_norm, geglu.geglu, layer_norm.layer_norm
        return dict(
            zip(("attention", "group_norm", "geglu", "layer_norm"), (our_attention, *kernels), strict=True)
        )[self.op]

    def reference(self) -> Callable:
        module = dict(attention=attention, group_norm=group_norm, geglu=geglu, layer_norm=layer_norm)[self.op]
        return module.reference

    def theirs(self) -> dict[str, Callable]:
        if self.op == "attention":
            return {name: backend(which) for name, which in BACKENDS.items()}
        torch.compiler.reset()  # else the ninth shape is past the recompilation limit, and eager in silence
        return {"eager": self.reference(), "compiled": torch.compile(self.reference(), dynamic=False)}


def attention_row(b: int, n: int, m: int, hd: int) -> Row:
    name = f"{'cross' if m == 77 else 'self'} b{b} {n}x{m} hd{hd}"
    flops, elements = 4.0 * b * 8 * n * m * hd, 2 * b * 8 * hd * (n + m)
    return Row("attention", checks.attention_case(name, b, n, m, 8, hd), flops, elements)


def group_norm_row(b: int, c: int, side: int, nhwc=True, add=True) -> Row:
    name = f"b{b} {c} at {side}{'' if nhwc else ' contiguous'}"
    case = checks.group_norm_case(name, b, c, side, side, 32, nhwc=nhwc, add=add)
    return Row("group_norm", case, 0, 2 * b * c * side * side, 1.5)


def geglu_row(b: int, n: int, d: int) -> Row:
    return Row("geglu", checks.geglu_case(f"b{b} {n}x{d}", b, n, 2 * d), 0, 3 * b * n * d, 5 / 3)


def layer_norm_row(b: int, n: int, d: int) -> Row:
    return Row("layer_norm", checks.layer_norm_case(f"add b{b} {n}x{d}", b, n, d), 0, 4 * b * n * d, 1.0)


def rows() -> list[Row]:
    """The UNet's shapes for one image with guidance (b2) and for training (b8), and the VAE decoder's."""
    found = []
    for b in (2, 8):
        for n, hd in ((4096, 40), (1024, 80), (256, 160), (64, 160)):
            found += [attention_row(b, n, n, hd), attention_row(b, n, 77, hd)]
        found += [
            group_norm_row(b, c, s) for c, s in ((320, 64), (960, 64), (640, 32), (1280, 16), (1280, 8))
        ]
        found += [geglu_row(b, n, d) for n, d in ((4096, 1280), (1024, 2560), (256, 5120))]
        found += [layer_norm_row(b, n, d) for n, d in ((4096, 320), (1024, 640), (256, 1280))]
    for n, hd in ((9216, 40), (2304, 80), (576, 160), (144, 160)):  # 768 pixels
        found += [attention_row(2, n, n, hd), attention_row(2, n, 77, hd)]
    found += [group_norm_row(2, 320, 96), group_norm_row(8, 320, 64, nhwc=False)]
    return found + [group_norm_row(1, c, s, add=False) for c, s in ((512, 64), (256, 256), (128, 512))]


def small_rows() -> list[Row]:
    """The same ops where every second counts."""
    return [
        Row("attention", checks.attention_case("self 64x70 hd40", 1, 64, 70, 2, 40), 0, 0),
        Row("attention", checks.attention_case("self 40x140 hd80", 1, 40, 140, 1, 80), 0, 0),
        Row("attention", checks.attention_case("cross 70x77 hd160", 1, 70, 77, 1, 160), 0, 0),
        Row("group_norm", checks.group_norm_case("64 at 4", 2, 64, 4, 4, 16), 0, 0),
        Row("group_norm", checks.group_norm_case("80 at 25x41", 1, 80, 25, 41, 8), 0, 0),
        Row("geglu", checks.geglu_case("6x64", 6, 128), 0, 0),
        Row("layer_norm", checks.layer_norm_case("add 7x320", 7, 320), 0, 0),
    ]


# ------------------------------ Timing


def quantiles(fn: Callable) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms; do_bench empties the cache between runs."""
    median, low, high = triton.testing.do_bench(fn, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def modes(fn: Callable, inputs: dict, constants: dict) -> dict[str, Callable]:
    """forward (without a graph), backward alone, and both."""
    wanted = [t for t in inputs.values() if t is not None]

    def outputs():
        ys = fn(**inputs, **constants)
        return (ys,) if isinstance(ys, torch.Tensor) else ys

    def forward():
        with torch.no_grad():
            outputs()

    ys = outputs()
    dys = [torch.randn_like(y) for y in ys]
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(ys, wanted, dys, retain_graph=True),
        "both": lambda: torch.autograd.grad(outputs(), wanted, dys),
    }


def time_row(row: Row, dtype: torch.dtype, limits: dict, device="cuda") -> list[dict]:
    tensors, constants = row.case.make(torch.Generator().manual_seed(0))
    found: dict[str, dict[str, tuple]] = {}
    for name, fn in {"minisd": row.ours(), **row.theirs()}.items():
        inputs = checks.place(tensors, dtype, device, row.case.layout)
        try:
            found[name] = {mode: quantiles(call) for mode, call in modes(fn, inputs, constants).items()}
        except RuntimeError as error:  # a backend that does not take this shape
            print(f"    {name}: {str(error).splitlines()[0]}")
    out = []
    for mode in ("forward", "backward", "both"):
        times = {name: found[name][mode] for name in found}
        median, low, high = times.pop("minisd")
        best = min(times, key=lambda name: times[name][0])
        work = dict(forward=1.0, backward=2.5, both=3.5)[mode] * row.flops
        moved = dict(forward=1.0, backward=row.back, both=1 + row.back)[mode] * row.elements * dtype.itemsize
        bound = max(work / limits["flops"], moved / limits["bytes"]) * 1e3
        out.append(dict(
            op=row.op, case=row.case.name, mode=mode, ms=median, low=low, high=high, best=best,
            best_ms=times[best][0], ratio=times[best][0] / median, of_limit=bound / median,
            rate=f"{work / median / 1e9:.0f} TFLOP/s" if row.flops else f"{moved / median / 1e6:.0f} GB/s",
            all={name: t[0] for name, t in times.items()},
        ))  # fmt: skip
    return out


def limits(dtype: torch.dtype) -> dict[str, float]:
    """What this device does: FLOP/s of a large product, bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    big = torch.empty(2**29, device="cuda", dtype=torch.int8)
    flops = 2 * 8192**3 / quantiles(lambda: a @ a)[0] * 1e3
    return dict(flops=flops, bytes=2 * big.numel() / quantiles(lambda: big.clone())[0] * 1e3)


# ------------------------------ The table


def check(row: Row, dtype: torch.dtype, device: str) -> list[str]:
    try:
        return checks.verdict(checks.errors(row.ours(), row.reference(), row.case, dtype, device))
    except torch.OutOfMemoryError:  # float64 attention is the whole score matrix, several times
        return ["not checked, float64 does not fit"]


def line(r: dict) -> str:
    ours = f"{r['op']:<11}{r['case']:<26}{r['mode']:<9}{r['ms']:>8.4f} ms  {r['rate']:>12}"
    return f"{ours}  {r['best']} {r['best_ms']:.4f}  x{r['ratio']:.2f}  {r['of_limit']:.0%}"


def markdown(table: list[dict], about: dict) -> str:
    heads = "op", "shape", "mode", "ms (20-80%)", "rate", "best of torch", "ratio", "of limit"
    lines = [*(f"{k}: {v}  " for k, v in about.items()), "", f"| {' | '.join(heads)} |", "|---" * 8 + "|"]
    ratios: dict[str, list[float]] = {}
    for r in table:
        spread, best = f"{r['ms']:.4f} ({r['low']:.4f}-{r['high']:.4f})", f"{r['best']} {r['best_ms']:.4f}"
        ratio, share = f"{r['ratio']:.2f}", f"{r['of_limit']:.0%}"
        lines.append(
            f"| {' | '.join((r['op'], r['case'], r['mode'], spread, r['rate'], best, ratio, share))} |"
        )
        ratios.setdefault(f"{r['op']} {r['mode']}", []).append(r["ratio"])
    means = (f"{k}: geometric mean ratio {statistics.geometric_mean(v):.2f}  " for k, v in ratios.items())
    return "\n".join([*lines, "", *means, ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only the ops or shapes whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", default=".", help="folder for kernels.json and kernels.md")
    options = parser.parse_args()
    gpu = torch.cuda.is_available() and not L.INTERPRET
    dtype = getattr(torch, options.dtype) if gpu else torch.float32
    how = "the CPU references, not the kernels" if not L.INTERPRET else "Triton's interpreter"
    print(f"correctness ({'on the GPU' if gpu else how}, {dtype}): at most twice torch's error")
    chosen = [r for r in (rows() if gpu else small_rows()) if options.only in f"{r.op} {r.case.name}"]
    wrong = 0
    for row in chosen:
        faults = check(row, dtype, "cuda" if gpu else "cpu")
        wrong += bool(faults)
        print(f"  {row.op:<11} {row.case.name:<26} {'; '.join(faults) or 'ok'}", flush=True)
    if not gpu:
        print("no CUDA device: nothing was timed")
        return int(wrong > 0)
    reach = limits(dtype)
    versions = dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version())
    about = dict(device=torch.cuda.get_device_name(), **versions, dtype=options.dtype)
    about |= dict(date=datetime.date.today().isoformat(), **{k: f"{v:.3g}/s" for k, v in reach.items()})
    table = []
    for row in chosen:
        for r in time_row(row, dtype, reach):
            table.append(r)
            print(line(r), flush=True)
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "kernels.json"), "w") as file:
        json.dump(dict(about=about, rows=table), file, indent=1)
    with open(os.path.join(options.out, "kernels.md"), "w") as file:
        file.write(markdown(table, about))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
