"""Look into the UNet while it works: attention and features by layer and step, to read or to replace.

with sd.watch("attn2", steps=range(10)) as seen:
    sd.generate("a cat on a chair")
seen[0].layer, seen[0].step, seen[0].value  # maps (images, tokens, 16, 16)
"""

import re
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minisd import ops
from minisd.models.layers import Attention, SelfAttention2d
from minisd.options import require
from minisd.sampling.pixel_diffusion import PixelDiffusion
from minisd.sampling.stable_diffusion import StableDiffusion


@dataclass(eq=False)
class Seen:
    """What a layer did in one call of the network. The rows of a batch are those of guidance's branches, one
    branch after the other, the prompt's last."""

    layer: str  # its name in the UNet, such as mid_block.attentions.0.transformer_blocks.0.attn2
    kind: str  # "self", "cross", or "features" of what is no attention
    step: int  # of sampling; elsewhere the number of the network's call
    timestep: float  # of the first row
    branches: int
    size: tuple[int, int]  # height and width of the network's input
    output: Tensor  # (rows, n, nh, hd) of attention, else what the layer returns
    q: Tensor | None = None  # (rows, n, nh, hd)
    k: Tensor | None = None  # (rows, m, nh, hd)
    v: Tensor | None = None
    value: object = None  # what `keep` returned

    @property
    def probabilities(self) -> Tensor:
        """softmax(q k^T / sqrt(hd)), (rows, nh, n, m), in fp32."""
        q, k = self.q.float().transpose(1, 2), self.k.float().transpose(1, 2)  # (rows, nh, n or m, hd)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)

    def maps(self, side: int | None = 16) -> Tensor:
        """How much each place attends to each key, on average over the heads, for the images of the last
        branch: (images, m, h, w), with the longer of h and w `side`, or with `side` None as computed."""
        images = len(self.q) // self.branches
        p = self.probabilities[-images:].mean(dim=1)  # (images, n, m)
        h, w = self.size
        while h * w > p.shape[1]:  # each level halves the sides, rounded up
            h, w = (h + 1) // 2, (w + 1) // 2
        p = p.mT.unflatten(2, (h, w))  # (images, m, h, w)
        scale = side / max(h, w) if side else 1
        size = round(h * scale), round(w * scale)
        return p if scale == 1 else F.interpolate(p, size, mode="bilinear", antialias=True)


def kept(seen: Seen) -> Tensor:
    """What is kept of a layer by default: 16x16 maps of attention; features as they are."""
    return seen.output if seen.kind == "features" else seen.maps()


@contextmanager
def watch(
    model: StableDiffusion | PixelDiffusion,
    layers: str = "attn2",
    *,
    steps: Container[int] | None = None,
    keep: Callable[[Seen], object] | None = kept,
    replace: Callable[[Seen], Tensor | None] | None = None,
) -> Iterator[list[Seen]]:
    """Inside the `with`, look at the layers of the model's UNet whose names end as the regular expression
    `layers` says: "attn2" is all cross-attention, "attn1" all self-attention, "up_blocks.1" a block. The list
    that it yields gets a record for each of them in each of `steps`, by default in all, in order.

    `keep(seen)` says what a record holds as `value`, so that memory stays small: q, k, v and the output are
    let go. `replace(seen)` may return another output, and None leaves it. If nothing is replaced, nothing
    changes, to the bit. With gradient checkpointing a layer is seen again in the backward.

    CUDA graphs and --compile are off inside, and it says so. Layers that were never called, such as the norm
    of a fused sum, are named at the end. ValueError if there is no such layer.
    """
    watcher = _Watcher(steps, keep, replace)
    named = ((n, m) for n, m in model.unet.named_modules() if n and re.fullmatch(rf"(.*\.)?({layers})", n))
    # Lists of layers have no forward
    modules = {name: module for name, module in named if type(module).forward is not nn.Module.forward}
    require(modules, f"no layer of the UNet has a name that ends in {layers!r}")
    require(ops.watcher is None, "watch: one at a time; a regular expression such as attn1|attn2 takes both")
    compiled = model.unet._compiled_call_impl
    if compiled:
        print("watch: --compile is off inside", file=sys.stderr)
    with ExitStack() as hooks:
        hooks.enter_context(model.unet.register_forward_pre_hook(watcher.begin))
        for name, module in modules.items():
            hooks.enter_context(watcher.hook(name, module))
        ops.watcher, model.unet._compiled_call_impl = watcher, None
        try:
            yield watcher.seen
        finally:
            ops.watcher, model.unet._compiled_call_impl = None, compiled
    if watcher.calls and (missed := [name for name in modules if name not in watcher.called]):
        print(f"watch: never called: {', '.join(missed)}", file=sys.stderr)


class _Watcher:
    """The hooks, and where in the network's work they are."""

    def __init__(self, steps, keep, replace):
        self.steps, self.keep, self.replace = steps, keep, replace
        self.seen: list[Seen] = []
        self.calls, self.called = 0, set()  # of the network, and of which layers
        self.run: tuple[int, int] | None = None  # step and branches of guidance, from who samples
        self.inside: tuple[str, str] | None = None  # (layer, kind) of the attention that is at work
        self.place: dict[str, object] = {}

    def hook(self, name: str, module: nn.Module) -> RemovableHandle:
        if isinstance(module, Attention | SelfAttention2d):
            return module.register_forward_pre_hook(lambda module, args: self.enter(name, args))
        return module.register_forward_hook(lambda module, args, output: self.look(name, "features", output))

    def begin(self, unet: nn.Module, args: tuple) -> None:
        x, timesteps = args[:2]
        (step, branches), self.run = self.run or (self.calls, 1), None
        self.calls += 1
        size = tuple(x.shape[-2:])
        self.place = {"step": step, "timestep": float(timesteps[0]), "branches": branches, "size": size}

    def enter(self, name: str, args: tuple) -> None:
        self.inside = name, "cross" if len(args) > 1 and args[1] is not None else "self"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if self.inside is None:
            return None
        (name, kind), self.inside = self.inside, None
        output = ops.attention(q, k, v)
        new = self.look(name, kind, output, q=q, k=k, v=v)
        return output if new is None else new

    def look(self, layer: str, kind: str, output: Tensor, **inputs: Tensor) -> Tensor | None:
        if not self.calls:  # keys and values of the text are computed before, and once
            return None
        self.called.add(layer)
        if self.steps is not None and self.place["step"] not in self.steps:
            return None
        seen = Seen(layer=layer, kind=kind, output=output, **self.place, **inputs)
        new = self.replace(seen) if self.replace else None
        seen.value = self.keep(seen) if self.keep else None
        seen.q = seen.k = seen.v = seen.output = None
        self.seen.append(seen)
        return new
