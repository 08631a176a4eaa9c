"""Processes that train one model, started by torchrun: one per GPU with nccl, or on CPUs with gloo."""

import json
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minisd import launcher


def device() -> torch.device:
    """This process's own GPU, or the CPU: without a GPU, or by `accelerate launch --cpu`."""
    if launcher.is_on("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(gpu)
    return gpu


class Processes:
    """This process's place among those that train together. With one process, no method does anything."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0  # the process that writes
        if self.world > 1:
            # The processes wait while the first one generates images, hence the long timeout.
            backend = "nccl" if device().type == "cuda" else "gloo"
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=2)))
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=timedelta(hours=2)
            )
            self.answers = dist.PrefixStore("answers", store)
            self.control = dist.new_group(backend="gloo", timeout=timedelta(hours=2))

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.world > 1:
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()
            torch._foreach_div_(tensors, self.world)

    def agree(self, number: int) -> int:
        """The largest `number` of all processes, so that they stop after the same update."""
        shared = torch.tensor(number)
        if self.world > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.item()

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first_to_ask(self, question: str, answer: Callable[[], dict]) -> dict:
        """What `answer` returns in the first process that asks; the others wait for it."""
        if self.world == 1:
            return answer()
        if self.answers.add(f"asked {question}", 1) == 1:
            self.answers.set(question, json.dumps(answer()))
        return json.loads(self.answers.get(question))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the group once all processes have called this."""
        self.wait()
        if self.world > 1:
            dist.destroy_process_group()
