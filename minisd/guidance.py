"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the network as a scheduler sees it."""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from minisd.models.layers import Context


@dataclass(kw_only=True)
class Branch:
    """One of the predictions that are summed, with its weight and what the UNet gets for it."""

    weight: float
    context: Tensor  # (b, s, d)
    original: Tensor | None = None  # (b, c, h, w), input channels behind those of x


@dataclass(kw_only=True)
class Control:
    """A ControlNet, its picture (b, 3, H, W) in [0, 1], and how much it has to say."""

    network: nn.Module
    hint: Tensor
    scale: float = 1.0


def text_branches(context: Tensor, negative: Tensor | None, guidance_scale: float) -> list[Branch]:
    """pred = negative + scale (text - negative), as weights; at a scale of 1 or less the text alone."""
    if guidance_scale <= 1 or negative is None:
        return [Branch(weight=1.0, context=context)]
    return [
        Branch(weight=1 - guidance_scale, context=negative),
        Branch(weight=guidance_scale, context=context),
    ]


def image_branches(
    context: Tensor,
    negative: Tensor,
    original: Tensor,
    guidance_scale: float,
    image_guidance_scale: float,
) -> list[Branch]:
    """pred = e(0, 0) + s_img (e(img, 0) - e(0, 0)) + s_txt (e(img, txt) - e(img, 0)), as weights (Brooks et
    al. 2022, arXiv 2211.09800, equation 3); with s_txt at most 1 or s_img below 1, e(img, txt) alone."""
    full = Branch(weight=guidance_scale, context=context, original=original)
    if guidance_scale <= 1 or image_guidance_scale < 1:
        return [replace(full, weight=1.0)]
    return [
        Branch(weight=1 - image_guidance_scale, context=negative, original=torch.zeros_like(original)),
        Branch(weight=image_guidance_scale - guidance_scale, context=negative, original=original),
        full,
    ]


class Denoiser:
    """denoise(x, t): the weighted sum of all branches, computed in one batch. x and the result are fp32.

    A ControlNet steers every branch, the one without a prompt too.
    """

    def __init__(self, unet: nn.Module, branches: list[Branch], control: Control | None = None):
        self.unet = unet
        self.weights = [branch.weight for branch in branches]
        self.context = Context(torch.cat([branch.context for branch in branches]))  # (branches * b, s, d)
        originals = [branch.original for branch in branches if branch.original is not None]
        self.original = torch.cat(originals) if originals else None  # (branches * b, c, h, w)
        self.control = control
        if control:
            hint = control.hint.to(self.context.states)
            self.hint = torch.cat([hint] * len(branches))  # (branches * b, 3, H, W)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        inputs = torch.cat([x] * len(self.weights))
        if self.original is not None:
            inputs = torch.cat([inputs, self.original.to(inputs)], dim=1)  # (branches * b, 2c, h, w)
        inputs = inputs.to(self.context.states.dtype)
        timesteps = torch.full((len(inputs),), t, device=x.device)
        residuals = {}
        if self.control:
            network, scale = self.control.network, self.control.scale
            residuals = network(inputs, timesteps, self.context, self.hint, scale)
        preds = self.unet(inputs, timesteps, self.context, **residuals).float().chunk(len(self.weights))
        return sum(weight * pred for weight, pred in zip(self.weights, preds, strict=True))
