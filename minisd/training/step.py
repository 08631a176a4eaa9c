"""One update: forward, backward, clip, optimizer, average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from minisd import graph, noise
from minisd.device import DTYPES
from minisd.methods._base import Method
from minisd.models.unet import UNetEncoder
from minisd.options import Average
from minisd.training import optim
from minisd.training.averaging import Averaging
from minisd.training.distributed import Processes


def networks(method: Method) -> list[nn.Module]:
    """Those of a method's model, and its own."""
    return [*method.sd.parts.values(), *(v for v in vars(method).values() if isinstance(v, nn.Module))]


class Trainer:
    """Everything that an update changes. Of `total` updates, `step` are done, with `samples` images.
    `trained` are the parameters by name; `epoch` is the number of images in an epoch."""

    def __init__(self, method: Method, trained: dict[str, nn.Parameter], epoch: int, processes: Processes):
        o = self.options = method.options
        self.method, self.trained, self.processes = method, trained, processes
        self.count = sum(p.numel() for p in trained.values())
        self.networks = networks(method)
        if o.shard:
            from minisd.training.sharding import Sharding  # which takes long to import

            self.averaging = Sharding(self.networks, trained, processes, DTYPES[o.reduce_dtype])
        else:
            self.averaging = Averaging([*trained.values()], processes, DTYPES[o.reduce_dtype])
        self.parameters = list(trained.values())
        self.images_per_update = o.train_batch_size * o.gradient_accumulation_steps * processes.world
        self.updates_per_epoch = math.ceil(epoch / self.images_per_update)
        self.total = o.max_train_steps or o.num_train_epochs * self.updates_per_epoch
        self.step = self.samples = 0
        scale = self.images_per_update * method.lr_scale if o.scale_lr else 1
        self.optimizer = optim.new(optim.grouped(trained, o, scale), o)
        self.scaler = self.averaging.scaler(method.device.type, enabled=method.dtype == torch.float16)
        self.ema = optim.EMA(self.parameters, o) if isinstance(o, Average) and o.use_ema else None
        for network in self.networks if o.compile else ():
            if isinstance(network, UNetEncoder):
                network.compile(dynamic=False)
        self.graphs = graph.Graphs()
        self.gradients: dict[nn.Parameter, Tensor] = {}  # those that the graphs compute

    def update(self, batches: Iterator[dict]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Make one update from the next batches. Returns loss and gradient norm, over all processes, and the
        learning rates, as they are logged."""
        self.method.before_update(self.step)
        rates = {}
        for group in self.optimizer.param_groups:
            factor = optim.lr_factor(self.options, self.step, self.total, group["peak"])
            group["lr"] = rates[group["logged"]] = group["peak"] * factor
        loss_sum = torch.zeros((), device=self.method.device)
        for left in reversed(range(self.options.gradient_accumulation_steps)):
            batch = next(batches)
            # For dropout: each micro-batch has its own stream.
            seed = noise.generator(self.options.seed, "layers", batch["number"][0]).initial_seed()
            torch.manual_seed(seed)
            inputs = self.method.inputs(batch)
            if not left:
                self.averaging.begin()
            loss_sum += self._backward(inputs)
        loss_sum = self.averaging.finish(loss_sum)
        self.scaler.unscale_(self.optimizer)
        norm = self.averaging.norm(optim.grad_norm(self.parameters))
        self.scaler.step(self.optimizer, optim.clip_divisor(norm, self.options.max_grad_norm))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += self.images_per_update
        if self.ema:
            self.ema.update(self.step)
        return loss_sum, norm, rates

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, which all processes enter, networks are whole, and parameters are averages if there are
        any."""
        with self.ema.applied() if self.ema else nullcontext(), self.averaging.whole():
            yield

    def _backward(self, inputs: dict) -> Tensor:
        """Add the gradients of a micro-batch to those of the update. Returns its share of the loss."""
        for p, gradient in self.gradients.items():
            if p.grad is gradient:  # of the micro-batch before; a replay would overwrite it
                p.grad = gradient.clone()
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        # The gradients of a graph come all at once, so that nothing of their averaging is hidden.
        graphed = graph.wanted(self.method.device) and (
            self.options.graph == "on" or not self.averaging.overlaps
        )
        found = self.graphs(self.networks, self._gradients, tensors) if graphed else None
        if found is None:
            if not any(self.graphs.graphs.values()):
                self.gradients = {}
            loss = self._loss(inputs)
            self.scaler.scale(loss).backward()
            return loss.detach()
        sums = [(p.grad, gradient) for p, gradient in self.gradients.items() if p.grad is not None]
        if sums:
            torch._foreach_add_(*map(list, zip(*sums, strict=True)))
        for p, gradient in self.gradients.items():
            p.grad = gradient if p.grad is None else p.grad
        return found[0]

    def _loss(self, inputs: dict) -> Tensor:
        return self.method.loss_of(inputs) / self.options.gradient_accumulation_steps

    def _gradients(self, inputs: dict) -> list[Tensor]:
        """A micro-batch's share of the loss, and its gradients, written to `gradients`: for a graph."""
        loss = self._loss(inputs)
        found = torch.autograd.grad(self.scaler.scale(loss), self.parameters, allow_unused=True)
        found = {p: g for p, g in zip(self.parameters, found, strict=True) if g is not None}
        self.gradients = self.gradients or {p: torch.empty_like(p) for p in found}
        torch._foreach_copy_([*self.gradients.values()], [*found.values()])
        return [loss.detach(), *self.gradients.values()]
