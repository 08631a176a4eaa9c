"""Compile the kernels and report their use of resources: `python -m minisd.kernels.aot [--arch sm_80 sm_90]`.

No GPU is needed. The launchers run on tensors without data while `launch.record` records every call, so each
call is compiled with the arguments that a GPU would get, for every architecture. Registers, spills, shared
memory, matrix instructions and the inner loop are read from the machine code. The exit status is 1 for
spills, too much shared memory, or wgmma that ptxas made serial.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import minisd.kernels.checks as checks
import minisd.kernels.launch as L
import torch
import triton
from minisd.kernels.kernel import select
from triton.backends.compiler import GPUTarget

# architecture -> bytes of shared memory that a block may have
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# ------------------------------ Compiling


def calls(arch: int, only: str, dtype: torch.dtype) -> Iterator[tuple]:
    """Yield (shape, kernel, grid, arguments, constants) for every launch of the kernels' `compiled` cases."""
    randn = functools.partial(torch.randn, device="meta")
    for kernel, case in select("compiled", only):
        tensors, constants = checks.inputs(case, dtype, "meta", randn=randn, weights=torch.float32)
        with L.record(arch) as recorded:
            _, backward = kernel.launchers(*tensors.values(), *constants.values())
            backward()
        yield from ((case.name, *call) for call in recorded)


def measure(arch: int, only: str = "", dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """Compile each launch, and yield the resources that it uses."""
    driver = SimpleNamespace(  # what Triton's compiler needs of a driver; each architecture is a device
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    for shape, kernel, _, args, meta in calls(arch, only, dtype):
        start = time.time()
        compiled = kernel.warmup(*args, grid=(1,), **meta)
        registers, stack, lines = disassemble(compiled.asm["cubin"])
        whole = count(lines)
        yield dict(
            hash=compiled.hash, arch=arch, kernel=kernel.fn.__name__.strip("_"), shape=shape,
            tile={name: value for name, value in meta.items() if type(value) is int},
            registers=registers, spills=stack, shared=compiled.metadata.shared,
            warps=compiled.metadata.num_warps, whole=whole, loop=inner_loop(lines),
            wgmma="HGMMA" in "".join(lines),
            # Where ptxas gives up on asynchronous wgmma (warning C7510), it fences and awaits each
            serialised=whole.get("sync", 0) >= 2 * whole.get("mma", 1),
            seconds=round(time.time() - start, 2),
        )  # fmt: skip


def measured(arch: int, only: str, dtype: torch.dtype) -> list[dict]:
    return list(measure(arch, only, dtype))


# ------------------------------ Reading the machine code


def disassemble(cubin: bytes) -> tuple[int, int, list[str]]:
    """Return registers and bytes of stack per thread, and the lines of instructions and labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = functools.partial(subprocess.check_output, stderr=subprocess.DEVNULL, text=True)
        usage = output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        sass = output([triton.knobs.nvidia.nvdisasm.path, "-c", file.name])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    lines = [line for line in sass.split("\n") if re.search(r"/\*[0-9a-f]{4,}\*/|^\s*\.L_\w+:", line)]
    return int(registers), int(stack), lines


def loops(lines: list[str]) -> list[list[str]]:
    """Return the body of every backward branch."""
    labels, bodies = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = i
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            bodies.append([x for x in lines[labels[jump[1]] : i + 1] if "/*" in x])
    return bodies


COUNTED = {
    "mma": r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)", "sync": r"WARPGROUP\.(ARRIVE|DEPBAR)", "exp2": r"MUFU\.EX2",
    "fma": r"\b(FFMA|FMUL|FADD)", "max": r"\bFMNMX", "shfl": r"\bSHFL", "lds": r"\b(LDS|LDSM|STS|STSM)\b",
    "ldg": r"\b(LDG|LDGSTS)\b", "stg": r"\bSTG\b", "local": r"\b(LDL|STL)\b", "bar": r"\bBAR\b",
}  # fmt: skip


def count(body: list[str]) -> dict[str, int]:
    """Return the number of instructions, and of those of each kind in COUNTED that occurs."""
    counts = {name: sum(bool(re.search(p, line)) for line in body) for name, p in COUNTED.items()}
    return {"n": len(body)} | {name: number for name, number in counts.items() if number}


def inner_loop(lines: list[str]) -> dict[str, int]:
    """Return the counts of the loop with the most matrix instructions (of equals, the shortest, which is the
    innermost), or without any, of the longest loop."""
    counts = [count(body) for body in loops(lines) if len(body) > 1]  # every kernel ends in a jump to itself
    return max(counts, key=lambda c: (c.get("mma", 0), -c["n"] if c.get("mma") else c["n"]), default={})


def faults(row: dict) -> list[str]:
    found = {
        f"spills {row['spills']} bytes": row["spills"] > 0,
        "shared memory over the limit": row["shared"] > SHARED_LIMIT[row["arch"]],
        "wgmma serialised": row["serialised"],
    }
    return [fault for fault, present in found.items() if present]


def show(row: dict) -> str:
    blocks = " ".join(f"{v}" for k, v in row["tile"].items() if k.startswith("BLOCK"))
    mma = "wgmma" if row["wgmma"] else "mma" if "mma" in row["whole"] else "-"
    mma = "serial" if row["serialised"] else mma
    loop = " ".join(f"{k}={v}" for k, v in (row["loop"] or {"no loop": "", **row["whole"]}).items())
    return (
        f"sm_{row['arch']:<4}{row['kernel']:<18}{row['shape']:<26}{blocks:>9} w{row['warps']}"
        f"{row['registers']:>5}{row['spills']:>6}{row['shared'] / 1024:>8.1f}  {mma:<7}{loop}"
    )


HEADING = f"arch   {'kernel':<18}{'shape':<26}{'tile':>9}    regs spills  smem K  mma    inner loop"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [f"sm_{arch}" for arch in SHARED_LIMIT]
    arch = dict(type=lambda name: "sm_" + name.removeprefix("sm_"), choices=known, default=known)
    parser.add_argument("--arch", nargs="+", **arch, help="compute capabilities, by default all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only the kernels or shapes whose name contains this")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    print(HEADING)
    start, rows, bad = time.time(), {}, 0
    names = [f"{kernel.name} {case.name}" for kernel, case in select("compiled", options.only)]
    pairs = [(int(arch.removeprefix("sm_")), name) for arch in options.arch for name in names]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        job = functools.partial(measured, dtype=getattr(torch, options.dtype))
        for row in itertools.chain.from_iterable(processes.map(job, *zip(*pairs, strict=True))):
            if row["hash"] not in rows:  # several shapes may launch the same
                rows[row["hash"]] = row
                print(show(row), *(f"    FAULT: {fault}" for fault in faults(row)), sep="\n", flush=True)
                bad += len(faults(row))
    print(f"{len(rows)} compilations in {time.time() - start:.0f} s; faults: {bad}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([*rows.values()], file, indent=1)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
