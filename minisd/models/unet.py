"""The denoising UNet of Stable Diffusion v1.x (Rombach et al. 2022, arXiv 2112.10752)."""

from dataclasses import dataclass, replace
from functools import partial

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models.blocks import DownBlock, MidBlock, UpBlock
from minisd.models.layers import (
    Context,
    GroupNorm,
    SpatialTransformer,
    TimestepEmbedding,
    timestep_embedding,
)


@dataclass(kw_only=True)
class EncoderConfig:
    """One entry per level, highest resolution first, in `block_out_channels`, `num_heads` and `attention`."""

    in_channels: int  # 4; 8 instruct-pix2pix (noisy | image); 9 inpainting (noisy | mask | masked image)
    block_out_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    num_heads: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float

    @property
    def temb_dim(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(kw_only=True)
class UNetConfig(EncoderConfig):
    out_channels: int
    sample_size: int  # side of the latents that the model was trained on


SD15 = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    attention=(True, True, True, False),
    num_heads=(8, 8, 8, 8),
    layers_per_block=2,
    cross_attention_dim=768,
    norm_num_groups=32,
    norm_eps=1e-5,
    sample_size=64,
)


def _transformer(config: EncoderConfig, level: int) -> SpatialTransformer:
    channels, num_heads = config.block_out_channels[level], config.num_heads[level]
    return SpatialTransformer(channels, num_heads, config.cross_attention_dim, groups=config.norm_num_groups)


class Encoder(nn.Module):
    """The UNet as far as its middle, which a ControlNet has a copy of."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.time_embedding = TimestepEmbedding(c, config.temb_dim)
        levels = range(len(config.block_out_channels))
        attention = partial(_transformer, config)
        self.down_blocks = nn.ModuleList(DownBlock(config, level, attention) for level in levels)
        self.mid_block = MidBlock(config, attention)

    def enable_gradient_checkpointing(self) -> None:
        for block in [*self.down_blocks, self.mid_block]:
            block.gradient_checkpointing = True

    def encode(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Tensor | Context,
        hint: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The middle's output, the skips in the order they are made, and temb with its SiLU applied. `hint`
        (b, c0, h, w) is added behind conv_in."""
        # Time: sinusoids in fp32, then the MLP. The SiLU that every ResnetBlock starts with is applied once.
        temb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(noisy_latents.dtype)
        temb = F.silu(self.time_embedding(temb))  # (b, temb_dim)

        # Down
        x = self.conv_in(noisy_latents)  # (b, c0, h, w)
        skips = [x if hint is None else x + hint]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)

        # Middle
        return self.mid_block(skips[-1], temb, context), skips, temb


class UNet(Encoder):
    """Predicts the noise (or v, or the clean latents) in noisy latents, given the timestep and the text."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        levels, c = range(len(config.block_out_channels)), config.block_out_channels[0]
        attention = partial(_transformer, config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level, attention) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        for block in self.up_blocks:
            block.gradient_checkpointing = True

    def widen(self, in_channels: int) -> None:
        """Take further input channels, whose weights are zero and whose bias there is already: with anything
        in them, the output stays what it was (Brooks et al. 2022, arXiv 2211.09800, section 3.2)."""
        old, more = self.conv_in, in_channels - self.config.in_channels
        self.conv_in = nn.Conv2d(in_channels, old.out_channels, 3, padding=1, device="meta")
        self.conv_in.weight = nn.Parameter(F.pad(old.weight.detach(), (0, 0, 0, 0, 0, more)))  # in its layout
        self.conv_in.bias = old.bias
        self.config = replace(self.config, in_channels=in_channels)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Tensor | Context,
        *,
        down_residuals: list[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """(b, in_channels, h, w) at timesteps (b,), context (b, s, d) -> pred (b, out_channels, h, w). A
        ControlNet's residuals are added to the skips and to the middle's output."""
        x, skips, temb = self.encode(noisy_latents, timesteps, context)
        if down_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        if mid_residual is not None:
            x = x + mid_residual

        # Up: every skip is used once, last in first out
        for block in self.up_blocks:
            x = block(x, skips, temb, context)

        # Out
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, out_channels, h, w)
