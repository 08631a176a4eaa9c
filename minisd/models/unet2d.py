"""The UNet of DDPM, which denoises pixels and is conditioned on the timestep alone (arXiv 2006.11239)."""

from dataclasses import dataclass

from torch import Tensor

from minisd.models.blocks import LevelsConfig
from minisd.models.layers import Context, SelfAttention2d, timestep_embedding
from minisd.models.unet import UNet


@dataclass(kw_only=True)
class UNet2DConfig(LevelsConfig):
    """One entry per level, highest resolution first, in `block_out_channels` and `attention`. The defaults
    are those of diffusers' example script.

    `pad_end_only`, `frequency_shift` and `sines_first` are True, 1 and True in the weights published in 2020.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    attention: tuple[bool, ...] = (False, False, False, False, True, False)
    head_dim: int | None = 8  # width of a head; None: one head of all channels
    sample_size: int = 64  # side of the images
    frequency_shift: int = 0
    sines_first: bool = False


DDPM = UNet2DConfig()


class UNet2D(UNet):
    """Predicts the noise (or the clean image) in a noisy image, given the timestep."""

    config: UNet2DConfig

    def attention(self, level: int) -> SelfAttention2d:
        channels = self.config.block_out_channels[level]
        num_heads = channels // (self.config.head_dim or channels)
        groups, eps = self.config.norm_num_groups, self.config.norm_eps
        return SelfAttention2d(channels, num_heads, groups=groups, eps=eps)

    def sinusoids(self, timesteps: Tensor) -> Tensor:
        c, shift = self.config.block_out_channels[0], self.config.frequency_shift
        return timestep_embedding(timesteps, c, shift=shift, sines_first=self.config.sines_first)

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Context = None) -> Tensor:
        """(b, in_channels, h, w) at timesteps (b,) -> pred (b, out_channels, h, w); `context` is not used."""
        return super().forward(noisy, timesteps, None)
