"""Random draws from a generator; where the generator's seed comes from is for order.py to say."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from minisd import noise

T = TypeVar("T")


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with that probability."""
    return torch.rand((), generator=generator).item() < probability


def choice(options: Sequence[T], generator: torch.Generator) -> T:
    """One of the options, all equally likely."""
    return options[torch.randint(len(options), (), generator=generator).item()]


def between(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (), generator=generator).item()


def subset(total: int, count: int | None, seed: int, purpose: str) -> list[int]:
    """`count` of the numbers below `total`, ascending, a function of (seed, purpose); all if count is
    None."""
    return sorted(torch.randperm(total, generator=noise.generator(seed, purpose))[:count].tolist())
