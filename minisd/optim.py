"""The optimizer, the curve of its learning rate, and clipping. Everything is counted in optimizer updates."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def adamw(parameters: Iterable[torch.nn.Parameter], options) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with the flags' settings."""
    return torch.optim.AdamW(
        list(parameters),
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


def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
    """The global norm of the gradients, before they were scaled down to `max_norm`; 0 only measures."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
