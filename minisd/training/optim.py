"""The optimizer, its learning rate schedule, gradient clipping, and the average of what it trains."""

import ast
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from minisd import registry
from minisd.device import swapped
from minisd.files import first_line
from minisd.options import Average, Optimizer, require


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for all tensors at once, with the state of
    torch.optim.AdamW, which would import torch's compiler: 140 MB that nothing here uses."""

    # So GradScaler sets `found_inf` to a tensor, 1 if this step is to change nothing, and waits for no GPU.
    _step_supports_amp_scaling, found_inf = True, None

    def __init__(self, parameters: list, *, lr: float, betas, eps: float, weight_decay):
        """Of a list of parameters, or of groups of them, each with its "params" and further entries."""
        groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
        self.param_groups = [{"lr": lr} | group for group in groups]
        parameters = [p for group in groups for p in group["params"]]
        self.settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        self.state: dict[torch.nn.Parameter, dict[str, Tensor]] = {}
        # Number of updates of each parameter, in one tensor: a single addition if all of them are updated.
        self.steps = torch.zeros(len(parameters), device=parameters[0].device)
        self.each = dict(zip(parameters, self.steps.unbind(), strict=True))

    def slot(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, which is 0 before its first update."""
        if p not in self.state:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": self.each[p]} | zeros
        return self.state[p]

    @torch.no_grad()
    def step(self, clip_divisor: Tensor | None = None) -> None:
        """Move along the gradients, which are first divided by `clip_divisor`."""
        end = 0
        for group in self.param_groups:
            first, end = end, end + len(group["params"])
            numbers = [i for i, p in enumerate(group["params"], first) if p.grad is not None]
            moved = [group["params"][i - first] for i in numbers]
            if not moved:
                continue
            slots = [self.slot(p) for p in moved]
            steps, means, squares = ([slot[k] for slot in slots] for k in ("step", "exp_avg", "exp_avg_sq"))
            counted = slice(first, end) if len(moved) == end - first else numbers
            self.steps[counted] += 1 if self.found_inf is None else 1 - self.found_inf
            # The kernel runs over memory, so gradients need the strides of their parameters.
            gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
                         for p, g in ((p, p.grad) for p in moved)]  # fmt: skip
            further = {"lr": group["lr"], "grad_scale": clip_divisor, "amsgrad": False, "maximize": False}
            further |= {"found_inf": self.found_inf} | self.settings
            torch._fused_adamw_(moved, gradients, means, squares, [], steps, **further)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.each:
            p.grad = None


class Outside:
    """What a class of torch.optim.Optimizer, as the second base, needs besides for the loop."""

    def step(self, clip_divisor: Tensor | None = None) -> None:
        """As AdamW's."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if clip_divisor is not None and gradients:
            torch._foreach_div_(gradients, clip_divisor)
        super().step()


def new(parameters: list, options: Optimizer) -> AdamW | Outside:
    """The optimizer of the options, for a list of parameters or of groups of them. ValueError, naming the
    flag, for a class or an argument that is none."""
    o, path, flag = options, options.optimizer, f"--optimizer {options.optimizer}"
    args = {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_epsilon, "weight_decay": o.adam_weight_decay}
    if o.use_8bit_adam:
        path, flag = "bitsandbytes.optim.AdamW8bit", "--use_8bit_adam (pip install 'minisd[8bit]')"
        registry.admit(path)
    elif not path:
        return AdamW(parameters, lr=o.learning_rate, **args)
    else:
        args = dict(map(argument, o.optimizer_args))
    try:
        require("." in path, "give MODULE.CLASS, such as torch.optim.SGD")
        kind = registry.find_class(path)
        fits = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        fits = fits and kind not in (torch.optim.LBFGS, torch.optim.SparseAdam)
        fits = fits and not hasattr(kind, "eval")  # of schedule-free ones
        require(fits, "it is no torch.optim.Optimizer whose step() is all that an update needs")
        return type(kind.__name__, (Outside, kind), {})(parameters, lr=o.learning_rate, **args)
    except Exception as e:  # of the class
        raise ValueError(f"{flag}: {first_line(e)}") from e


def argument(text: str) -> tuple[str, object]:
    """Name and value of NAME=VALUE, a value of Python. ValueError, naming the flag, if it is none."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"--optimizer_args {text}: give NAME=VALUE, such as nesterov=True") from None


def grouped(trained: dict[str, torch.nn.Parameter], options: Optimizer, scale: float) -> list[dict]:
    """The groups of what trains, each with its peak learning rate, multiplied by `scale`, and the name under
    which the rate is logged."""
    own = getattr(options, "text_encoder_lr", None)
    text = [p for name, p in trained.items() if own and name.startswith("text_encoder.")]
    rest = [p for name, p in trained.items() if not own or not name.startswith("text_encoder.")]
    groups = ("lr", options.learning_rate, rest), ("text_encoder_lr", own, text)
    return [{"params": ps, "logged": name, "peak": peak * scale} for name, peak, ps in groups if ps]


def lr_factor(options: Optimizer, step: int, total: int, peak: float) -> float:
    """The factor of the learning rate, at most `peak`, in update `step` of `total`, the first being 0."""
    name, warmup = options.lr_scheduler, options.lr_warmup_steps
    if step < warmup and name != "constant":
        return step / warmup
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if name in ("cosine", "cosine_with_restarts"):  # half waves, down to 0
        waves = progress * (options.lr_num_cycles if name == "cosine_with_restarts" else 1)
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (waves % 1)))
    end = 1e-7  # of polynomial
    return ((peak - end) * (1 - min(1.0, progress)) ** options.lr_power + end) / peak


def grad_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor | None:
    """What to divide gradients of this norm by so that it is at most `max_norm`; None for max_norm 0."""
    return ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm > 0 else None


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

    def applied(self) -> AbstractContextManager:
        """Within the context, the parameters have the averaged values."""
        return swapped(self.parameters, self.average)
