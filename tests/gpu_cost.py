"""What whole networks cost on this GPU, SD v1.5's shapes with random weights, torch beside the kernels.

    python tests/gpu_cost.py [--dtype bfloat16]

A table in Markdown, medians in ms, and the kernels that take most of a sampling step. Without a GPU a tiny
network shows that the script runs; TRITON_INTERPRET=1 makes that run the kernels too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisd import ops  # noqa: E402
from minisd.models import unet, vae  # noqa: E402
from minisd.models.layers import Attention, to_channels_last  # noqa: E402
from minisd.sampling.guidance import Denoiser, text_branches
from tests.helpers import TINY_VAE  # noqa: E402
from tests.kernel_helpers import DEVICE, GPU, INTERPRET, TINY, graph  # noqa: E402

CONFIG, VAE, SIDE, REPEATS = (unet.SD15, vae.SD15, 64, 20) if GPU else (TINY, TINY_VAE, 4, 1)
CHOICES = [("torch", "torch")] + [("kernels", "triton")] * (GPU or INTERPRET)  # label, --kernels


def milliseconds(call: Callable, repeats: int = REPEATS) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    times = []
    for _ in range(repeats + 3 * GPU):
        torch.cuda.synchronize() if GPU else None
        start = time.perf_counter()
        call()
        torch.cuda.synchronize() if GPU else None
        times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[3 * GPU :])
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


def network(build: Callable, dtype, arranged: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        net = build().to(dtype).eval().requires_grad_(False)
    return to_channels_last(net) if arranged else net


def steps(dtype) -> Iterator[tuple[str, str, Callable]]:
    """(what, how, a call): one picture's sampling step with guidance, the VAE's decoding, a training step."""
    text, none = (torch.randn(1, 77, CONFIG.cross_attention_dim, device=DEVICE, dtype=dtype) for _ in "ab")
    x = torch.randn(1, 4, SIDE, SIDE, device=DEVICE)
    what = f"UNet, step with guidance, {8 * SIDE} pixels"
    for name, choice in CHOICES:
        ops.choose(choice)
        net = network(lambda: unet.UNet(CONFIG), dtype, arranged=False)
        yield what, f"{name}, contiguous", sampling(net, text, none, x)
        sample = sampling(to_channels_last(net), text, none, x)
        yield what, name, sample
        if GPU:
            yield what, f"{name}, CUDA graph", graphed(sample, x)
            yield what, f"{name}, compiled", sampling(torch.compile(net), text, none, x)
        for layer in (m for m in net.modules() if isinstance(m, Attention)):
            layer.to_k.weight.data = layer.to_k.weight.data.clone()
        yield what, f"{name}, q k v apart", sampling(net, text, none, x)
        yield what, f"{name}, q k v apart, text every step", lambda net=net: plain(net, text, none, x)
    for name, choice in CHOICES:
        ops.choose(choice)
        decode = network(lambda: vae.AutoencoderKL(VAE), dtype).decode
        yield "VAE, decode", name, lambda decode=decode: no_grad(decode, x.to(dtype))
    size = 8 if GPU else 1
    timesteps = torch.arange(size, device=DEVICE)
    noisy, context = x.expand(size, -1, -1, -1).to(dtype), text.expand(size, -1, -1)
    for name, choice in CHOICES:
        ops.choose(choice)
        net = network(lambda: unet.UNet(CONFIG), torch.float32).requires_grad_(True)

        def train(net=net):
            with torch.autocast(DEVICE, dtype, enabled=GPU):
                loss = net(noisy, timesteps, context).float().square().mean()
            torch.autograd.grad(loss, list(net.parameters()))

        yield f"UNet, forward and backward, batch {size}", name, train


def no_grad(call: Callable, *arguments):
    with torch.no_grad():
        return call(*arguments)


def sampling(net, text, none, x) -> Callable:
    denoise = Denoiser(net, text_branches(text, none, 7.5))
    return lambda x=x: no_grad(denoise, x, 500)


def plain(net, text, none, x):
    both = torch.cat([x, x]).to(text.dtype)
    timesteps = torch.full((2,), 500, device=DEVICE)
    return no_grad(net, both, timesteps, torch.cat([none, text]))


def graphed(call: Callable, x) -> Callable:
    replay = graph(call, x)
    return lambda: replay(x)


def profile(dtype) -> str:
    """Where the time of one step goes, by kernel."""
    ops.choose(CHOICES[-1][1])
    net = network(lambda: unet.UNet(CONFIG), dtype)
    text = torch.randn(1, 77, CONFIG.cross_attention_dim, device=DEVICE, dtype=dtype)
    call = sampling(net, text, text, torch.randn(1, 4, SIDE, SIDE, device=DEVICE))
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        call()
        torch.cuda.synchronize() if GPU else None
    order = "self_device_time_total" if GPU else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    dtype = getattr(torch, parser.parse_args().dtype) if GPU else torch.float32
    device = torch.cuda.get_device_name() if GPU else "no GPU, a tiny network"
    print(f"{device}, torch {torch.__version__}, {dtype}, {time.strftime('%Y-%m-%d')}\n")
    print("| what | how | ms (20-80%) |\n|---|---|---|")
    for what, how, call in steps(dtype):
        median, low, high = milliseconds(call)
        print(f"| {what} | {how} | {median:.2f} ({low:.2f}-{high:.2f}) |", flush=True)
    print(f"\n{profile(dtype)}")


if __name__ == "__main__":
    main()
