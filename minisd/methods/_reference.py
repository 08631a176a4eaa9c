"""What the methods share whose loss asks what the model predicted before training."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from minisd.methods._base import Method, Module, Parameters, StableDiffusion, Tensor
from minisd.methods._low_rank import LowRank, Updates
from minisd.options import flag, require


class Tuned(Updates):
    """What trains"""

    train: Literal["lora", "full"] = flag("lora", "low-rank updates, or the whole UNet, twice in memory")

    def check(self):
        for name in ("rank", "alpha", "target_modules", "save_format") if self.train == "full" else ():
            require(not self.is_given(name), f"--{name} is of low-rank updates, and --train full has none")


class Reference(LowRank):
    """Trains low-rank updates, whose scale 0 is the reference, or the UNet, of which a copy is kept."""

    def build(self, sd: StableDiffusion) -> Parameters:
        if self.options.train == "full":
            return self.unfreeze_beside(sd)
        return self.insert_updates(sd)

    @functools.cached_property
    def empty(self) -> Tensor:
        """The context (1, s, d) of no prompt."""
        return self.frozen_context([""])

    def insert_updates(self, sd: StableDiffusion) -> Parameters:
        """Train new updates of the UNet."""
        self.insert(sd)
        return {f"{n}.{k}": p for n, u in self.updates.items() for k, p in u.named_parameters()}

    def unfreeze_beside(self, sd: StableDiffusion) -> Parameters:
        """Keep a copy of the UNet, and train it."""
        import copy

        self.before, self.updates = copy.deepcopy(sd.unet), {}
        return self.unfreeze("unet", sd.unet)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within it, the updates have this scale."""
        for update in self.updates.values():
            update.scale = scale
        try:
            yield
        finally:
            for update in self.updates.values():
                update.scale = 1.0

    def predict_before(self, noisy: Tensor, timesteps: Tensor, *contexts: Tensor) -> tuple[Tensor, ...]:
        """`predict_with`, by the model as it was before training, without gradients."""
        import torch

        with torch.no_grad(), self.scaled(0.0):
            unet = self.sd.unet if self.updates else self.before
            return self.predict_with(unet, noisy, timesteps, *contexts)

    def predict_with(
        self, unet: Module, noisy: Tensor, timesteps: Tensor, *contexts: Tensor
    ) -> tuple[Tensor, ...]:
        """The predictions (b, c, h, w) with each of the contexts, (b or 1, s, d), in one batch, in fp32."""
        import torch

        count, context = len(contexts), torch.cat([c.expand(len(noisy), -1, -1) for c in contexts])
        inputs = noisy.to(self.dtype).repeat(count, 1, 1, 1)
        with self.autocast():
            return unet(inputs, timesteps.repeat(count), context).float().chunk(count)

    def describe(self) -> str:
        return super().describe() if self.updates else Method.describe(self)

    def save(self, folder: Path) -> None:
        super().save(folder) if self.updates else Method.save(self, folder)
