"""Gradients, averaged over the processes in buckets while the backward pass computes further ones.

Not by DistributedDataParallel: that asks for a loss which is the forward pass of one module with all that
trains, and for a walk through the graph in every pass where a parameter may be without a gradient. It also
changes its buckets after the first update, so that a resumed run of more than two processes would sum in
another order than one that was not interrupted.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisd.training.distributed import Processes

BUCKET = 25 * 2**20  # bytes of gradients that are averaged in one operation


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbouring tensors of one dtype together, of at most BUCKET bytes unless one alone has more."""
    bucket, size = [], 0
    for t in tensors:
        if bucket and (size + t.nbytes > BUCKET or t.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.nbytes
    if bucket:
        yield bucket


class Averaging:
    """The means of the parameters' gradients over the processes, summed in `dtype`.

    The first update shows in which order gradients come: a bucket has neighbours in the order of process 0,
    and is sent once its last gradient is there and the bucket before it is sent. With one process nothing
    happens.
    """

    def __init__(self, parameters: list[nn.Parameter], processes: Processes, dtype: torch.dtype):
        self.parameters, self.processes, self.dtype = parameters, processes, dtype
        several = processes.world > 1
        self.overlaps = several and sum(p.nbytes for p in parameters) > BUCKET  # else it is one bucket
        self.came: list[nn.Parameter] = []  # parameters in the order of their gradients in the first update
        self.buckets: list[list[nn.Parameter]] = []
        self.bucket_of: dict[nn.Parameter, int] = {}
        self.missing: list[int] | None = None  # gradients of each bucket, in the last backward pass alone
        self.sent: list[tuple[dist.Work, list[Tensor]]] = []
        for p in parameters if several else ():
            p.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """Say that the next backward pass is the last of its update, after which gradients are complete."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def finish(self, loss: Tensor) -> Tensor:
        """Send what the backward pass has not, and wait for all. Returns the mean of the loss. A parameter
        keeps no gradient if it has none in any process; where only some have none, theirs counts as 0."""
        if self.processes.world == 1:
            return loss
        if not self.buckets:
            self._form_buckets()
        absent = [i for i, p in enumerate(self.parameters) if p.grad is None]
        while len(self.sent) < len(self.buckets):
            self._send()
        shared = torch.ones(1 + len(self.parameters), device=loss.device)
        shared[0] = loss
        if absent:
            shared[1:][absent] = 0
        last = dist.all_reduce(shared, async_op=True)
        for bucket, (work, sums) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            gradients = [p.grad for p in bucket]
            if sums[0].dtype != gradients[0].dtype:
                torch._foreach_copy_(gradients, sums)
            torch._foreach_div_(gradients, self.processes.world)
        last.wait()
        if absent:  # else nothing waits for the GPU
            counts = shared[1:].tolist()
            for i in absent:
                self.parameters[i].grad = self.parameters[i].grad if counts[i] else None
        self.missing, self.sent = None, []
        return shared[0] / self.processes.world

    def _form_buckets(self) -> None:
        number = {p: i for i, p in enumerate(self.parameters)}
        came = dict.fromkeys(self.processes.gather([number[p] for p in self.came])[0])
        order = [*came, *(i for i in range(len(number)) if i not in came)]
        self.buckets = list(buckets([self.parameters[i] for i in order]))
        self.bucket_of = {p: n for n, bucket in enumerate(self.buckets) for p in bucket}

    def _arrived(self, p: nn.Parameter) -> None:
        if self.missing is None:
            return
        if not self.buckets:
            self.came.append(p)
            return
        self.missing[self.bucket_of[p]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        """Start summing the next bucket. Its gradients move into one tensor, with the strides of their
        parameters, or stay, if they are sent in another dtype."""
        bucket = self.buckets[len(self.sent)]
        flat = torch.empty(sum(p.numel() for p in bucket), dtype=self.dtype, device=bucket[0].device)
        parts = flat.split([p.numel() for p in bucket])
        parts = [part.as_strided(p.shape, p.stride()) for p, part in zip(bucket, parts, strict=True)]
        for p in bucket:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch._foreach_copy_(parts, [p.grad for p in bucket])
        if self.dtype == bucket[0].dtype:
            for p, part in zip(bucket, parts, strict=True):
                p.grad = part
        self.sent.append((dist.all_reduce(flat, async_op=True), parts))

    # Where each process has everything; in `sharding.Sharding` it has parts.

    def norm(self, own: Tensor) -> Tensor:
        """The norm of the gradients; `own` is that of this process's."""
        return own

    def scaler(self, kind: str, enabled: bool) -> torch.amp.GradScaler:
        """For gradients on this kind of device."""
        return torch.amp.GradScaler(kind, enabled=enabled)

    def whole(self) -> AbstractContextManager:
        """Within it, which all processes enter, each has whole networks."""
        return nullcontext()

    def joined(self, key: str, own: Tensor) -> Tensor:
        """A tensor of a checkpoint, `key` being NAME or NAME|KEY there, of what this process has of it."""
        return own

    def part(self, key: str, whole: Tensor) -> Tensor:
        """What this process has of a tensor of a checkpoint."""
        return whole
