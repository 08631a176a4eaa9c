"""The optimizer, the curve of its learning rate, clipping and averaging: all counted in optimizer updates."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), for all tensors at once; the state is named as
    torch's is. Calling torch.optim.AdamW would import its compiler: 140 MB, to say that nothing is compiled.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, betas, eps: float, weight_decay):
        self.param_groups = [{"params": parameters, "lr": lr}]
        self.settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        self.state: dict[torch.nn.Parameter, dict[str, Tensor]] = {}
        # How often each parameter has moved, in one tensor: where all move that is one addition.
        self.steps = torch.zeros(len(parameters), device=parameters[0].device)
        self.each = self.steps.unbind()

    @torch.no_grad()
    def step(self, shrink: Tensor | None = None) -> None:
        """Move along the gradients, which are divided by `shrink` first."""
        group = self.param_groups[0]
        numbers = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        moved = [group["params"][i] for i in numbers]
        for p in moved:
            if p not in self.state:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if moved:
            steps = [self.each[i] for i in numbers]
            means, squares = ([self.state[p][k] for p in moved] for k in ("exp_avg", "exp_avg_sq"))
            self.steps[slice(None) if len(moved) == len(self.steps) else numbers] += 1
            # The kernel goes through memory: values of one place have to be of one element.
            gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
                         for p, g in ((p, p.grad) for p in moved)]  # fmt: skip
            further = {"lr": group["lr"], "grad_scale": shrink, "amsgrad": False, "maximize": False}
            torch._fused_adamw_(moved, gradients, means, squares, [], steps, **self.settings, **further)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict:
        """As torch's: the state by the parameters' numbers."""
        group = self.param_groups[0]
        numbered = [(i, p) for i, p in enumerate(group["params"]) if p in self.state]
        slots = {i: self.state[p] | {"step": self.each[i].clone()} for i, p in numbered}
        return {"state": slots, "param_groups": [{"lr": group["lr"]}]}

    def load_state_dict(self, state: dict) -> None:
        parameters = self.param_groups[0]["params"]
        self.state = {}
        self.steps.zero_()
        for i, slot in state["state"].items():
            p = parameters[i]
            self.steps[i] = slot["step"]
            self.state[p] = {k: slot[k].to(p.device) for k in ("exp_avg", "exp_avg_sq")}


def eight_bit():
    """The class of bitsandbytes' AdamW, whose state is then tensors by name and nothing else, as AdamW's is.
    ValueError if it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("--use_8bit_adam: not installed (pip install 'minisd[8bit]')") from None

    class Flat(AdamW8bit):
        def step(self, shrink: Tensor | None = None) -> None:
            if shrink is not None:
                gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
                torch._foreach_div_(gradients, shrink)
            super().step()

        def state_dict(self) -> dict:
            state = super().state_dict()
            for slot in state["state"].values():
                for key in [k for k, v in slot.items() if isinstance(v, dict)]:
                    slot.update(slot.pop(key))
            return state

        def load_state_dict(self, state: dict) -> None:
            slots = {i: slot | {"step": int(slot["step"])} for i, slot in state["state"].items()}
            super().load_state_dict(state | {"state": slots})

    return Flat


def adamw(parameters: list[torch.nn.Parameter], options) -> AdamW:
    """The optimizer with the flags' settings, or bitsandbytes' if they ask for that."""
    kind = eight_bit() if options.use_8bit_adam else AdamW
    return kind(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )


def lr_factor(
    name: str, step: int, *, warmup: int, total: int, lr: float, cycles: float, power: float
) -> float:
    """What the learning rate is multiplied by at update `step` of `total`, the first being 0."""
    if name == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if name == "constant_with_warmup":
        return 1.0
    if name == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if name == "cosine":  # half a wave, down to 0
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1))))
    if name == "polynomial":
        end = 1e-7
        return ((lr - end) * (1 - min(1.0, progress)) ** power + end) / lr
    raise ValueError(f"--lr_scheduler {name} is unknown")


def norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The global norm of the gradients."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def shrink(norm: Tensor, max_norm: float) -> Tensor | None:
    """What gradients of that norm are divided by to have `max_norm` at most; 0 lets them be."""
    return ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm > 0 else None


class EMA:
    """An average of the parameters over the updates, in which the last ones count most.

    The decay of update s is (1 + s) / (10 + s), or with `warmup` 1 - (1 + s / inv_gamma)^-power, and at most
    `max_decay`; the first update copies.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], options):
        self.parameters = parameters
        self.options = options
        device = "cpu" if options.offload_ema else None
        self.average = [p.detach().to(device, copy=True) for p in parameters]

    def decay(self, step: int) -> float:
        """Of update number `step`, the first being 1."""
        o, s = self.options, step - 1
        if s <= 0:
            return 0.0
        d = 1 - (1 + s / o.ema_inv_gamma) ** -o.ema_power if o.ema_warmup else (1 + s) / (10 + s)
        return min(max(d, 0.0), o.ema_max_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        now = [p.to(a.device) for p, a in zip(self.parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, now, 1 - self.decay(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the averaged ones."""
        kept = [p.data for p in self.parameters]
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data = a.to(p.device)
        try:
            yield
        finally:
            for p, data in zip(self.parameters, kept, strict=True):
                p.data = data
