"""The UNet of DDPM, which denoises pixels and is told nothing but the timestep (arXiv 2006.11239)."""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from minisd.models.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    SelfAttention2d,
    TimestepEmbedding,
    Upsample,
    maybe_checkpoint,
    timestep_embedding,
)


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


def _resnet(config: UNet2DConfig, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(
        c_in, c_out, groups=config.norm_num_groups, eps=config.norm_eps, temb_dim=config.temb_dim
    )


def _attention(config: UNet2DConfig, channels: int) -> SelfAttention2d:
    num_heads = channels // (config.head_dim or channels)
    return SelfAttention2d(channels, num_heads, groups=config.norm_num_groups, eps=config.norm_eps)


class DownBlock(nn.Module):
    """One level of the encoder. Each of its outputs is a skip connection."""

    def __init__(self, config: UNet2DConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        c_in, c_out, layers = channels[max(level - 1, 0)], channels[level], range(config.layers_per_block)
        self.resnets = nn.ModuleList(_resnet(config, c_out if i else c_in, c_out) for i in layers)
        attention = layers if config.attention[level] else ()
        self.attentions = nn.ModuleList(_attention(config, c_out) for _ in attention)
        last = level == len(channels) - 1
        downsample = [] if last else [Downsample(c_out, pad_end_only=config.pad_end_only)]
        self.downsamplers = nn.ModuleList(downsample)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(x))  # (b, c, h / 2, w / 2)
        return outputs


class MidBlock(nn.Module):
    """ResnetBlock, attention, ResnetBlock at the lowest resolution."""

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        c = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, c)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = maybe_checkpoint(self.gradient_checkpointing, self.resnets[0], x, temb)
        x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[0], x)
        return maybe_checkpoint(self.gradient_checkpointing, self.resnets[1], x, temb)


class UpBlock(nn.Module):
    """One level of the decoder: takes layers_per_block + 1 skips from the end of `skips`."""

    def __init__(self, config: UNet2DConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        c_prev, c_out = channels[min(level + 1, len(channels) - 1)], channels[level]
        layers = range(config.layers_per_block + 1)
        # Skips in the order they are popped: this level's, and last the one that entered the level.
        c_skips = [c_out] * config.layers_per_block + [channels[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            _resnet(config, (c_out if i else c_prev) + c_skips[i], c_out) for i in layers
        )
        attention = layers if config.attention[level] else ()
        self.attentions = nn.ModuleList(_attention(config, c_out) for _ in attention)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level else [])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # (b, c + c_skip, h, w)
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x)
        for upsample in self.upsamplers:
            # The next skip's size, not twice this one's: they differ where a side was odd on the way down.
            x = upsample(x, skips[-1].shape[-2:])
        return x


class UNet2D(nn.Module):
    """Predicts the noise (or the clean picture) in a noisy picture, given the timestep."""

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.block_out_channels))
        c = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.time_embedding = TimestepEmbedding(c, config.temb_dim)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
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
        temb = nn.functional.silu(self.time_embedding(temb.to(noisy.dtype)))  # (b, temb_dim)

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
