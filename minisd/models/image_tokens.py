"""What makes tokens of an image's embedding in an IP-Adapter (Ye et al. 2023, arXiv 2308.06721, section 3.2).

Each network is built from the shapes in its file and has the file's names. Of an image encoder it takes the
projected embedding (b, e), or with `hidden` the last but one of the hidden states (b, s, e); e is `width`.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Size, Tensor

from minisd.models.layers import multi_head

HEAD_DIM = 64  # of the Resampler
Shapes = Mapping[str, Size]


class Projection(nn.Module):
    """A linear layer and a LayerNorm: (b, e) -> tokens (b, m, d)."""

    hidden = False

    def __init__(self, shapes: Shapes):
        super().__init__()
        (total, self.width), (d,) = shapes["proj.weight"], shapes["norm.weight"]
        self.proj = nn.Linear(self.width, total)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (-1, *self.norm.normalized_shape)))  # (b, m, d)


class MLP(nn.Module):
    """Each state becomes a token: (b, s, e) -> (b, s, d)."""

    hidden = True

    def __init__(self, shapes: Shapes):
        super().__init__()
        (inner, self.width), (d,) = shapes["proj.0.weight"], shapes["proj.3.weight"]
        layers = nn.Linear(self.width, inner), nn.GELU(), nn.Linear(inner, d), nn.LayerNorm(d)
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # (b, s, d)


class ResamplerAttention(nn.Module):
    """Attention of the latents (b, m, c) to the image (b, s, c) and to themselves: (b, m, c)."""

    def __init__(self, c: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.to_q = nn.Linear(c, inner, bias=False)
        self.to_kv = nn.Linear(c, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, c, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        image, latents = self.norm1(image), self.norm2(latents)
        q = self.to_q(latents)  # (b, m, inner)
        k, v = self.to_kv(torch.cat([image, latents], dim=1)).chunk(2, dim=-1)  # (b, s + m, inner) twice
        return self.to_out(multi_head(q, k, v, q.shape[-1] // HEAD_DIM))  # (b, m, c)


class Resampler(nn.Module):
    """Learned latents that read the states (Flamingo, arXiv 2204.14198): (b, s, e) -> (b, m, d)."""

    hidden = True

    def __init__(self, shapes: Shapes):
        super().__init__()
        (c, self.width), (d, _) = shapes["proj_in.weight"], shapes["proj_out.weight"]
        self.latents = nn.Parameter(torch.empty(shapes["latents"]))  # (1, m, c)
        self.proj_in, self.proj_out = nn.Linear(self.width, c), nn.Linear(c, d)
        self.norm_out = nn.LayerNorm(d)
        self.layers = nn.ModuleList()
        while (name := f"layers.{len(self.layers)}") + ".0.to_q.weight" in shapes:
            wide, narrow = (nn.Linear(*sizes, bias=False) for sizes in ((c, 4 * c), (4 * c, c)))
            feed_forward = nn.Sequential(nn.LayerNorm(c), wide, nn.GELU(), narrow)
            attention = ResamplerAttention(c, shapes[f"{name}.0.to_q.weight"][0])
            self.layers.append(nn.ModuleList([attention, feed_forward]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)  # (b, s, c)
        latents = self.latents.expand(len(x), -1, -1)  # (b, m, c)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))  # (b, m, d)


KINDS = {"proj.weight": Projection, "proj.3.weight": MLP, "latents": Resampler}  # by a name that only it has
