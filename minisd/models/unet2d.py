"""The UNet of DDPM, which denoises pixels and is told nothing but the timestep (arXiv 2006.11239)."""

from dataclasses import dataclass
from functools import partial

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models.blocks import DownBlock, MidBlock, UpBlock
from minisd.models.layers import GroupNorm, SelfAttention2d, TimestepEmbedding, timestep_embedding


@dataclass(kw_only=True)
class UNet2DConfig:
    """One entry per level, highest resolution first, in `block_out_channels` and `attention`."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    head_dim: int | None  # width of a head; None: one head of all channels
    layers_per_block: int
    norm_num_groups: int
    norm_eps: float
    sample_size: int  # side of the pictures
    # False, 0 and False in what is trained here; True, 1 and True in the weights published in 2020.
    pad_end_only: bool = False
    frequency_shift: int = 0
    sines_first: bool = False

    @property
    def temb_dim(self) -> int:
        return 4 * self.block_out_channels[0]


# What the field's script trains, in 113,673,219 parameters.
DDPM = UNet2DConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    attention=(False, False, False, False, True, False),
    head_dim=8,
    layers_per_block=2,
    norm_num_groups=32,
    norm_eps=1e-5,
    sample_size=64,
)


def _attention(config: UNet2DConfig, level: int) -> SelfAttention2d:
    channels = config.block_out_channels[level]
    num_heads = channels // (config.head_dim or channels)
    return SelfAttention2d(channels, num_heads, groups=config.norm_num_groups, eps=config.norm_eps)


class UNet2D(nn.Module):
    """Predicts the noise (or the clean picture) in a noisy picture, given the timestep."""

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.block_out_channels))
        c = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.time_embedding = TimestepEmbedding(c, config.temb_dim)
        attention, pad = partial(_attention, config), config.pad_end_only
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, attention, pad_end_only=pad) for level in levels
        )
        self.mid_block = MidBlock(config, attention)
        self.up_blocks = nn.ModuleList(UpBlock(config, level, attention) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def enable_gradient_checkpointing(self) -> None:
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            block.gradient_checkpointing = True

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """(b, in_channels, h, w) at timesteps (b,) -> pred (b, out_channels, h, w)."""
        # Time: sinusoids in fp32, then the MLP. The SiLU that every ResnetBlock starts with is applied once.
        config = self.config
        temb = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            shift=config.frequency_shift,
            sines_first=config.sines_first,
        )
        temb = F.silu(self.time_embedding(temb.to(noisy.dtype)))  # (b, temb_dim)

        # Down
        skips = [self.conv_in(noisy)]  # (b, c0, h, w)
        for block in self.down_blocks:
            skips += block(skips[-1], temb)

        # Middle
        x = self.mid_block(skips[-1], temb)

        # Up: every skip is used once, last in first out
        for block in self.up_blocks:
            x = block(x, skips, temb)

        # Out
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, out_channels, h, w)
