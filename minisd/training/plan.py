"""--plan: what an update will take, by making it without numbers: torch's fake tensors have shapes alone.

The method's own code runs, on the CPU: it loads (configs without weights), builds, draws a batch and trains.
What an operation takes for itself while it runs is not seen.
"""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from copy import copy
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minisd import files, ops
from minisd.data import source
from minisd.data.order import Stream, collate
from minisd.device import has_fast_bf16
from minisd.formats import config_json, diffusers, parts
from minisd.methods._base import Method
from minisd.options import Run, Training
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.spelling import UNITS, bytes_in
from minisd.training import optim
from minisd.training.distributed import Processes
from minisd.training.loop import saving, spelled
from minisd.training.step import Trainer

KINDS = WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
GB = UNITS["GB"]
FLOPS = {operation.__name__: formula for operation, formula in flop_registry.items()}


class Meter(TorchDispatchMode):
    """Follows the bytes of fake tensors, `now` and at the `peak`, by KINDS, and counts floating-point
    operations, `flops`. While `faking`, all new tensors are fake."""

    def __init__(self):
        super().__init__()
        self.fake, self.faking = FakeTensorMode(allow_non_fake_inputs=True), True
        self.kinds: dict[int, str] = {}  # of the storages that are alive
        self.now, self.peak, self.flops, self.encoding = Counter(), Counter(), 0, False
        self.copied = 0  # bytes of a checkpoint

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.fake if self.faking else nullcontext():
            out = func(*args, **(kwargs or {}))
        # The CPU's attention has no formula of its own, and takes the same products.
        if formula := FLOPS.get(func._overloadpacket.__name__.replace("_for_cpu", "")):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        self.count(ACTIVATIONS, *tree_leaves(out))
        return out

    def count(self, kind: str, *tensors: object, again: bool = False) -> None:
        """Count the memory of tensors as of a kind, also of those that have one if `again`."""
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, FakeTensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.kinds:
                weakref.finalize(storage, self._free, key, size)
            elif again:
                self.now[self.kinds[key]] -= size
            else:
                continue
            self.kinds[key] = kind
            self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _free(self, key: int, size: int) -> None:
        self.now[self.kinds.pop(key)] -= size

    def begin(self) -> None:
        """Start over. What is left of earlier activations is the optimizer's state, or an average."""
        self.kinds = {key: OPTIMIZER if k == ACTIVATIONS else k for key, k in self.kinds.items()}
        self.now[OPTIMIZER] += self.now.pop(ACTIVATIONS, 0)
        self.peak, self.flops = self.now.copy(), 0


