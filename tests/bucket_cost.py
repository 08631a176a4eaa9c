"""What averaging gradients costs two processes: in an operation for each tensor, or for each bucket.

    torchrun --nproc_per_node 2 tests/bucket_cost.py

measures both in turns in the same processes, on the tensors of SD v1.5's UNet at a hundredth of their sizes,
34 MB in all, and checks that both give the same bytes. Prints a line of JSON.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from minisd.models import unet
from minisd.training.distributed import Processes

ROUNDS = 5


def each(tensors: list[Tensor], world: int) -> None:
    """The mean of each tensor over the processes, by an operation of its own."""
    for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
        work.wait()
    torch._foreach_div_(tensors, world)


def main() -> None:
    torch.set_num_threads(1)
    processes = Processes()
    with torch.device("meta"):
        parameters = list(unet.UNet(unet.SD15).parameters())
    generator = torch.Generator().manual_seed(processes.rank)
    tensors = [torch.randn(max(1, p.numel() // 100), generator=generator) for p in parameters]
    ways: dict[str, Callable[[list[Tensor]], None]] = {
        "tensors": lambda t: each(t, processes.world),
        "buckets": processes.average,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        results = []
        for name, average in ways.items():
            results.append([t.clone() for t in tensors])
            processes.wait()
            begun = time.perf_counter()
            average(results[-1])
            seconds[name].append(time.perf_counter() - begun)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = sum(t.nbytes for t in tensors) / 1e6
    if processes.first:
        print(json.dumps({"tensors": len(tensors), "MB": size, "seconds": medians}))
    processes.close()


if __name__ == "__main__":
    main()
