"""The KL autoencoder of Stable Diffusion: pixels (b, 3, 8h, 8w) in [-1, 1] <-> latents (b, 4, h, w).

Kingma and Welling 2013 (arXiv 1312.6114); architecture of Esser et al. 2021 (arXiv 2012.09841).
"""

from dataclasses import dataclass
from functools import partial

import torch.nn as nn
from torch import Tensor

from minisd.models.blocks import DownBlock, LevelsConfig, MidBlock, UpBlock
from minisd.models.layers import Conv3x3, GroupNorm, SelfAttention2d


@dataclass(kw_only=True)
class VAEConfig(LevelsConfig):
    """One entry per level, highest resolution first, in `block_out_channels`."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    sample_size: int = 512  # side of the images in training
    scaling_factor: float = 0.18215
    norm_eps: float = 1e-6
    pad_end_only: bool = True

    temb_dim = None

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


SD15 = VAEConfig()


def _attention(config: VAEConfig, level: int) -> SelfAttention2d:
    channels = config.block_out_channels[level]
    return SelfAttention2d(channels, 1, groups=config.norm_num_groups, eps=config.norm_eps)


class Encoder(nn.Module):
    """(b, 3, 8h, 8w) -> (b, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        self.conv_in = Conv3x3(config.in_channels, first)
        levels = range(len(config.block_out_channels))
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config, partial(_attention, config))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, last, eps=config.norm_eps)
        self.conv_out = Conv3x3(last, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (b, c0, 8h, 8w)
        for block in self.down_blocks:
            x = block(x)[-1]  # (b, c, side / 2, side / 2), except at the last level
        x = self.mid_block(x)  # (b, c_last, h, w)
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, 2 * latent_channels, h, w)


class Decoder(nn.Module):
    """(b, latent_channels, h, w) -> (b, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        levels = reversed(range(len(config.block_out_channels)))
        self.conv_in = Conv3x3(config.latent_channels, last)
        self.mid_block = MidBlock(config, partial(_attention, config))
        self.up_blocks = nn.ModuleList(UpBlock(config, level, has_skips=False) for level in levels)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, eps=config.norm_eps)
        self.conv_out = Conv3x3(first, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))  # (b, c_last, h, w)
        for block in self.up_blocks:
            x = block(x, [])  # (b, c, 2 * side, 2 * side), except at the last level
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, 3, 8h, 8w)


class AutoencoderKL(nn.Module):
    """The autoencoder. Its latents are scaled by `scaling_factor`, so that they have about unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each (b, latent_channels, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        return self.config.scaling_factor * mean, self.config.scaling_factor * std

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, latent_channels, h, w) -> pixels (b, 3, 8h, 8w), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
