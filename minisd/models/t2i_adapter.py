"""T2I-Adapter: features of a conditioning image, added in the UNet (Mou et al. 2023, arXiv 2302.08453)."""

from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models.controlnet import Residuals
from minisd.models.layers import Context, Conv1x1, Conv3x3

LUMA = 0.299, 0.587, 0.114  # of red, green and blue in a grey image


@dataclass(kw_only=True)
class T2IAdapterConfig:
    """`light` is the network of the colour adapter."""

    channels: tuple[int, ...]  # of the UNet's levels
    layers_per_block: int
    hint_channels: int = 3  # 1 for a grey image
    downscale: int = 8  # pixels per latent along a side
    light: bool = False


class ReluBlock(nn.Module):
    """conv, ReLU, conv, added to x: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, c: int, light: bool):
        super().__init__()
        self.block1 = Conv3x3(c, c)
        self.block2 = Conv3x3(c, c) if light else Conv1x1(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class Level(nn.Module):
    """The blocks at one resolution, in light networks with a quarter of the channels."""

    def __init__(self, c_in: int, c_out: int, config: T2IAdapterConfig):
        super().__init__()
        c = c_out // 4 if config.light else c_out
        self.in_conv = Conv1x1(c_in, c) if config.light or c_in != c else None
        self.resnets = nn.Sequential(*(ReluBlock(c, config.light) for _ in range(config.layers_per_block)))
        self.out_conv = Conv1x1(c, c_out) if config.light else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets(self.in_conv(x) if self.in_conv else x)  # (b, c, h, w)
        return self.out_conv(x) if self.out_conv else x  # (b, c_out, h, w)


class T2IAdapter(nn.Module):
    """Unlike a ControlNet it depends on the conditioning image alone: it runs once for an image."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        self.config, channels = config, config.channels
        c_in = config.hint_channels * config.downscale**2
        self.conv_in = None if config.light else Conv3x3(c_in, channels[0])
        widths = [c_in if config.light else channels[0], *channels]
        self.body = nn.ModuleList(Level(*pair, config) for pair in zip(widths, channels, strict=False))

    def prepare(self, hint: Tensor) -> list[Tensor]:
        """The features (b, c, h, w) for each level of the UNet, of an image (b, 3, 8h, 8w) in [0, 1]."""
        if self.config.hint_channels == 1:
            hint = sum(weight * hint[:, i : i + 1] for i, weight in enumerate(LUMA))  # (b, 1, 8h, 8w)
        x = F.pixel_unshuffle(hint, self.config.downscale)  # (b, 64 * hint_channels, h, w)
        x = self.conv_in(x) if self.conv_in else x
        features = []
        for i, level in enumerate(self.body):
            # Each level halves the sides, rounded up as in the UNet
            x = level(F.avg_pool2d(x, 2, ceil_mode=True) if i else x)
            features.append(x)
        return features

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Context,
        features: list[Tensor],
        scale: float = 1.0,
        guess: bool = False,
    ) -> Residuals:
        """Return the UNet's keyword `features`, times `scale`. The arguments are a ControlNet's, with what
        `prepare` returned as the hint; the others have no effect."""
        return {"features": [scale * feature for feature in features]}
