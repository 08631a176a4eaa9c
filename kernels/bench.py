"""Check and time the kernels: `python -m minisd.kernels.bench [--out DIR] [--only attention] [--dump]`.

On a GPU: a row for every op, shape (of Stable Diffusion v1.5 at 512 and 768 pixels, and its VAE) and mode
(forward, backward, both). All versions of an op take turns, as CUDA graphs over sets of random tensors that
exceed the L2 cache. kernels.md, kernels.json and kernels.png have the median time and its spread, the error
against float64, TFLOP/s or GB/s, the share of the limit that binds (matrix products, copies or exponentials,
measured on this GPU), and the fastest other version. What fails has a row that says why.

Without a GPU, Triton's interpreter checks the tests' small cases, and nothing is timed. `--dump` writes the
shapes for other benchmarks to shapes.json, and does nothing else.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import minisd.kernels.checks as checks
import minisd.kernels.launch as L
import minisd.kernels.report as report
import torch
import triton
from minisd.kernels.kernel import Case, Kernel, select
from minisd.kernels.timing import GPU, captured, interleaved, limits, quantiles
from torch.nn import attention

# mode -> flops, forwards, backwards
MODES = dict(forward=(1.0, 1.0, 0.0), backward=(2.5, 0.0, 1.0), both=(3.5, 1.0, 1.0))

SDPA = ("flash", "cudnn", "efficient")  # torch's own attention kernels

# ------------------------------ The versions of an op


class Version(NamedTuple):
    """`run` takes the arguments of the op's reference, `inside` is the context of its calls, and `layout` is
    that of 4-d tensors, if it is not the case's."""

    run: Callable
    inside: Callable = contextlib.nullcontext
    layout: torch.memory_format | None = None


@contextlib.contextmanager
def flash(number: str):
    """The flash attention of another package in place of torch's own, inside."""
    attention.activate_flash_attention_impl(number)
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        attention.restore_flash_attention_impl()


def xformers(q, k, v):
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)


def apex(x, weight, bias, add, num_groups, eps, silu):
    """Apex's GroupNorm, in one pass up to 1024 pixels, as its own module chooses."""
    module = importlib.import_module("apex.contrib.group_norm.group_norm")
    passes = "one" if x.shape[2:].numel() <= 1024 else "two"
    x = x if add is None else x + add[:, :, None, None]
    run = getattr(module, f"cuda_group_norm_nhwc_{passes}_pass")
    return run(x, num_groups, weight, bias, eps, "silu" if silu else "")


