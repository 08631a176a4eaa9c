"""What whole networks cost on this GPU: SD v1.5's shapes, random weights, minisd beside diffusers.

    python tests/gpu_cost.py [--dtype bfloat16] [--batches 1 2 8 16] [--out DIR] [--deterministic]

cost.md, cost.json and cost.png have the median time, steps and images a second, the peak memory and the
share of the floor: the time of all matrix products and convolutions at the speed of a large one, or that of
reading the weights once if it is longer; in training, the optimizer's reads and writes are added. A row
"graph" is what --graph on gives, the others what off does. The error of minisd's sampling step is relative,
against float64. What fails has a row that says why.

Without a GPU only the errors mean something: those of a tiny network, without torch.compile and graphs;
TRITON_INTERPRET=1 makes it run the kernels too.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisd import device, graph, ops  # noqa: E402
from minisd.kernels import bench, report, trial  # noqa: E402
from minisd.models import unet, vae  # noqa: E402
from minisd.models.layers import to_channels_last  # noqa: E402
from minisd.sampling.generate import Denoiser, text_branches  # noqa: E402
from minisd.training.optim import AdamW  # noqa: E402
from tests.helpers import TINY_VAE, diffusers_unet  # noqa: E402
from tests.kernel_helpers import DEVICE, GPU, INTERPRET, TINY  # noqa: E402

CONFIG, VAE, SIDE = (unet.SD15, vae.SD15, 64) if GPU else (TINY, TINY_VAE, 4)
ADAM = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
GUIDANCE = 7.5


class Version(NamedTuple):
    """A UNet and how it runs."""

    name: str
    ours: bool
    kernels: str = "torch"  # --kernels
    compiled: str = ""  # a mode of torch.compile
    channels_last: bool = True
    graph: bool = False


VERSIONS = [
    Version("diffusers", False, channels_last=False),
    Version("diffusers, compiled", False, compiled="default", channels_last=False),
    Version("diffusers, channels-last, max-autotune", False, compiled="max-autotune"),
    Version("minisd, torch", True),
    Version("minisd, torch, graph", True, graph=True),
    Version("minisd, torch, compiled", True, compiled="default"),
    Version("minisd, kernels", True, kernels="triton"),
    Version("minisd, kernels, graph", True, kernels="triton", graph=True),
]

# ------------------------------ The networks


def build(make: Callable, dtype: torch.dtype, channels_last: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = make().to(dtype).requires_grad_(False)
    return to_channels_last(network) if channels_last else network


def network(version: Version, dtype: torch.dtype) -> Callable:
    """The UNet of a version."""
    ops.choose(version.kernels)
    graph.choose("on" if version.graph else "off")
    if not version.ours:
        importlib.import_module("diffusers")
    make = (lambda: unet.UNet(CONFIG)) if version.ours else (lambda: diffusers_unet(CONFIG))
    net = build(make, dtype, version.channels_last)
    if version.compiled:
        torch.compiler.reset()
        net.compile(dynamic=False, mode=version.compiled)
    return net


def sampling(version: Version, dtype: torch.dtype, batch: int) -> Callable:
    """A call that makes a step with guidance for `batch` images."""
    net = network(version, dtype).eval()
    text = torch.randn(2 * batch, 77, CONFIG.cross_attention_dim, device=DEVICE).to(dtype)
    x = torch.randn(batch, 4, SIDE, SIDE, device=DEVICE)
    if version.ours:
        denoiser = Denoiser(net, text_branches(text[batch:], text[:batch], GUIDANCE))
        return torch.no_grad()(lambda: denoiser(x, 500))
    timesteps = torch.full((2 * batch,), 500, device=DEVICE)

    @torch.no_grad()
    def step():
        negative, positive = net(torch.cat([x, x]).to(dtype), timesteps, text).sample.float().chunk(2)
        return negative + GUIDANCE * (positive - negative)

    return step


def training(version: Version, dtype: torch.dtype, batch: int) -> Callable:
    """A call that makes an update of the whole UNet, in fp32 with autocast, by AdamW."""
    net = network(version, torch.float32).train().requires_grad_(True)
    noisy, noise = (torch.randn(batch, 4, SIDE, SIDE, device=DEVICE) for _ in range(2))
    text = torch.randn(batch, 77, CONFIG.cross_attention_dim, device=DEVICE)
    inputs = noisy, noise, torch.arange(batch, device=DEVICE), text
    parameters, graphs = list(net.parameters()), graph.Graphs()
    adam = AdamW(parameters, **ADAM) if version.ours else torch.optim.AdamW(parameters, fused=True, **ADAM)

    def gradients(noisy, noise, timesteps, text):
        with torch.autocast(DEVICE, dtype, enabled=GPU):
            pred = net(noisy, timesteps, text)
        loss = ((pred if version.ours else pred.sample).float() - noise).square().mean()
        return [*torch.autograd.grad(loss, parameters)]

    def step():
        found = graphs([net], gradients, *inputs) if version.graph else None
        for p, gradient in zip(parameters, found or gradients(*inputs), strict=True):
            p.grad = gradient
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def decoding(version: Version, dtype: torch.dtype, batch: int) -> Callable:
    """A call that decodes images; for minisd alone."""
    ops.choose(version.kernels)
    decode = torch.no_grad()(build(lambda: vae.AutoencoderKL(VAE), dtype, True).decode)
    z = torch.randn(batch, 4, SIDE, SIDE, device=DEVICE, dtype=dtype)
    return lambda: decode(z)


# ------------------------------ Measuring


def milliseconds(call: Callable, repeats: int = 20 if GPU else 1) -> list[float]:
    """Sorted times of calls, the first ones left out."""
    times, warm = [], 3 * GPU
    for _ in range(repeats + warm):
        torch.cuda.synchronize() if GPU else None
        start = time.perf_counter()
        call()
        torch.cuda.synchronize() if GPU else None
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[warm:])


@functools.cache
def work(kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """The FLOPs of an image's matrix products and convolutions, and the bytes that every step has to move."""
    size = 2 if kind == "sampling" else 1
    ops.choose("torch")
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net = unet.UNet(CONFIG) if kind != "decoding" else vae.AutoencoderKL(VAE)
        x, t = torch.randn(size, 4, SIDE, SIDE), torch.zeros(size)
        text = torch.randn(size, 77, CONFIG.cross_attention_dim)
        y = net.decode(x) if kind == "decoding" else net(x, t, text)
        y.sum().backward() if kind == "training" else None
    count = sum(p.numel() for p in net.parameters())
    moved = 7 * 4 if kind == "training" else dtype.itemsize  # AdamW reads p, g, m, v and writes p, m, v
    return counter.get_total_flops(), count * moved


