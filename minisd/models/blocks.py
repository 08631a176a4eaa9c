"""The levels of the UNets, ControlNet and the VAE: ResnetBlocks, and attention at some levels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisd import graph
from minisd.models.layers import Context, Downsample, ResnetBlock, Upsample

MakeAttention = Callable[[int], nn.Module] | None  # level -> a new attention layer; None: no attention


@dataclass(kw_only=True)
class LevelsConfig:
    """Settings that these networks share; `block_out_channels` has an entry per level, highest resolution
    first. The defaults, here and in the networks' configs, are those of Stable Diffusion v1.5."""

    in_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    pad_end_only: bool = False  # see layers.Downsample

    @property
    def temb_dim(self) -> int | None:
        """Width of the time embedding; None in a network without one."""
        return 4 * self.block_out_channels[0]


class Block(nn.Module):
    """ResnetBlocks with `widths` (c_in, c_out); attention follows each, only the first, or none of them."""

    def __init__(self, config: LevelsConfig, widths: list[tuple[int, int]]):
        super().__init__()
        groups, eps, temb_dim = config.norm_num_groups, config.norm_eps, config.temb_dim
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, c_out, groups=groups, eps=eps, temb_dim=temb_dim) for c_in, c_out in widths
        )
        self.attentions = nn.ModuleList()
        self.gradient_checkpointing = False  # recompute activations in the backward pass

    def layer(self, i: int, x: Tensor, temb: Tensor | None, context: Context) -> Tensor:
        """ResnetBlock i, then its attention: (b, c_in, h, w) -> (b, c_out, h, w)."""
        x = self._run(self.resnets[i], x, temb)  # (b, c_out, h, w)
        return self._run(self.attentions[i], x, context) if i < len(self.attentions) else x

    def _run(self, module: nn.Module, *args: Context) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # A graph that is being recorded cannot read the random state; torch.compile needs no such thing.
            preserve = torch.compiler.is_compiling() or not graph.capturing
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=preserve)
        return module(*args)


class DownBlock(Block):
    """One level of an encoder. Each output is a skip connection in a UNet."""

    def __init__(self, config: LevelsConfig, level: int, attention: MakeAttention = None):
        channels, layers = config.block_out_channels, range(config.layers_per_block)
        c_in, c_out = channels[max(level - 1, 0)], channels[level]
        super().__init__(config, [(c_out if i else c_in, c_out) for i in layers])
        self.attentions.extend(attention(level) for _ in layers if attention)
        self.downsamplers = nn.ModuleList()
        if level < len(channels) - 1:
            self.downsamplers.append(Downsample(c_out, pad_end_only=config.pad_end_only))

    def forward(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        context: Context = None,
        feature: Tensor | None = None,
    ) -> list[Tensor]:
        """`feature` (b, c_out, h, w) is added to the last layer's output."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context)
            outputs.append(x)  # (b, c_out, h, w)
        if feature is not None:
            outputs[-1] = x = x + feature
        for downsample in self.downsamplers:
            outputs.append(downsample(x))  # (b, c_out, h / 2, w / 2)
        return outputs


class MidBlock(Block):
    """ResnetBlock, attention, ResnetBlock at the lowest resolution."""

    def __init__(self, config: LevelsConfig, attention: MakeAttention):
        c = config.block_out_channels[-1]
        super().__init__(config, [(c, c), (c, c)])
        self.attentions.append(attention(-1))

    def forward(self, x: Tensor, temb: Tensor | None = None, context: Context = None) -> Tensor:
        x = self.layer(0, x, temb, context)
        return self.layer(1, x, temb, context)


class UpBlock(Block):
    """One level of a decoder. In a UNet it pops layers_per_block + 1 tensors from `skips`."""

    def __init__(
        self, config: LevelsConfig, level: int, attention: MakeAttention = None, has_skips: bool = True
    ):
        channels, layers = config.block_out_channels, range(config.layers_per_block + 1)
        c_in, c_out = channels[min(level + 1, len(channels) - 1)], channels[level]
        # Skips in the order they are popped: this level's outputs, then its input.
        c_skips = [*[c_out] * config.layers_per_block, channels[max(level - 1, 0)]]
        c_skips = c_skips if has_skips else [0] * len(layers)
        super().__init__(config, [((c_out if i else c_in) + c_skips[i], c_out) for i in layers])
        self.attentions.extend(attention(level) for _ in layers if attention)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor | None = None, context: Context = None
    ) -> Tensor:
        for i in range(len(self.resnets)):
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)  # (b, c + c_skip, h, w)
            x = self.layer(i, x, temb, context)  # (b, c_out, h, w)
        for upsample in self.upsamplers:
            # To the size of the next skip, which is not twice x's if a side was odd on the way down.
            x = upsample(x, skips[-1].shape[-2:] if skips else None)  # (b, c_out, 2 h, 2 w)
        return x
