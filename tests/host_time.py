"""What the ops cost the CPU with kernels: the 157 calls of one forward of SD v1.5, batch 2, 512 pixels.

    python tests/host_time.py [--before CHECKOUT] [--rounds 30]

No GPU is needed: Triton compiles for sm_90, and its driver launches nothing. So the C call that launches is
left out, some 3 us each, and so is everything that the GPU does. An allocation hands out the tensor that was
made for the same sizes before, in the time that a caching allocator takes; torch.stack does the same, and
torch.sum runs on a tiny tensor. CPU time, the fastest round. The machine's speed swings: `--before` times
another checkout in the same run, round by round, and `torch.add` of two numbers is the yardstick.
"""

import argparse
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------ The calls of one forward


def shapes() -> Iterator[tuple]:
    """(op, channels, side, ...) of every call that the UNet makes."""
    width = {64: 320, 32: 640, 16: 1280, 8: 1280}

    def resnet(c: int, side: int):
        yield "group_norm", c, side, False
        yield "group_norm", width[side], side, True  # the timestep is added

    def transformer(side: int):
        yield "group_norm", width[side], side, False
        yield from (
            (op, width[side], side) for op in ("norm", "self", "add_norm", "text", "add_norm", "geglu")
        )

    before = dict(zip((64, 32, 16, 8), (320, 320, 640, 1280), strict=True))
    for side, c in before.items():
        for into in (c, width[side]):
            yield from resnet(into, side)
            yield from transformer(side) if side > 8 else ()
    yield from (*resnet(1280, 8), *transformer(8), *resnet(1280, 8))
    up = {8: (2560, 2560, 2560), 16: (2560, 2560, 1920), 32: (1920, 1280, 960), 64: (960, 640, 640)}
    for side, channels in up.items():
        for into in channels:
            yield from resnet(into, side)
            yield from transformer(side) if side > 8 else ()
    yield "group_norm", 320, 64, False


def arguments(op: str, c: int, side: int, add: bool = False) -> tuple[str, tuple, dict]:
    """The name of a function of minisd/ops.py, its arguments, and those by name."""
    import torch

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    def norm():
        return empty(c, dtype=torch.float32), empty(c, dtype=torch.float32)

    b, n = 2, side * side
    if op == "group_norm":
        x = empty(b, c, side, side).to(memory_format=torch.channels_last)
        return "group_norm", (x, 32, *norm(), 1e-5), dict(silu=True, add=empty(b, c) if add else None)
    if op == "norm":
        return "layer_norm", (empty(b, n, c), *norm(), 1e-5), {}
    if op == "add_norm":
        return "add_layer_norm", (empty(b, n, c), empty(b, n, c), *norm(), 1e-5), {}
    if op == "geglu":
        return "geglu", (empty(b, n, 8 * c),), {}
    if op == "self":
        return "attention", tuple(t.unflatten(-1, (8, c // 8)) for t in empty(b, n, 3 * c).chunk(3, -1)), {}
    return "attention", (empty(b, n, 8, c // 8), *(empty(b, 77, 8, c // 8) for _ in "kv")), {}


# ------------------------------ One process for each checkout


def launch_nothing() -> None:
    """Triton's driver without a GPU, and a torch.sum whose cost does not grow with the tensor."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda *a: (1, 1, 0, 0, 1024),
        unload_module=lambda *a: None,
        get_device_properties=lambda device: dict(max_shared_mem=227 * 1024),
    )
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: -1,  # the index of tensors on the CPU
            get_current_stream=lambda device: 0,
            launcher_cls=lambda source, metadata: lambda *arguments: None,
            utils=utils,
        )
    )
    made, new_empty, empty_like = {}, torch.Tensor.new_empty, torch.empty_like

    def again(make: Callable, x, *shape, **more):
        key = make, shape or (x.shape, x.stride()), more.get("dtype", x.dtype)
        if key not in made:
            made[key] = make(x, *shape, **more)
        return made[key].data

    torch._library.utils._c_check_aliasing_constraint = lambda *a: None  # they have one memory
    torch.Tensor.new_empty = lambda *a, **more: again(new_empty, *a, **more)
    torch.empty_like = lambda *a, **more: again(empty_like, *a, **more)
    tiny, out, real = torch.zeros(2, 4), torch.zeros(4), torch.sum
    torch.stack = lambda pair: again(lambda x, *a: x.new_empty(a), pair[0], len(pair), *pair[0].shape)
    torch.sum = lambda x, dim, **more: (real(tiny, 0, out=out), more["out"])[1]


def calls() -> list[tuple[Callable, tuple, dict]]:
    """(op, arguments, those by name) of every call, with leaves that require gradients."""
    import torch

    from minisd import ops
    from minisd.kernels import launch

    def leaf(a: object) -> object:
        return a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a

    launch.why_not = lambda *tensors, dtypes: ""  # on a CPU
    ops.choose("triton")
    every = [arguments(*shape) for shape in shapes()]
    return [
        (getattr(ops, op), tuple(map(leaf, given)), {name: leaf(a) for name, a in more.items()})
        for op, given, more in every
    ]


def modes() -> dict[str, Callable[[], object]]:
    """Forward without gradients, forward and backward, and 1,000 times torch.add."""
    import torch

    every = calls()
    leaves = [a for _, given, more in every for a in (*given, *more.values()) if isinstance(a, torch.Tensor)]

    def forward():
        return [op(*given, **more) for op, given, more in every]

    with torch.no_grad():
        ys = [y for out in forward() for y in (out if type(out) is tuple else (out,)) if y.numel()]
    dys = [torch.empty_like(y) for y in ys]

    class Loss(torch.autograd.Function):  # one loss for all outputs, so that the engine starts once
        @staticmethod
        def forward(ctx, *ys):
            return torch.zeros(())

        @staticmethod
        def backward(ctx, grad):
            return tuple(dys)

    def train():
        ys = [y for out in forward() for y in (out if type(out) is tuple else (out,)) if y.requires_grad]
        return torch.autograd.grad(Loss.apply(*ys), leaves)

    a = torch.zeros(())
    return dict(
        forward=torch.no_grad()(forward), train=train, add=lambda: [torch.add(a, a) for _ in range(1000)]
    )  # fmt: skip


def serve() -> None:
    """Run each mode once for every line of the standard input, and write the milliseconds."""
    launch_nothing()
    every = modes()
    for run in every.values():
        run()
    gc.disable()
    for _ in sys.stdin:
        times = []
        for run in every.values():
            start = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - start))
        print(*times, flush=True)
        gc.collect()


# ------------------------------ The table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", help="another checkout, timed in turn with this one")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    checkouts = dict(before=options.before, after=ROOT) if options.before else dict(after=ROOT)
    start = functools.partial(subprocess.Popen, [sys.executable, __file__, "--serve"], text=True)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    environment = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    running = {k: start(env=environment | dict(PYTHONPATH=str(p)), **pipes) for k, p in checkouts.items()}
    times: dict[str, list] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, process in running.items():
            print(file=process.stdin, flush=True)
            times[name].append([float(t) for t in process.stdout.readline().split()])
    for process in running.values():
        process.communicate()
    print("| checkout | forward, ms | forward and backward, ms | torch.add, us |\n|---|---|---|---|")
    for name, rows in times.items():
        print(f"| {name} |", " | ".join(f"{min(column):.2f}" for column in zip(*rows, strict=True)), "|")


if __name__ == "__main__":
    main()
