"""What the kernels take of a chip, without the chip: `python -m minisd.kernels.aot [--arch sm_80 sm_90]`.

The launchers run on tensors without data while `launch.record` writes down every call, so what is compiled
here is what a GPU would be given, argument for argument. Each call is compiled for every architecture and
read back from the machine code: registers, spills, shared memory, matrix instructions, the inner loop. The
exit status is 1 for spills beyond `ALLOWED_SPILLS`, too much shared memory, or wgmma that ptxas made serial.
"""

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import minisd.kernels.checks as checks
import minisd.kernels.launch as L
import torch
import triton
from minisd.kernels.kernel import discover
from triton.backends.compiler import GPUTarget

# architecture -> bytes of shared memory that a block may have
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ALLOWED_SPILLS: dict[tuple[str, str, int], int] = {}  # (kernel, shape, architecture) -> bytes a thread
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

# ------------------------------ Compiling


class Chip:
    """All that Triton asks of a driver before it compiles; one device for each architecture."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def calls(arch: int, only: str, dtype: torch.dtype) -> Iterator[tuple]:
    """(shape, kernel, arguments, constants) of every launch of the kernels' `compiled` cases."""
    for kernel in discover().values():
        for case in kernel.compiled:
            if only in f"{kernel.name} {case.name}":
                tensors, constants = case.make(functools.partial(torch.randn, device="meta"))
                tensors = checks.place(tensors, dtype, "meta", case.layout, weights=torch.float32)
                with L.record(arch) as recorded:
                    _, backward = kernel.launchers(*tensors.values(), *constants.values())
                    backward()
                yield from ((case.name, *call) for call in recorded)


def measure(arch: int, only: str = "", dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """Compile each distinct launch once, and yield what it takes of the chip."""
    triton.runtime.driver.set_active(Chip(arch))
    seen = set()
    for shape, kernel, args, meta in calls(arch, only, dtype):
        start = time.time()
        compiled = kernel.warmup(*args, grid=(1,), **meta)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        registers, stack, lines = disassemble(compiled.asm["cubin"])
        whole = count(lines)
        yield dict(
            arch=arch, kernel=kernel.fn.__name__.strip("_"), shape=shape,
            tile={name: value for name, value in meta.items() if type(value) is int},
            registers=registers, spills=stack, shared=compiled.metadata.shared,
            warps=compiled.metadata.num_warps, whole=whole, loop=inner_loop(lines),
            wgmma="HGMMA" in "".join(lines), serialised=serialised(whole),
            seconds=round(time.time() - start, 2),
        )  # fmt: skip


# ------------------------------ Reading the machine code


def disassemble(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers and bytes of stack a thread, and the instructions with their labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [os.path.join(TOOLS, tool), flag, file.name], capture_output=True, text=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    lines = [line for line in sass.split("\n") if re.search(r"/\*[0-9a-f]{4,}\*/|^\s*\.L_\w+:", line)]
    return int(registers), int(stack), lines


def loops(lines: list[str]) -> list[list[str]]:
    """The body of every backward branch."""
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
    counts = {name: sum(bool(re.search(p, line)) for line in body) for name, p in COUNTED.items()}
    return {"n": len(body)} | {name: number for name, number in counts.items() if number}


def inner_loop(lines: list[str]) -> dict[str, int]:
    """The loop with the most matrix instructions, or the longest; of equals the shortest, the innermost."""
    counts = [count(body) for body in loops(lines) if len(body) > 1]  # every kernel ends in a jump to itself
    return max(counts, key=lambda c: (c.get("mma", 0), -c["n"] if c.get("mma") else c["n"]), default={})


def serialised(whole: dict[str, int]) -> bool:
    """Whether ptxas gave up on asynchronous wgmma (warning C7510): every one is then fenced and awaited."""
    return whole.get("sync", 0) >= 2 * whole.get("mma", 1)


def faults(row: dict) -> list[str]:
    allowed = ALLOWED_SPILLS.get((row["kernel"], row["shape"], row["arch"]), 0)
    return [
        *([f"spills {row['spills']} bytes, {allowed} allowed"] if row["spills"] > allowed else []),
        *(["shared memory over the limit"] if row["shared"] > SHARED_LIMIT[row["arch"]] else []),
        *(["wgmma serialised"] if row["serialised"] else []),
    ]


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
    parser.add_argument("--arch", nargs="+", default=known, help="sm_80 sm_86 ...")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only the kernels or shapes whose name contains this")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    arches = [f"sm_{arch.removeprefix('sm_')}" for arch in options.arch]
    if unknown := [arch for arch in arches if arch not in known]:
        parser.error(f"--arch {unknown[0]}: the kernels are checked for {', '.join(known)}")
    print(HEADING)
    start, rows, bad = time.time(), [], collections.Counter()
    for arch in arches:
        for row in measure(int(arch.removeprefix("sm_")), options.only, getattr(torch, options.dtype)):
            rows.append(row)
            print(show(row), flush=True)
            for fault in faults(row):
                bad[fault] += 1
                print(f"    FAULT: {fault}", flush=True)
    print(f"{len(rows)} compilations in {time.time() - start:.0f} s; faults: {sum(bad.values())}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
