"""Compile the kernels and report their use of resources: `python -m minisd.kernels.aot [--arch sm_80 sm_90]`.

No GPU is needed. The launchers run on tensors without data while `launch.record` records every call, so each
call is compiled with the arguments that a GPU would get, for every architecture. Registers, spills, shared
memory and the number of instructions are read from the machine code. The exit status is 1 for spills, too
much shared memory, or wgmma that ptxas made serial.
"""

import argparse
import functools
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import minisd.kernels.launch as L
import minisd.kernels.report as report
import torch
import triton
from minisd.kernels.kernel import select
from triton.backends.compiler import GPUTarget

# architecture -> bytes of shared memory that a block may have
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
COUNTED = {"mma": r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)", "wait": r"WARPGROUP\.(ARRIVE|DEPBAR)"}

# ------------------------------ Compiling


def measure(arch: int, only: str = "", dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Compile every launch of the `timed` and `compiled` cases, and return the resources that each uses."""
    driver = SimpleNamespace(  # what Triton's compiler needs of a driver; each architecture is a device
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    randn, rows = functools.partial(torch.randn, device="meta"), []
    for kernel, case in select(only, "timed", "compiled"):
        tensors, constants = case.inputs(dtype, "meta", randn=randn, weights=torch.float32)
        with L.record(arch) as recorded:
            kernel.launch(*tensors.values(), *constants.values())
        rows += [dict(arch=arch, shape=case.name) | resources(*call) for call in recorded]
    return rows


def resources(function, grid: tuple, arguments: tuple, constants: dict) -> dict:
    compiled = function.warmup(*arguments, grid=(1,), **constants)
    registers, stack, lines = disassemble(compiled.asm["cubin"])
    counts = {name: sum(bool(re.search(p, line)) for line in lines) for name, p in COUNTED.items()}
    # Where ptxas gives up on asynchronous wgmma (warning C7510), it fences and awaits each
    serial = counts["wait"] >= 2 * max(counts["mma"], 1)
    return dict(
        hash=compiled.hash, kernel=function.fn.__name__.strip("_"), registers=registers, spills=stack,
        tile=" ".join(str(value) for name, value in constants.items() if name.startswith("BLOCK")),
        shared=compiled.metadata.shared, warps=compiled.metadata.num_warps,
        mma="serial" if serial else "wgmma" if counts["wait"] else "mma" if counts["mma"] else "-",
        instructions=len(lines),
    )  # fmt: skip


# ------------------------------ Reading the machine code


def disassemble(cubin: bytes) -> tuple[int, int, list[str]]:
    """Return registers and bytes of stack per thread, and the lines of instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = functools.partial(subprocess.check_output, stderr=subprocess.DEVNULL, text=True)
        usage = output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        sass = output([triton.knobs.nvidia.nvdisasm.path, "-c", file.name])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), re.findall(r"/\*[0-9a-f]{4,}\*/.*", sass)


def faults(row: dict) -> list[str]:
    found = {
        f"spills {row['spills']} bytes": row["spills"] > 0,
        "shared memory over the limit": row["shared"] > SHARED_LIMIT[row["arch"]],
        "wgmma serialised": row["mma"] == "serial",
    }
    return [fault for fault, present in found.items() if present]


COLUMNS = {
    "arch": "sm_{arch}", "kernel": "{kernel:<15}", "shape": "{shape:<23}", "tile": "{tile:>7} w{warps}",
    "registers": "{registers:>3}", "spills": "{spills}", "shared": "{shared:>6}", "mma": "{mma:<6}",
    "faults": "{faults}", "instructions": "{instructions}",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = [f"sm_{arch}" for arch in SHARED_LIMIT]
    parser.add_argument("--arch", nargs="+", choices=known, default=known, help="compute capabilities")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only the kernels or shapes whose name contains this")
    options = parser.parse_args()
    print(*report.table(COLUMNS, []), sep="\n")
    hashes, bad = set(), 0
    names = [f"{kernel.name} {case.name}" for kernel, case in select(options.only, "timed", "compiled")]
    pairs = [(int(arch.removeprefix("sm_")), name) for arch in options.arch for name in names]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        job = functools.partial(measure, dtype=getattr(torch, options.dtype))
        for row in itertools.chain.from_iterable(processes.map(job, *zip(*pairs, strict=True))):
            if row["hash"] not in hashes:  # several shapes may launch the same
                hashes.add(row["hash"])
                print(report.line(COLUMNS, row | dict(faults=", ".join(faults(row)))), flush=True)
                bad += len(faults(row))
    print(f"{len(hashes)} compilations; faults: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
