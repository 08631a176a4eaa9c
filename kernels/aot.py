"""What the kernels take of a chip, without the chip: `python -m minisd.kernels.aot [--arch sm_80 sm_90]`.

The launchers run on tensors without data while `launch.record` writes down every call, so what is compiled
here is what a GPU would be given, argument for argument. Each call is compiled for every architecture and
read back from the machine code: registers, spills, shared memory, matrix instructions, the inner loop. The
exit status is 1 for spills beyond `ALLOWED_SPILLS`, too much shared memory, or wgmma that ptxas made serial.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import minisd.kernels.attention as attention
import minisd.kernels.cross_attention as cross_attention
import minisd.kernels.geglu as geglu
import minisd.kernels.group_norm as group_norm
import minisd.kernels.launch as L
import minisd.kernels.layer_norm as layer_norm
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHES = (80, 86, 89, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a block
ALLOWED_SPILLS: dict[tuple[str, str, int], int] = {}  # (kernel, shape, architecture) -> bytes a thread
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

# ------------------------------ What is shipped


low = torch.bfloat16  # the type of the activations: --dtype


def meta(*shape: int, dtype=None, layout=torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or low, device="meta", memory_format=layout)


def run_attention(n: int, m: int, hd: int) -> None:
    q, k = meta(2, n, 8, hd), meta(2, m, 8, hd)
    attention.backward(q, q, k, k, *attention.forward(q, k, k))


def run_cross(n: int, m: int, hd: int) -> None:
    q, k = meta(2, n, 8, hd), meta(2, m, 8, hd)
    cross_attention.backward(q, q, k, k, *cross_attention.forward(q, k, k))


def run_group_norm(c: int, side: int, layout=torch.channels_last, add=True) -> None:
    x, w = meta(2, c, side, side, layout=layout), meta(c, dtype=torch.float32)
    add = meta(2, c) if add else None
    _, mean, rstd = group_norm._forward(x, w, w, add, 32, 1e-5, True)
    group_norm._backward(x, x, w, w, add, mean, rstd, 32, True)


def run_geglu(d: int) -> None:
    geglu.backward(meta(2, 4096, d), meta(2, 4096, 2 * d))
    geglu.forward(meta(2, 4096, 2 * d))


def run_layer_norm(d: int) -> None:
    x, w = meta(2, 4096, d), meta(d, dtype=torch.float32)
    y, s, stats = layer_norm.forward(x, x, w, w, 1e-5)
    layer_norm.backward(y, y, s, w, stats)


# shape -> call: SD v1.5's UNet at 512 and 768 pixels and its VAE, and the head widths of other models
SHIPPED = {
    "self 4096 hd40": lambda: run_attention(4096, 4096, 40),
    "self 1024 hd80": lambda: run_attention(1024, 1024, 80),
    "self 256 hd160": lambda: run_attention(256, 256, 160),
    "self 144 hd160": lambda: run_attention(144, 144, 160),
    "self 1024 hd32": lambda: run_attention(1024, 1024, 32),
    "self 1024 hd64": lambda: run_attention(1024, 1024, 64),
    "self 1024 hd128": lambda: run_attention(1024, 1024, 128),
    "cross 4096 x 77 hd40": lambda: run_cross(4096, 77, 40),
    "cross 1024 x 77 hd80": lambda: run_cross(1024, 77, 80),
    "cross 256 x 77 hd160": lambda: run_cross(256, 77, 160),
    "cross 1024 x 77 hd32": lambda: run_cross(1024, 77, 32),
    "cross 1024 x 77 hd64": lambda: run_cross(1024, 77, 64),
    "cross 1024 x 77 hd128": lambda: run_cross(1024, 77, 128),
    "320 at 64": lambda: run_group_norm(320, 64),
    "640 at 32": lambda: run_group_norm(640, 32),
    "1280 at 16": lambda: run_group_norm(1280, 16),
    "1280 at 8": lambda: run_group_norm(1280, 8),
    "2560 at 8": lambda: run_group_norm(2560, 8),
    "320 at 64 contiguous": lambda: run_group_norm(320, 64, torch.contiguous_format),
    "geglu 1280": lambda: run_geglu(1280),
    "layer norm 320": lambda: run_layer_norm(320),
    "layer norm 640": lambda: run_layer_norm(640),
    "layer norm 1280": lambda: run_layer_norm(1280),
    "128 at 512": lambda: run_group_norm(128, 512, add=False),
}

# ------------------------------ Compiling


def specialise(kernel, args: tuple, more: dict):
    """The signature that Triton's launcher would make of these arguments, and a key to know it again."""
    constants, options = L.compile_options(more)
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + L.TRITON_NAMES[value.dtype]
            aligned = True
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1:  # Triton makes a constant of it
            signature[name], constants[name], aligned = "constexpr", 1, False
        else:
            signature[name], aligned = "i32", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys((n for n in kernel.arg_names if n in constants), "constexpr")
    key = (kernel.fn.__name__, str(signature), str(constants), str(options), str(sorted(attributes)))
    return ASTSource(kernel, signature, constants, attributes), options | {"enable_fp_fusion": True}, key


