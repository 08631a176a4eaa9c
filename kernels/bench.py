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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import minisd.kernels.launch as L
import minisd.kernels.report as report
import minisd.kernels.trial as trial
import torch
import triton
import triton.language as tl
from minisd.kernels.kernel import Case, Kernel, select
from minisd.kernels.trial import captured, interleaved, quantiles
from torch.nn import attention

GPU = torch.cuda.is_available() and not L.INTERPRET

# mode -> flops, forwards, backwards
MODES = dict(forward=(1.0, 1.0, 0.0), backward=(2.5, 0.0, 1.0), both=(3.5, 1.0, 1.0))

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
        for name in ("flash", "cudnn", "efficient"):  # torch's own
            backend = attention.SDPBackend.__members__[f"{name.upper()}_ATTENTION"]
            found[name] = Version(kernel.reference, functools.partial(attention.sdpa_kernel, backend))
        for name in ("FA3", "FA4"):
            found[name] = Version(kernel.reference, functools.partial(flash, name))
        return found | {"xformers": Version(xformers)}
    torch.compiler.reset()  # else the ninth shape exceeds the recompilation limit and silently runs eager
    for name, mode in (("compiled", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        found[name] = Version(torch.compile(kernel.reference, dynamic=False, mode=mode))
    if kernel.name == "group_norm":
        found["eager NCHW"] = Version(kernel.reference, layout=torch.contiguous_format)
        found["apex"] = Version(apex, layout=torch.channels_last)
    return found


# ------------------------------ Timing


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


def calls(version: Version, case: Case, mode: str, dtype: torch.dtype, device: str, sets: int) -> list:
    """Return a call on each of so many sets of random tensors."""
    case = dataclasses.replace(case, layout=version.layout or case.layout)
    randn, found = functools.partial(torch.randn, device=device), []
    for _ in range(sets):
        tensors, constants = case.inputs(dtype, device, randn=randn)
        outputs = functools.partial(trial.outputs, version.run, tensors, constants)
        both = trial.step(version.run, [*tensors.values(), *constants.values()])
        ys, wanted = outputs(), [t for t in tensors.values() if t is not None]
        dys = trial.random_like(ys)
        backward = functools.partial(torch.autograd.grad, ys, wanted, dys, retain_graph=True)
        found.append(dict(forward=torch.no_grad()(outputs), backward=backward, both=both)[mode])
    return found


def time_case(
    kernel: Kernel, case: Case, dtype: torch.dtype, reach: dict, device: str = "cuda", **checked: object
) -> list[dict]:
    """Time every mode of every version; return a row of the table for each mode, with what was `checked`."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if GPU else 0
    sets = min(16, 1 + math.ceil(2 * cache / (case.elements * dtype.itemsize)))  # larger than the L2 cache
    compared, rows = versions(kernel), []
    for mode, (products, ahead, back) in MODES.items():
        runs, failed = {}, {}
        for name, version in compared.items():
            try:
                with version.inside():
                    runs[name] = captured(calls(version, case, mode, dtype, device, sets), GPU)
            except Exception as e:
                failed[name] = report.reason(e)
        found = {name: quantiles([t / sets for t in ts]) for name, ts in interleaved(runs).items()}
        moved = (ahead + back * case.back) * case.elements * dtype.itemsize
        work = {"flops": products * case.flops, "bytes": moved, "exps": (ahead + back) * case.exps}
        row = dict(op=kernel.name, case=case.name, mode=mode, failed=failed, **work, **checked)
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
    "op": "{op}", "shape": "{case}", "mode": "{mode}", "check": "{check}",
    "ms (20-80%)": "{ms:.4f} ({low:.4f}-{high:.4f})",
    "rate": "{rate}", "of limit": "{of_limit:.0%} {limit}", "error": "{error:.1e}",
    "torch's": "{torch_error:.1e}", "best other": "{best} {best_ms:.4f}", "ratio": "{ratio:.2f}",
}  # fmt: skip


def check(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> dict[str, object]:
    """Return whether the kernel is correct, and the largest errors."""
    try:
        found = trial.by_name(kernel, case, dtype, device)
    except torch.OutOfMemoryError:
        return dict(check="not checked: float64 does not fit")
    except Exception as e:
        return dict(check=f"failed: {report.reason(e)}")
    wrong, (ours, theirs) = trial.wrong(found), map(max, zip(*found.values(), strict=True))
    return dict(check=f"wrong: {', '.join(wrong)}" if wrong else "ok", error=ours, torch_error=theirs)


def dump(chosen: list[tuple[Kernel, Case]], out: Path) -> None:
    """Write the shapes, constants and amounts of work to shapes.json."""
    shapes = []
    for kernel, case in chosen:
        randn = functools.partial(torch.randn, device="meta")
        tensors, constants = case.inputs(torch.float32, "meta", randn=randn)
        sizes = {k: None if t is None else dict(shape=t.shape, stride=t.stride()) for k, t in tensors.items()}
        work = dict(flops=case.flops, elements=case.elements, exps=case.exps, back=case.back)
        shapes.append(dict(op=kernel.name, case=case.name, tensors=sizes, constants=constants, **work))
    out.mkdir(parents=True, exist_ok=True)
    (out / "shapes.json").write_text(json.dumps(shapes, indent=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only the ops or shapes whose name contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for what is written")
    parser.add_argument("--dump", action="store_true", help="write shapes.json and nothing else")
    options = parser.parse_args()
    chosen = select(options.only, "timed" if GPU or options.dump else "cases")
    if options.dump:
        dump(chosen, options.out)
        return 0
    if not (GPU or L.INTERPRET):  # Triton reads this when it is imported
        command = [sys.executable, "-m", "minisd.kernels.bench", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    dtype, device = (getattr(torch, options.dtype), "cuda") if GPU else (torch.float32, "cpu")
    if GPU:
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not captured on the default one
    else:
        print("no CUDA device: Triton's interpreter, and nothing is timed")
    return run(chosen, dtype, device, options.out if GPU else None)


def run(chosen: list[tuple[Kernel, Case]], dtype: torch.dtype, device: str, out: Path | None) -> int:
    """Check all, and with a folder time them and write the table. Return 1 if a kernel is wrong or fails."""
    bad, rows, reach = False, [], limits(dtype) if out else {}
    facts = report.about(triton=triton.__version__, dtype=str(dtype))
    facts |= {name: f"{value:.3g}/s" for name, value in reach.items()}
    print(*report.table(COLUMNS, []), sep="\n", flush=True)
    for kernel, case in chosen:
        checked = check(kernel, case, dtype, device)
        bad = bad or not checked["check"].startswith(("ok", "not checked"))
        new = [dict(op=kernel.name, case=case.name, mode="-", **checked)]
        if out:
            new = time_case(kernel, case, dtype, reach, device, **checked)
            facts["clocks.sm after"] = report.about().get("clocks.sm", "-")
            # Each time: a fault on the GPU may end the process
            report.write(out, "kernels", facts, COLUMNS, rows := rows + new, label="op", reach=reach)
        print(*(report.line(COLUMNS, row) for row in new), sep="\n", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
