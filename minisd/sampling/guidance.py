"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the network as a scheduler sees it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from minisd.models import controlnet
from minisd.models.layers import CachedContext


@dataclass(kw_only=True)
class Branch:
    """One of the predictions that are summed, with its weight and what the UNet gets for it."""

    weight: float
    context: Tensor  # (b, s, d)
    original: Tensor | None = None  # (b, c, h, w), input channels behind those of x


@dataclass(kw_only=True)
class Control:
    """A ControlNet, its picture, and how much it has to say, and when."""

    network: nn.Module
    hint: Tensor  # (b, 3, H, W) in [0, 1]
    scale: float = 1.0
    start: float = 0.0  # from and up to these parts of the steps
    end: float = 1.0
    guess: bool = False  # steer the branch with the prompt alone, and the coarse levels most

    def acts(self, step: int, steps: int) -> bool:
        """Whether it has anything to say at step `step` of `steps`."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


def text_branches(
    context: Tensor, negative: Tensor | None, guidance_scale: float, original: Tensor | None = None
) -> list[Branch]:
    """pred = negative + scale (text - negative), as weights; at a scale of 1 or less the text alone."""
    if guidance_scale <= 1 or negative is None:
        return [Branch(weight=1.0, context=context, original=original)]
    return [
        Branch(weight=1 - guidance_scale, context=negative, original=original),
        Branch(weight=guidance_scale, context=context, original=original),
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

    ControlNets steer every branch, the one without a prompt too, unless they guess. Of the `steps` that their
    starts and ends are parts of, `step` is the one to be taken: it is for the caller to count.
    """

    def __init__(
        self, unet: nn.Module, branches: list[Branch], controls: Sequence[Control] = (), steps: int = 1
    ):
        self.unet = unet
        self.weights = [branch.weight for branch in branches]
        states = torch.cat([branch.context for branch in branches])  # (branches * b, s, d)
        self.context = CachedContext(states)
        originals = [branch.original for branch in branches if branch.original is not None]
        self.original = torch.cat(originals) if originals else None  # (branches * b, c, h, w)
        self.controls = []  # with what each sees of the pictures and of the text, (branches * b or b, ...)
        for control in controls:
            hint = control.hint.to(states)  # (b, 3, H, W)
            if control.guess:
                self.controls.append((control, hint, CachedContext(states[-len(hint) :])))
            else:
                self.controls.append((control, torch.cat([hint] * len(branches)), self.context))
        self.step, self.steps = 0, steps

    def __call__(self, x: Tensor, t: float) -> Tensor:
        inputs = torch.cat([x] * len(self.weights))
        if self.original is not None:
            inputs = torch.cat([inputs, self.original.to(inputs)], dim=1)  # (branches * b, c + more, h, w)
        inputs = inputs.to(self.context.states.dtype)
        timesteps = torch.full((len(inputs),), t, device=x.device)
        residuals = self._residuals(inputs, timesteps)
        preds = self.unet(inputs, timesteps, self.context, **residuals).float().chunk(len(self.weights))
        return sum(weight * pred for weight, pred in zip(self.weights, preds, strict=True))

    def _residuals(self, inputs: Tensor, timesteps: Tensor) -> dict:
        """What the ControlNets add to the UNet now, as its keywords. The prompt's rows are the last."""
        found = []
        for control, hint, context in self.controls:
            if control.acts(self.step, self.steps):
                rows, seen = slice(-len(hint), None), control.network.config.in_channels
                given = inputs[rows, :seen], timesteps[rows], context, hint
                found.append(control.network(*given, control.scale, control.guess))
        return controlnet.total(found, len(inputs)) if found else {}
