"""The exponential moving average of the trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minisd.options import Average


class EMA:
    """An average of the parameters over the updates, in which the latest ones count most.

    The decay of update s is (1 + s) / (10 + s), or with `warmup` 1 - (1 + s / inv_gamma)^-power, and at most
    `max_decay`; the first update copies.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], options: Average):
        self.parameters = parameters
        self.options = options
        device = "cpu" if options.offload_ema else None
        self.average = [p.detach().to(device, copy=True) for p in parameters]

    def decay(self, step: int) -> float:
        """The decay of update number `step`, the first being 1."""
        o, s = self.options, step - 1
        if s <= 0:
            return 0.0
        d = 1 - (1 + s / o.ema_inv_gamma) ** -o.ema_power if o.ema_warmup else (1 + s) / (10 + s)
        return min(max(d, 0.0), o.ema_max_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after update number `step`."""
        now = [p.to(a.device) for p, a in zip(self.parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, now, 1 - self.decay(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the parameters have the averaged values."""
        kept = [p.data for p in self.parameters]
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data = a.to(p.device)
        try:
            yield
        finally:
            for p, data in zip(self.parameters, kept, strict=True):
                p.data = data
