"""The KL autoencoder of Stable Diffusion: pixels (b, 3, 8h, 8w) in [-1, 1] <-> latents (b, 4, h, w).

Kingma and Welling 2013 (arXiv 1312.6114); architecture of Esser et al. 2021 (arXiv 2012.09841).
"""

from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from minisd.models.layers import Downsample, GroupNorm, ResnetBlock, SelfAttention2d, Upsample

EPS = 1e-6  # of every GroupNorm here


@dataclass(kw_only=True)
class VAEConfig:
    """One entry per level, highest resolution first, in `block_out_channels`."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    sample_size: int  # side of the pictures that it was trained on
    scaling_factor: float

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


SD15 = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=512,
    scaling_factor=0.18215,
)


def _resnets(config: VAEConfig, c_in: int, c_out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(c_out if i else c_in, c_out, groups=config.norm_num_groups, eps=EPS) for i in range(count)
    )


class DownBlock(nn.Module):
    def __init__(self, config: VAEConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        c_in, c_out, last = channels[max(level - 1, 0)], channels[level], level == len(channels) - 1
        self.resnets = _resnets(config, c_in, c_out, config.layers_per_block)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out, pad_end_only=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        c = config.block_out_channels[-1]
        self.resnets = _resnets(config, c, c, 2)
        self.attentions = nn.ModuleList([SelfAttention2d(c, 1, groups=config.norm_num_groups, eps=EPS)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    def __init__(self, config: VAEConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        c_in, c_out = channels[min(level + 1, len(channels) - 1)], channels[level]
        self.resnets = _resnets(config, c_in, c_out, config.layers_per_block + 1)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """(b, 3, 8h, 8w) -> (b, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(config, i) for i in range(len(config.block_out_channels)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, last, eps=EPS)
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    """(b, latent_channels, h, w) -> (b, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        levels = reversed(range(len(config.block_out_channels)))
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in levels)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, eps=EPS)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nn.Module):
    """Latents in and out of here are scaled by `scaling_factor`, so that they have about unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents' posterior, each (b, latent_channels, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        return self.config.scaling_factor * mean, self.config.scaling_factor * std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (b, 3, 8h, 8w), about [-1, 1], of scaled latents (b, latent_channels, h, w)."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
