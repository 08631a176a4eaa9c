"""The levels of a UNet: ResnetBlocks, with attention behind each where a level has it.

`attention(level)` builds the attention of a level; what it gets besides x, such as the text, comes through
`context`.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from minisd.models.layers import Context, Downsample, ResnetBlock, Upsample, maybe_checkpoint


def _resnet(config, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(
        c_in, c_out, groups=config.norm_num_groups, eps=config.norm_eps, temb_dim=config.temb_dim
    )


class DownBlock(nn.Module):
    """One level of the encoder. Each of its outputs is a skip connection."""

    def __init__(
        self, config, level: int, attention: Callable[[int], nn.Module], *, pad_end_only: bool = False
    ):
        super().__init__()
        channels = config.block_out_channels
        c_in, c_out, layers = channels[max(level - 1, 0)], channels[level], range(config.layers_per_block)
        self.resnets = nn.ModuleList(_resnet(config, c_out if i else c_in, c_out) for i in layers)
        self.attentions = nn.ModuleList(attention(level) for _ in layers if config.attention[level])
        last = level == len(channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out, pad_end_only=pad_end_only)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor, *context: Tensor | Context) -> list[Tensor]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x, *context)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(x))  # (b, c, h / 2, w / 2)
        return outputs


class MidBlock(nn.Module):
    """ResnetBlock, attention, ResnetBlock at the lowest resolution."""

    def __init__(self, config, attention: Callable[[int], nn.Module]):
        super().__init__()
        c = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([attention(-1)])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: Tensor, *context: Tensor | Context) -> Tensor:
        x = maybe_checkpoint(self.gradient_checkpointing, self.resnets[0], x, temb)
        x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[0], x, *context)
        return maybe_checkpoint(self.gradient_checkpointing, self.resnets[1], x, temb)


class UpBlock(nn.Module):
    """One level of the decoder: takes layers_per_block + 1 skips from the end of `skips`."""

    def __init__(self, config, level: int, attention: Callable[[int], nn.Module]):
        super().__init__()
        channels = config.block_out_channels
        c_prev, c_out = channels[min(level + 1, len(channels) - 1)], channels[level]
        layers = range(config.layers_per_block + 1)
        # Skips in the order they are popped: this level's, and last the one that entered the level.
        c_skips = [c_out] * config.layers_per_block + [channels[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            _resnet(config, (c_out if i else c_prev) + c_skips[i], c_out) for i in layers
        )
        self.attentions = nn.ModuleList(attention(level) for _ in layers if config.attention[level])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level else [])
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, *context: Tensor | Context) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # (b, c + c_skip, h, w)
            x = maybe_checkpoint(self.gradient_checkpointing, resnet, x, temb)
            if self.attentions:
                x = maybe_checkpoint(self.gradient_checkpointing, self.attentions[i], x, *context)
        for upsample in self.upsamplers:
            # The next skip's size, not twice this one's: they differ where a side was odd on the way down.
            x = upsample(x, skips[-1].shape[-2:])
        return x