@functools.cache
def exact(batch: int) -> torch.Tensor:
    """The result of a sampling step in float64, without kernels."""
    return sampling(Version("exact", True), torch.float64, batch)().double()


STEPS = {"sampling": sampling, "training": training, "decoding": decoding}
COLUMNS = {
    "step": "{step}", "batch": "{batch}", "how": "{how}", "ms (20-80%)": "{ms:.2f} ({low:.2f}-{high:.2f})",
    "it/s": "{rate:.2f}", "images/s": "{images:.2f}", "peak GiB": "{memory:.2f}",
    "of floor": "{of_floor:.0%}", "error": "{error:.1e}",
}  # fmt: skip


def measure(kind: str, version: Version, dtype, batch: int, reach: dict) -> dict:
    """A row of the table."""
    row = dict(step=kind, batch=batch, how=version.name)
    gc.collect()
    torch.cuda.empty_cache() if GPU else None
    torch.cuda.reset_peak_memory_stats() if GPU else None
    try:
        call = STEPS[kind](version, dtype, batch)
        times = milliseconds(call)
    except Exception as e:
        return row | dict(reason=report.reason(e))
    ms, low, high = statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]
    row |= dict(ms=ms, low=low, high=high, rate=1e3 / ms, images=1e3 * batch / ms)
    if GPU:
        row["memory"] = torch.cuda.max_memory_allocated() / 2**30
    if kind == "sampling" and version.ours:
        with contextlib.suppress(torch.OutOfMemoryError):  # in float64
            row["error"] = trial.relative(call(), exact(batch))
    if reach:
        flops, moved = batch * work(kind, dtype)[0], work(kind, dtype)[1]
        parts = 1e3 * flops / reach["flops"], 1e3 * moved / reach["bytes"]
        row |= dict(flops=flops, bytes=moved, of_floor=(sum if kind == "training" else max)(parts) / ms)
    return row


def rows(dtype, batches: list[int], reach: dict, versions: list[Version]) -> Iterator[dict]:
    for kind in STEPS:
        for batch in batches if kind != "decoding" else batches[:1]:
            for version in versions:
                if kind != "decoding" or version.ours and not version.compiled and not version.graph:
                    yield measure(kind, version, dtype, batch, reach)


def profile(version: Version, dtype: torch.dtype) -> str:
    """Where the time of a sampling step goes, by kernel."""
    call = sampling(version, dtype, 1)
    call()
    kind = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as trace:
        call()
        torch.cuda.synchronize() if GPU else None
    order = "self_device_time_total" if GPU else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 16] if GPU else [1])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for what is written")
    parser.add_argument("--deterministic", action="store_true", help="as of train.py: what that costs")
    o = parser.parse_args()
    chosen = SimpleNamespace(deterministic=o.deterministic, kernels="torch", graph="off")
    device.configure(chosen, search=True)
    dtype = getattr(torch, o.dtype) if GPU else torch.float32
    facts = report.about(
        dtype=str(dtype), deterministic=o.deterministic, network="SD v1.5" if GPU else "tiny"
    )
    reach = bench.limits(dtype) if GPU else {}
    if not GPU:
        print("no CUDA device: a tiny network, of which the errors mean something and the times nothing\n")
    print("\n".join([*(f"{k}: {v}" for k, v in facts.items()), "", *report.table(COLUMNS, [])]), flush=True)
    found, versions = [], VERSIONS
    if not GPU:
        versions = [v for v in versions if not v.compiled and not v.graph]
        versions = [v for v in versions if INTERPRET or v.kernels == "torch"]
    for row in rows(dtype, o.batches, reach, versions):
        found.append(row)
        print(report.line(COLUMNS, row), flush=True)
    report.write(o.out, "cost", facts, COLUMNS, found, label="how", reach=reach)
    print(f"\n{profile([v for v in versions if v.ours and not v.graph and not v.compiled][-1], dtype)}")


if __name__ == "__main__":
    main()
