"""What averaging gradients costs two processes: in an operation for each tensor, or in buckets, after the
backward pass or during it.

    torchrun --nproc_per_node 2 tests/bucket_cost.py [ROUNDS [BUCKET]]

SD v1.5's UNet at a tenth of its widths, with 686 tensors, computes one loss again and again; the ways take
turns in the same processes, and have to give the same bytes. BUCKET is the size of a bucket in bytes. Prints
a line of JSON: seconds that are spent after the backward pass, and in all.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from minisd.models import unet
from minisd.training import averaging
from minisd.training.distributed import Processes

WIDTHS = (32, 64, 128, 128)


def each(parameters: list[torch.nn.Parameter], world: int) -> None:
    """The mean of each gradient over the processes, by an operation of its own."""
    gradients = [p.grad for p in parameters]
    for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
        work.wait()
    torch._foreach_div_(gradients, world)


def main() -> None:
    torch.set_num_threads(1)
    rounds, averaging.BUCKET = int((sys.argv[1:] or [5])[0]), int((sys.argv[2:] or [25 * 2**20])[0])
    processes = Processes()
    torch.manual_seed(0)
    network = unet.UNet(replace(unet.SD15, block_out_channels=WIDTHS, cross_attention_dim=64))
    parameters = list(network.parameters())
    draw = torch.Generator().manual_seed(processes.rank)
    x, context = (torch.randn(shape, generator=draw) for shape in ((1, 4, 32, 32), (1, 77, 64)))
    means = averaging.Averaging(parameters, processes, torch.float32)
    ways: dict[str, tuple[Callable[[], None], Callable[[Tensor], object]]] = {  # before and after backward
        "none": (lambda: None, lambda loss: None),
        "tensors": (lambda: None, lambda loss: each(parameters, processes.world)),
        "after": (lambda: None, means.finish),
        "during": (means.begin, means.finish),
    }
    whole, alone = ({name: [] for name in ways} for _ in range(2))
    for number in range(rounds + 1):
        results = {}
        for name, (begin, finish) in reversed(ways.items()):
            network.zero_grad(set_to_none=True)
            processes.wait()
            begun = time.perf_counter()
            loss = network(x, torch.tensor([500]), context).square().mean()
            begin()
            loss.backward()
            computed = time.perf_counter()
            finish(loss.detach())
            ended = time.perf_counter()
            if number:  # the first forms the buckets
                whole[name].append(ended - begun)
                alone[name].append(ended - computed)
            results[name] = [p.grad.clone() for p in parameters]
        for name in ("after", "during"):
            assert all(torch.equal(a, b) for a, b in zip(results["tensors"], results[name], strict=True))
    size = sum(p.nbytes for p in parameters) / 1e6
    report = {"tensors": len(parameters), "MB": size, "buckets": len(means.buckets)}
    for name, seconds in (("after backward", alone), ("whole", whole)):
        report[name] = {way: round(statistics.median(values), 4) for way, values in seconds.items()}
    if processes.first:
        print(json.dumps(report))
    processes.close()


if __name__ == "__main__":
    main()
