"""The denoising UNet of Stable Diffusion v1.x (Rombach et al. 2022, arXiv 2112.10752)."""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from minisd.models.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    maybe_checkpoint,
    timestep_embedding,
)


@dataclass(kw_only=True)
class UNetConfig:
    """One entry per level, highest resolution first, in `block_out_channels`, `num_heads` and `attention`."""

    in_channels: int  # 4; 8 instruct-pix2pix (noisy | image); 9 inpainting (noisy | mask | masked image)
    out_channels: int
    block_out_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    num_heads: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    sample_size: int  # side of the latents that the model was trained on

    @property
    def temb_dim(self) -> int:
        return 4 * self.block_out_channels[0]


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


def _resnet(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(
        c_in, c_out, groups=config.norm_num_groups, eps=config.norm_eps, temb_dim=config.temb_dim
    )


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    channels, num_heads = config.block_out_channels[level], config.num_heads[level]
    return SpatialTransformer(channels, num_heads, config.cross_attention_dim, groups=config.norm_num_groups)


class DownBlock(nn.Module):
    """One level of the encoder. Each of its outputs is a skip connection."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        c_in, c_out, layers = channels[max(level - 1, 0)], channels[level], range(config.layers_per_block)
        self.resnets = nn.ModuleList(_resnet(config, c_out if i else c_in, c_out) for i in layers)
        attention = layers if config.attention[level] else ()
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in attention)
        last = level == len(channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x, context)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(x))  # (b, c, h / 2, w / 2)
        return outputs


class MidBlock(nn.Module):
    """ResnetBlock, transformer, ResnetBlock at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(config, -1)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = maybe_checkpoint(self.gradient_checkpointing, self.resnets[0], x, temb)
        x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[0], x, context)
        return maybe_checkpoint(self.gradient_checkpointing, self.resnets[1], x, temb)


class UpBlock(nn.Module):
    """One level of the decoder: takes layers_per_block + 1 skips from the end of `skips`."""

    def __init__(self, config: UNetConfig, level: int):
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
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in attention)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level else [])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # (b, c + c_skip, h, w)
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x, context)
        for upsample in self.upsamplers:
            # The next skip's size, not twice this one's: they differ where a side was odd on the way down.
            x = upsample(x, skips[-1].shape[-2:])
        return x


class UNet(nn.Module):
    """Predicts the noise (or v, or the clean latents) in noisy latents, given the timestep and the text."""

    def __init__(self, config: UNetConfig):
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

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """(b, in_channels, h, w) at timesteps (b,), context (b, s, d) -> pred (b, out_channels, h, w)."""
        # Time: sinusoids in fp32, then the MLP. The SiLU that every ResnetBlock starts with is applied once.
        temb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(noisy_latents.dtype)
        temb = nn.functional.silu(self.time_embedding(temb))  # (b, temb_dim)

        # Down
        x = self.conv_in(noisy_latents)  # (b, c0, h, w)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)

        # Middle
        x = self.mid_block(skips[-1], temb, context)

        # Up: every skip is used once, last in first out
        for block in self.up_blocks:
            x = block(x, skips, temb, context)

        # Out
        return self.conv_out(self.conv_norm_out(x, silu=True))  # (b, out_channels, h, w)
