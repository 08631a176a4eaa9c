"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the network as a scheduler sees it."""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor


@dataclass(kw_only=True)
class Branch:
    """One of the predictions that are summed, with its weight and what the UNet gets for it."""

    weight: float
    context: Tensor  # (b, s, d)


def text_branches(context: Tensor, negative: Tensor | None, guidance_scale: float) -> list[Branch]:
    """pred = negative + scale (text - negative), as weights; at a scale of 1 or less the text alone."""
    if guidance_scale <= 1 or negative is None:
        return [Branch(weight=1.0, context=context)]
    return [
        Branch(weight=1 - guidance_scale, context=negative),
        Branch(weight=guidance_scale, context=context),
    ]


class Denoiser:
    """denoise(x, t): the weighted sum of all branches, computed in one batch. x and the result are fp32."""

    def __init__(self, unet: nn.Module, branches: list[Branch]):
        self.unet = unet
        self.weights = [branch.weight for branch in branches]
        self.context = torch.cat([branch.context for branch in branches])  # (branches * b, s, d)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        inputs = torch.cat([x] * len(self.weights)).to(self.context.dtype)
        timesteps = torch.full((len(inputs),), t, device=x.device)
        preds = self.unet(inputs, timesteps, self.context).float().chunk(len(self.weights))
        return sum(weight * pred for weight, pred in zip(self.weights, preds, strict=True))