def calls(arch: int, only: str):
    """(kernel name, shape, source, options, constants), each distinct compilation once."""
    seen = set()
    for shape, run in SHIPPED.items():
        if only and only not in shape:
            continue
        with L.record(arch) as recorder:
            run()
        for kernel, args, more in recorder.calls:
            source, options, key = specialise(kernel, args, more)
            if key not in seen:
                seen.add(key)
                yield kernel.fn.__name__.strip("_"), shape, source, options, more


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
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    lines = [line for line in sass.split("\n") if re.search(r"/\*[0-9a-f]{4,}\*/|^\s*\.L_\w+:", line)]
    return int(found[1]), int(found[2]), lines


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
    found = {name: sum(bool(re.search(p, line)) for line in body) for name, p in COUNTED.items()}
    return {"n": len(body)} | {k: v for k, v in found.items() if v}


def inner_loop(lines: list[str]) -> dict[str, int]:
    """The loop with the most matrix instructions, or the longest; of equals the shortest, the innermost."""
    found = [count(body) for body in loops(lines) if len(body) > 1]  # every kernel ends in a jump to itself
    return max(found, key=lambda c: (c.get("mma", 0), -c["n"] if c.get("mma") else c["n"]), default={})


def serialised(whole: dict[str, int]) -> bool:
    """Whether ptxas gave up on asynchronous wgmma (warning C7510): every one is then fenced and awaited."""
    return whole.get("sync", 0) >= 2 * whole.get("mma", 1)


def measure(name, shape, source, options, more, arch: int) -> dict:
    start = time.time()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, lines = disassemble(compiled.asm["cubin"])
    whole = count(lines)
    return dict(
        arch=arch, kernel=name, shape=shape, tile={k: v for k, v in more.items() if type(v) is int},
        registers=registers, spills=stack, shared=compiled.metadata.shared, warps=options.get("num_warps", 4),
        whole=whole, loop=inner_loop(lines), wgmma="HGMMA" in "".join(lines),
        serialised=serialised(whole), seconds=round(time.time() - start, 2),
    )  # fmt: skip


def faults(row: dict) -> list[str]:
    allowed = ALLOWED_SPILLS.get((row["kernel"], row["shape"], row["arch"]), 0)
    return [
        *([f"spills {row['spills']} bytes, {allowed} allowed"] if row["spills"] > allowed else []),
        *(["shared memory over the limit"] if row["shared"] > SHARED_LIMIT[row["arch"]] else []),
        *(["wgmma serialised"] if row["serialised"] else []),
    ]


def show(row: dict) -> str:
    blocks = " ".join(f"{v}" for k, v in row["tile"].items() if k.startswith("BLOCK"))
    mma = (
        "serial"
        if row["serialised"]
        else "wgmma"
        if row["wgmma"]
        else "mma"
        if "mma" in row["whole"]
        else "-"
    )
    loop = " ".join(f"{k}={v}" for k, v in (row["loop"] or {"no loop": "", **row["whole"]}).items())
    return (
        f"sm_{row['arch']:<4}{row['kernel']:<18}{row['shape']:<22}{blocks:>9} w{row['warps']}"
        f"{row['registers']:>5}{row['spills']:>6}{row['shared'] / 1024:>8.1f}  {mma:<7}{loop}"
    )


def main() -> int:
    global low
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=[f"sm_{a}" for a in ARCHES], help="sm_80 sm_86 ...")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only the shapes whose name contains this")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    low = getattr(torch, options.dtype)
    unknown = [a for a in options.arch if a.removeprefix("sm_") not in map(str, ARCHES)]
    if unknown:
        parser.error(
            f"--arch {unknown[0]}: the kernels are checked for " + ", ".join(f"sm_{a}" for a in ARCHES)
        )
    print(
        "arch   kernel            shape                      tile    regs spills  smem K  mma    inner loop"
    )
    start, rows, bad = time.time(), [], collections.Counter()
    for arch in (int(a.removeprefix("sm_")) for a in options.arch):
        for call in calls(arch, options.only):
            row = measure(*call, arch)
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