def versions(kernel: Kernel) -> dict[str, Version]:
    """The kernel and what it is compared with, by name."""
    found = {"minisd": Version(kernel), "eager": Version(kernel.reference)}
    if kernel.name.endswith("attention"):  # "eager" is what SDPA chooses by itself
        backends = {name: attention.SDPBackend.__members__[f"{name.upper()}_ATTENTION"] for name in SDPA}
        inside = {name: functools.partial(attention.sdpa_kernel, b) for name, b in backends.items()}
        inside |= {name: functools.partial(flash, name) for name in ("FA3", "FA4")}
        found |= {name: Version(kernel.reference, context) for name, context in inside.items()}
        return found | {"xformers": Version(xformers)}
    torch.compiler.reset()  # else the ninth shape exceeds the recompilation limit and silently runs eager
    for name, mode in (("compiled", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        found[name] = Version(torch.compile(kernel.reference, dynamic=False, mode=mode))
    if kernel.name == "group_norm":
        found["eager NCHW"] = Version(kernel.reference, layout=torch.contiguous_format)
        found["apex"] = Version(apex, layout=torch.channels_last)
    return found


# ------------------------------ Timing


def calls(version: Version, case: Case, dtype: torch.dtype, device: str, sets: int) -> dict[str, list]:
    """For every mode, a call on each of so many sets of random tensors."""
    case = dataclasses.replace(case, layout=version.layout or case.layout)
    randn = functools.partial(torch.randn, device=device)
    found: dict[str, list[Callable]] = {mode: [] for mode in MODES}
    for _ in range(sets):
        tensors, constants = checks.inputs(case, dtype, device, randn=randn)
        outputs = functools.partial(checks.outputs, version.run, tensors, constants)
        ys, present = outputs(), [t for t in tensors.values() if t is not None]
        dys = [torch.randn_like(y) for y in ys]
        gradients = functools.partial(torch.autograd.grad, inputs=present, grad_outputs=dys)
        found["forward"].append(torch.no_grad()(outputs))
        found["backward"].append(functools.partial(gradients, ys, retain_graph=True))
        found["both"].append(lambda outputs=outputs, gradients=gradients: gradients(outputs()))
    return found


def time_case(
    kernel: Kernel, case: Case, dtype: torch.dtype, reach: dict, device: str = "cuda", **error: float | str
) -> list[dict]:
    """Time every mode of every version; return a row of the table for each mode. `error` is part of them."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if GPU else 0
    sets = min(16, 1 + math.ceil(2 * cache / (case.elements * dtype.itemsize)))  # larger than the L2 cache
    runs: dict[str, dict[str, Callable]] = {mode: {} for mode in MODES}
    failed, rows = {}, []
    stream = torch.cuda.stream(torch.cuda.Stream()) if GPU else contextlib.nullcontext()
    with stream:  # all on one that is not the default, as graphs have to be captured
        for name, version in versions(kernel).items():
            try:
                with version.inside():
                    each = calls(version, case, dtype, device, sets)
                    graphs = {mode: captured(each[mode]) for mode in MODES}
            except Exception as e:
                failed[name] = report.reason(e)
            else:
                for mode in MODES:
                    runs[mode][name] = graphs[mode]
        times = {mode: interleaved(by_name) for mode, by_name in runs.items()}
    for mode, (products, ahead, back) in MODES.items():
        moved = (ahead + back * case.back) * case.elements * dtype.itemsize
        work = {"flops": products * case.flops, "bytes": moved, "exps": (ahead + back) * case.exps}
        row = dict(op=kernel.name, case=case.name, mode=mode, work=work, failed=failed, **error)
        found = {name: quantiles([t / sets for t in ts]) for name, ts in times[mode].items()}
        row["all"] = {name: median for name, (median, _, _) in found.items()}
        others = [(median, name) for name, median in row["all"].items() if name != "minisd"]
        row["best_ms"], row["best"] = min(others, default=(None, None))
        row["limit"] = max(reach, key=lambda unit: work[unit] / reach[unit])
        if "minisd" in found:
            row["ms"], row["low"], row["high"] = found["minisd"]
            unit = ("flops", 1e9, "TFLOP/s") if case.flops else ("bytes", 1e6, "GB/s")
            row["rate"] = f"{work[unit[0]] / row['ms'] / unit[1]:.0f} {unit[2]}"
            row["of_limit"] = work[row["limit"]] / reach[row["limit"]] * 1e3 / row["ms"]
            row["ratio"] = row["best_ms"] / row["ms"] if others else None
        else:
            row["reason"] = failed["minisd"]
        rows.append(row)
    return rows


# ------------------------------ The table

COLUMNS = {
    "op": "{op}", "shape": "{case}", "mode": "{mode}", "ms (20-80%)": "{ms:.4f} ({low:.4f}-{high:.4f})",
    "rate": "{rate}", "of limit": "{of_limit:.0%} {limit}", "error": "{error:.1e}",
    "torch's": "{torch_error:.1e}", "best other": "{best} {best_ms:.4f}", "ratio": "{ratio:.2f}",
}  # fmt: skip


def means(rows: list[dict]) -> list[str]:
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.get("ratio"):
            ratios.setdefault(f"{row['op']} {row['mode']}", []).append(row["ratio"])
    return [f"{k}: geometric mean ratio {statistics.geometric_mean(v):.2f}  " for k, v in ratios.items()]


def write(out: Path, rows: list[dict], facts: dict, reach: dict) -> None:
    """Write the table. In the picture, what has no matrix products is drawn at one FLOP a byte."""
    points = []
    for row in (row for row in rows if "ms" in row):
        work = row["work"]["flops"] or row["work"]["bytes"]
        points.append((row["op"], work / row["work"]["bytes"], work / row["ms"] * 1e3))
    picture = dict(points=points, flops=reach["flops"], bandwidth=reach["bytes"])
    report.write(out, "kernels", facts, COLUMNS, rows, means(rows), **picture)


def check(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> tuple[str, dict]:
    """A line about the kernel's correctness, and the largest errors."""
    try:
        found = checks.errors(kernel, case, dtype, device)
    except torch.OutOfMemoryError:
        return "not checked: float64 does not fit", {}
    except Exception as e:
        return f"failed: {report.reason(e)}", {}
    wrong, (ours, theirs) = checks.wrong(found), map(max, zip(*found.values(), strict=True))
    return f"wrong: {', '.join(wrong)}" if wrong else "ok", dict(error=ours, torch_error=theirs)


def dump(chosen: list[tuple[Kernel, Case]], out: Path) -> None:
    """Write the shapes, constants and amounts of work to shapes.json."""
    shapes = []
    for kernel, case in chosen:
        randn = functools.partial(torch.randn, device="meta")
        tensors, constants = checks.inputs(case, torch.float32, "meta", randn=randn)
        sizes = {k: None if t is None else dict(shape=t.shape, stride=t.stride()) for k, t in tensors.items()}
        work = dict(flops=case.flops, elements=case.elements, exps=case.exps, back=case.back)
        shapes.append(dict(op=kernel.name, case=case.name, tensors=sizes, constants=constants, **work))
    out.mkdir(parents=True, exist_ok=True)
    (out / "shapes.json").write_text(json.dumps(shapes, indent=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only the ops or shapes whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for what is written")
    parser.add_argument("--dump", action="store_true", help="write shapes.json and nothing else")
    options = parser.parse_args()
    chosen = select("timed" if GPU or options.dump else "cases", options.only)
    if options.dump:
        dump(chosen, options.out)
        return 0
    if not (GPU or L.INTERPRET):  # Triton reads this when it is imported
        command = [sys.executable, "-m", "minisd.kernels.bench", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    dtype, device = (getattr(torch, options.dtype), "cuda") if GPU else (torch.float32, "cpu")
    where = "on the GPU" if GPU else "no CUDA device: Triton's interpreter, and nothing is timed"
    print(f"correctness ({where}, {dtype}): at most twice torch's error")
    return run(chosen, dtype, device, options.out if GPU else None)


def run(chosen: list[tuple[Kernel, Case]], dtype: torch.dtype, device: str, out: Path | None) -> int:
    """Check all; with a folder, time all and write the table. Returns 1 if a kernel is wrong or fails."""
    errors, bad, rows = {}, False, []
    for kernel, case in chosen:
        verdict, errors[kernel, case.name] = check(kernel, case, dtype, device)
        bad = bad or not verdict.startswith(("ok", "not checked"))
        print(f"  {kernel.name:<16} {case.name:<26} {verdict}", flush=True)
    if out is None:
        return int(bad)
    reach, before = limits(dtype), report.about()
    print("\n".join(report.table(COLUMNS, [])), flush=True)
    facts = before | dict(triton=triton.__version__, dtype=str(dtype).removeprefix("torch."))
    facts |= {name: f"{value:.3g}/s" for name, value in reach.items()}
    for kernel, case in chosen:
        rows += (new := time_case(kernel, case, dtype, reach, device, **errors[kernel, case.name]))
        print(*(report.line(COLUMNS, row) for row in new), sep="\n", flush=True)
        after = {"clocks.sm after": report.about().get("clocks.sm", "-")}
        write(out, rows, facts | after, reach)  # each time: a fault on the GPU may end the process
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
