"""--shard fsdp: weights, gradients, averages and the optimizer's state in parts, one in each process.

By torch's fully_shard, which is ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054): each tensor is cut along
its first dimension. A block gets its whole weights from all processes when it computes, and gives them the
means of its gradients. What updates the parts sees plain tensors, in the same memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from minisd.models.blocks import Block
from minisd.options import require
from minisd.training.distributed import Processes


def blocks(network: nn.Module) -> list[nn.Module]:
    """What gets its weights at once, inner ones first, and last the network, with those that are left. A
    level of a UNet is not among them, but its own blocks are."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    found = [b for blocks in lists for b in blocks if any(b.children()) and not isinstance(b, Block)]
    return [*reversed(found), network]


class Sharding:
    """As `averaging.Averaging`, for networks of which everything trains. In `trained`, parameters are
    replaced by this process's parts. ValueError if something trains in another network."""

    overlaps = True

    def __init__(
        self,
        networks: list[nn.Module],
        trained: dict[str, nn.Parameter],
        processes: Processes,
        dtype: torch.dtype,
    ):
        self.processes, self.trained = processes, trained
        names = {p: name for name, p in trained.items()}
        self.networks = [n for n in networks if (own := {*n.parameters()}) and own <= names.keys()]
        within = {names[p] for n in self.networks for p in n.parameters()}
        alone = next((name for name in trained if name not in within), None)
        require(alone is None, f"--shard is for networks that train as a whole, and {alone} is in none")
        mesh = init_device_mesh(next(iter(names)).device.type, (processes.world,))
        policy = MixedPrecisionPolicy(reduce_dtype=dtype)
        self.divided: dict[str, DTensor] = {}
        for network in self.networks:
            own = [names[p] for p in network.parameters()]
            network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
            for block in blocks(network):
                fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            self.divided |= zip(own, network.parameters(), strict=True)
        trained |= {name: nn.Parameter(p.to_local().detach()) for name, p in self.divided.items()}

    def begin(self) -> None:
        """Nothing: each backward pass averages its gradients, and adds them to those before."""

    def finish(self, loss: Tensor) -> Tensor:
        """Give the parts their gradients. Returns the mean of the loss."""
        for name, p in self.divided.items():
            self.trained[name].grad, p.grad = None if p.grad is None else p.grad.to_local(), None
        dist.all_reduce(loss)
        return loss / self.processes.world

    def norm(self, own: Tensor) -> Tensor:
        square = own.square()
        dist.all_reduce(square)
        return square.sqrt()

    def scaler(self, kind: str, enabled: bool) -> ShardedGradScaler:
        return ShardedGradScaler(kind, enabled=enabled, process_group=dist.group.WORLD)

    @contextmanager
    def whole(self) -> Iterator[None]:
        modules = [m for network in self.networks for m in network.modules()]
        divided = [m for m in modules if isinstance(m, FSDPModule)]
        for m in divided:
            m.set_reshard_after_forward(False, recurse=False)
            m.unshard()
        for m in modules:
            m._state_dict_pre_hooks.clear()  # fully_shard's, which would divide it again
        try:
            yield
        finally:
            for m in divided:
                m.set_reshard_after_forward(True, recurse=False)
                m.reshard()

    def joined(self, key: str, own: Tensor) -> Tensor:
        name = key.partition("|")[0]
        if name not in self.divided or own.shape != self.trained[name].shape:  # such as a count of updates
            return own
        p = self.divided[name]
        return DTensor.from_local(own, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

    def part(self, key: str, whole: Tensor) -> Tensor:
        name, rank = key.partition("|")[0], self.processes.rank
        if name not in self.divided or whole.shape != self.divided[name].shape:
            return whole
        rows = -(-len(whole) // self.processes.world)
        return whole[rank * rows : (rank + 1) * rows]