class EightBit(optim.AdamW):
    """The memory of bitsandbytes' AdamW: fp32 for less than 4096 parameters, else bytes in blocks of 256."""

    def step(self, clip_divisor: Tensor | None = None) -> None:
        for p in self.each:
            if p not in self.state and p.numel() >= 4096:
                state = [torch.zeros_like(p, dtype=torch.uint8) for _ in range(2)]
                self.state[p] = {"state": state, "absmax": torch.zeros(2, p.numel() // 256)}
            self.slot(p)


def trace(kind: type[Method], options: Run, read: Callable, gpu: bool) -> Meter:
    """The meter of an update with these options, of the data that `read` gives, on a `gpu` or a CPU."""
    passes, meter = options.gradient_accumulation_steps, Meter()
    plain = {"gradient_accumulation_steps": 1, "compile": False, "kernels": "torch", "graph": "off"}
    o = changed(options, plain)
    if offloaded := gpu and getattr(o, "offload_ema", False) and o.use_ema:
        o.use_ema = False
    method = kind(o, torch.device("cpu"))
    method.read = read
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for replacement in replaced(method, meter, gpu):
            stack.enter_context(patch.object(*replacement))
        with meter.fake:
            trained = method.setup()
        dataset, _ = method.datasets()
        with meter:
            trainer = Trainer(method, trained, len(dataset), Processes())
        for network in trainer.networks:
            meter.count(WEIGHTS, *network.parameters(), *network.buffers())
        meter.count(WEIGHTS, *trained.values())
        batch = first_batch(method, dataset, meter, gpu)
        encoding = meter.peak
        with meter:
            for p in trained.values():
                p.register_post_accumulate_grad_hook(lambda p: meter.count(GRADIENTS, p.grad, again=True))
                p.grad = torch.empty_like(p)
                meter.count(GRADIENTS, p.grad, again=True)
            trainer.optimizer.step()  # makes its state
            if passes == 1:  # otherwise the last of them is traced, which adds to gradients that are there
                trainer.optimizer.zero_grad()
            meter.begin()
            meter.copied = (1 + offloaded) * sum(p.nbytes for p in trained.values()) + meter.now[OPTIMIZER]
            trainer.update(iter([batch]))
    meter.flops *= passes
    meter.encoding = encoding.total() > meter.peak.total()
    meter.peak = encoding if meter.encoding else meter.peak
    return meter


def replaced(method: Method, meter: Meter, gpu: bool) -> Iterator[tuple]:
    """What is replaced in a plan, as (object, name, by what): networks get shapes without numbers. A batch is
    drawn with numbers, and without them from there on."""
    inputs, read = method.inputs, source.read

    def emptied(network: nn.Module, *_) -> nn.Module:
        with meter.fake:
            return network.to_empty(device="cpu")

    def load_part(folder, part: str, weights: str = "") -> nn.Module:
        return emptied(parts.build(part, config_json.read(folder, part), folder / "config.json"))

    def inputs_empty(batch: dict) -> dict:
        meter.faking = False
        made, meter.faking = inputs(batch), True
        fakes = {k: meter.fake.from_tensor(v) for k, v in made.items() if type(v) is Tensor}
        meter.count(ACTIVATIONS, *fakes.values())
        return made | fakes

    def read_classes(location, *, flag: str, **how) -> source.Source:
        try:
            return read(location, flag=flag, **how)
        except ValueError:
            if flag != "--class_data_dir":
                raise
            return method.read()  # these images are not drawn yet, and will be as large

    yield diffusers, "choose", lambda names, *_: {part: [""] for part in names}
    yield diffusers, "load_part", load_part
    yield parts, "fill", emptied
    yield StableDiffusion, "exact", lambda sd, part, name, tensor: tensor
    yield nn.Module, "_apply", apply
    yield source, "read", read_classes
    yield files, "read_with_metadata", unset_fake_temporarily()(files.read_with_metadata)
    yield method, "inputs", inputs_empty
    if method.options.use_8bit_adam:
        zeros = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        yield optim, "new", lambda parameters, _: EightBit(parameters, **zeros)
    if gpu:
        yield ops, "watcher", attend


def apply(network: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot exchange fake parameters."""
    for module in network.modules() if recurse else [network]:
        for name, p in module._parameters.items():
            if p is not None and (new := function(p)) is not p:
                module._parameters[name] = nn.Parameter(new, p.requires_grad)
        module._buffers.update({name: function(b) for name, b in module._buffers.items() if b is not None})
    return network


def attend(*qkv: Tensor) -> Tensor:
    """ops.attention without what it does on a CPU alone."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)


def first_batch(method: Method, dataset, meter: Meter, gpu: bool) -> dict:
    """The first batch of the data, with empty latents if a run would encode them at its start."""
    o, stream = method.options, Stream(dataset, method.options.seed)
    stream.arrange(o.train_batch_size)
    batch = collate([stream[k] for k in range(o.train_batch_size)])
    if isinstance(o, Training) and o.cache_latents and dataset.views() is not None:
        pixels = batch.pop("pixels")
        with meter:
            together = len(pixels) if gpu and not o.deterministic else 1
            encoded = [method.sd.encode_images(part) for part in pixels.split(together)]
            batch["mean"], batch["std"] = map(torch.cat, zip(*encoded, strict=True))
    return batch


def report(kind: type[Method], options: Run) -> int:
    """Print what an update takes, and if that is more than --memory, the flags that make it fit and cost the
    least time. ValueError if none do."""
    gpu = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).type != "cpu"
    limit = bytes_in(options.memory) if options.memory else math.inf
    if gpu and options.mixed_precision == "fp16":  # which the CPU's fake tensors have not, and takes the same
        options = changed(options, {"mixed_precision": "bf16"})
    read = kind(options, torch.device("cpu")).read

    def tried(*changes: dict) -> int:
        o = changed(options, *changes)
        meter, size = trace(kind, o, read, gpu), o.train_batch_size * o.gradient_accumulation_steps
        parts = ", ".join(f"{kind} {meter.peak[kind] / GB:.2f}" for kind in KINDS)
        parts += ", while images are encoded" if meter.encoding else ""
        work = f"{meter.flops / 1e12:.3g} TFLOP for {size} images"
        if o.checkpointing_steps and o.background_checkpoints:
            work += f"; a checkpoint's copy takes {meter.copied / GB:.2f} GB of CPU memory"
        print(
            f"{spelled(*changes) or 'these flags'}: {meter.peak.total() / GB:.2f} GB ({parts}), {work}",
            flush=True,
        )
        return meter.peak.total()

    chosen, least = (), tried()
    # bitsandbytes does not run on a CPU, and most of those take longer in bf16.
    able = [c for c in saving(options) if gpu or "use_8bit_adam" not in c]
    able.sort(key=lambda c: not gpu and not has_fast_bf16("cpu") and "mixed_precision" in c)
    for change in able:
        if least > limit:
            more = *(c for c in chosen if c.keys() != change.keys()), change
            if (size := tried(*more)) < least:
                chosen, least = more, size
    if least > limit:
        flags = spelled(*chosen) or "these flags"
        least = f"{least / GB:.2f} GB with {flags}, and less with a smaller --resolution"
        raise ValueError(f"--memory {options.memory} is too little: the least is {least}")
    for change in chosen[-2::-1]:  # beside the last one, earlier ones may not be needed, or not as much
        rest = [c for c in chosen if c is not change]
        alike = [[c] for c in able[: able.index(change)] if c.keys() == change.keys()]
        chosen = next((f for less in ([], *alike) if tried(*(f := (*less, *rest))) <= limit), chosen)
    if chosen:
        print(f"fits into {options.memory}: {spelled(*chosen)}")
    return 0


def changed(options: Run, *changes: dict) -> Run:
    """The options with other values of some flags."""
    o = copy(options)
    for change in changes:
        vars(o).update(change)
    return o
