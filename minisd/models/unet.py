"""The denoising UNet of Stable Diffusion v1.x (Rombach et al. 2022, arXiv 2112.10752)."""

from dataclasses import dataclass, replace

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models.blocks import Block, DownBlock, LevelsConfig, MidBlock, UpBlock
from minisd.models.layers import Context, Conv3x3, GroupNorm, SpatialTransformer, timestep_embedding


@dataclass(kw_only=True)
class EncoderConfig(LevelsConfig):
    """One entry per level, highest resolution first, in `block_out_channels`, `num_heads` and `attention`.

    `in_channels` is 4; 8 in instruct-pix2pix (noisy | image), 9 for inpainting (noisy | mask | masked image).
    """

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768


@dataclass(kw_only=True)
class UNetConfig(EncoderConfig):
    out_channels: int = 4
    sample_size: int = 64  # side of the latents in training


SD15 = UNetConfig()


class UNetEncoder(nn.Module):
    """The UNet up to and including its middle; a ControlNet has a copy of it."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c = config.block_out_channels[0]
        self.conv_in = Conv3x3(config.in_channels, c)
        linear_1, linear_2 = nn.Linear(c, config.temb_dim), nn.Linear(config.temb_dim, config.temb_dim)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, self.attention if attends else None)
            for level, attends in enumerate(config.attention)
        )
        self.mid_block = MidBlock(config, self.attention)

    def attention(self, level: int) -> nn.Module:
        """A new attention layer for a level."""
        channels, num_heads = self.config.block_out_channels[level], self.config.num_heads[level]
        context_dim, groups = self.config.cross_attention_dim, self.config.norm_num_groups
        return SpatialTransformer(channels, num_heads, context_dim, groups=groups)

    def sinusoids(self, timesteps: Tensor) -> Tensor:
        """(b,) -> (b, c0) in fp32."""
        return timestep_embedding(timesteps, self.config.block_out_channels[0])

    def enable_gradient_checkpointing(self) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.gradient_checkpointing = True

    def encode(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Context,
        hint: Tensor | None = None,
        features: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the middle's output, the skips from first to last, and temb with its SiLU applied. `hint`
        (b, c0, h, w) is added to the output of conv_in, and `features` to those of the levels."""
        # Time: sinusoids in fp32, then the MLP. The SiLU of all ResnetBlocks is applied to temb once.
        temb = self.sinusoids(timesteps).to(noisy_latents.dtype)  # (b, c0)
        temb = F.silu(self.time_embedding.linear_1(temb))  # (b, temb_dim)
        temb = F.silu(self.time_embedding.linear_2(temb))  # (b, temb_dim)

        # Down
        x = self.conv_in(noisy_latents)  # (b, c0, h, w)
        skips = [x if hint is None else x + hint]
        for i, block in enumerate(self.down_blocks):
            skips += block(skips[-1], temb, context, features[i] if features else None)

        # Middle
        return self.mid_block(skips[-1], temb, context), skips, temb


class UNet(UNetEncoder):
    """Predicts the noise (or v, or the clean latents) in noisy latents, given the timestep and the text."""

    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c, levels = config.block_out_channels[0], range(len(config.block_out_channels))
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level, self.attention if config.attention[level] else None)
            for level in reversed(levels)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = Conv3x3(c, config.out_channels)

    def widen(self, in_channels: int) -> None:
        """Add input channels with weights of zero, so that the output stays the same (Brooks et al. 2022,
        arXiv 2211.09800, section 3.2)."""
        old, more = self.conv_in, in_channels - self.config.in_channels
        self.conv_in = Conv3x3(in_channels, old.out_channels, device="meta")
        weight = F.pad(old.weight.detach(), (0, 0, 0, 0, 0, more))  # (c0, in_channels, 3, 3), same layout
        self.conv_in.weight = nn.Parameter(weight)
        self.conv_in.bias = old.bias
        self.config = replace(self.config, in_channels=in_channels)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Context,
        *,
        down_residuals: list[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """(b, in_channels, h, w) at timesteps (b,), context (b, s, d) -> pred (b, out_channels, h, w). A
        ControlNet's residuals are added to the skips and to the middle's output, a T2I-Adapter's features
        (b, c, h, w) to the output of each level on the way down."""
        x, skips, temb = self.encode(noisy_latents, timesteps, context, features=features)
        if down_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        if mid_residual is not None:
            x = x + mid_residual

        # Up: every skip is used once, last in first out
        for block in self.up_blocks:
            x = block(x, skips, temb, context)

        # Out
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, out_channels, h, w)
