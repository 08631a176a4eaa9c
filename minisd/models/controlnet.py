"""ControlNet: a trained copy of the UNet's encoder that conditions it on an image (arXiv 2302.05543)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd.models import unet
from minisd.models.layers import Context, Conv1x1, Conv3x3, move
from minisd.models.unet import EncoderConfig, UNet, UNetEncoder

HINT_CHANNELS = (16, 32, 96, 256)
Residuals = dict[str, Tensor | list[Tensor]]  # keywords of the UNet


@dataclass(kw_only=True)
class ControlNetConfig(EncoderConfig):
    hint_channels: tuple[int, ...]  # of the hint network; each after the first halves the side

    @classmethod
    def of(cls, encoder: EncoderConfig, hint_channels: tuple[int, ...] = HINT_CHANNELS) -> "ControlNetConfig":
        """The config of a ControlNet for a UNet with this encoder."""
        shared = {f.name: getattr(encoder, f.name) for f in fields(EncoderConfig)}
        return cls(**shared, hint_channels=hint_channels)


SD15 = ControlNetConfig.of(unet.SD15)


class HintNetwork(nn.Module):
    """Scales the conditioning image to the latents: (b, 3, 8h, 8w) in [0, 1] -> (b, c_out, h, w)."""

    def __init__(self, channels: tuple[int, ...], c_out: int):
        super().__init__()
        self.conv_in = Conv3x3(3, channels[0])
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(channels, channels[1:], strict=False):
            self.blocks.append(Conv3x3(narrow, narrow))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = Conv3x3(channels[-1], c_out)

    def forward(self, hint: Tensor) -> Tensor:
        x = self.conv_in(hint)  # (b, channels[0], 8h, 8w)
        for block in self.blocks:
            x = block(F.silu(x))  # every second block halves the side
        return self.conv_out(F.silu(x))  # (b, c_out, h, w)


class ControlNet(UNetEncoder):
    """Predicts residuals of the UNet's skips and middle from its inputs and a conditioning image."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.controlnet_cond_embedding = HintNetwork(config.hint_channels, channels[0])
        # One convolution per skip: conv_in's output, then those of each level's layers and downsampling.
        skips = [channels[0]]
        for level, c in enumerate(channels):
            skips += [c] * (config.layers_per_block + (level < last))
        self.controlnet_down_blocks = nn.ModuleList(Conv1x1(c, c) for c in skips)
        self.controlnet_mid_block = Conv1x1(channels[-1], channels[-1])

    @classmethod
    def from_unet(cls, source: UNet, downscale: int = 8) -> "ControlNet":
        """A ControlNet with a copy of the UNet's encoder and residuals of zero. `downscale` is the number of
        pixels per latent along a side. ValueError if no hint network scales by it."""
        steps = downscale.bit_length() - 1
        if downscale != 2**steps or not 0 < steps < len(HINT_CHANNELS):
            raise ValueError(f"no hint network goes from pixels to latents {downscale} times smaller")
        config = ControlNetConfig.of(source.config, HINT_CHANNELS[: steps + 1])
        self = move(cls(config), source.conv_in.weight.device, source.conv_in.weight.dtype)
        self.load_state_dict(source.state_dict(), strict=False)  # without the decoder
        zero = [self.controlnet_cond_embedding.conv_out, self.controlnet_mid_block]
        for conv in [*zero, *self.controlnet_down_blocks]:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        return self

    def prepare(self, hint: Tensor) -> Tensor:
        """What sampling computes of the conditioning image once."""
        return hint

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        context: Context,
        hint: Tensor,
        scale: float = 1.0,
        guess: bool = False,
    ) -> Residuals:
        """Return the UNet's keywords `down_residuals` and `mid_residual`, times `scale`; with `guess` also
        times a factor that rises geometrically from 0.1 at the first skip to 1 in the middle. The first three
        arguments are the UNet's, of which it may take fewer channels; `hint` (b, 3, 8h, 8w) is in [0, 1].
        ValueError if its size does not fit."""
        noisy_latents = noisy_latents[:, : self.config.in_channels]
        hint = self.controlnet_cond_embedding(hint)  # (b, c0, h, w)
        if hint.shape[-2:] != noisy_latents.shape[-2:]:
            raise ValueError(
                f"a conditioning image of {tuple(hint.shape[-2:])} latents "
                f"for {tuple(noisy_latents.shape[-2:])}"
            )
        x, skips, _ = self.encode(noisy_latents, timesteps, context, hint)
        count = len(skips)
        scales = [scale * 10 ** (i / count - 1) if guess else scale for i in range(count + 1)]
        down = [s * conv(x) for s, conv, x in zip(scales, self.controlnet_down_blocks, skips, strict=False)]
        return {"down_residuals": down, "mid_residual": scales[-1] * self.controlnet_mid_block(x)}


def total(residuals: list[Residuals], rows: int) -> Residuals:
    """The sum of the residuals of several networks. Where one ran for only the last of the `rows` samples,
    its residuals for the first ones are zero."""

    def add(values: Sequence[Tensor | list[Tensor]]) -> Tensor | list[Tensor]:
        if isinstance(values[0], list):
            return [add(tensors) for tensors in zip(*values, strict=True)]
        whole = [t if len(t) == rows else F.pad(t, (0, 0, 0, 0, 0, 0, rows - len(t), 0)) for t in values]
        return sum(whole[1:], start=whole[0])  # (rows, c, h, w)

    names = dict.fromkeys(name for r in residuals for name in r)
    return {name: add([r[name] for r in residuals if name in r]) for name in names}
