"""IP-Adapter: images as prompts (Ye et al. 2023, arXiv 2308.06721).

An image becomes a few tokens, to which each cross-attention of the UNet attends beside the text, with keys
and values of their own: y = attention(q, k, v) + scale * attention(q, k', v') (equation 5).

A file has `image_proj.*`, which makes the tokens, and `ip_adapter.N.to_k_ip.weight` and `to_v_ip.weight`. N
counts the UNet's attentions, self and cross, in the order of diffusers: down, up, middle. The basic, plus and
full-face files for SD v1.x are read; those of FaceID take what a network for faces returns, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn as nn
from torch import Tensor

from minisd.adapters._adapter import Adapter
from minisd.formats import parts
from minisd.models.image_tokens import KINDS
from minisd.models.layers import Attention, CachedContext, Context, TransformerBlock, multi_head
from minisd.options import require

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."
ORDER = "down_blocks", "up_blocks", "mid_block"


class ImageAttention(Attention):
    """Cross-attention to the text, and by `updates` to image prompts."""

    updates: nn.ModuleList

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        y = super().attend(q, k, v, context)  # (b, n, d)
        for update in self.updates:
            if update.scale:  # at scale 0 the output is the plain layer's, to the bit
                y = y + update.scale * multi_head(q, *update.keys_and_values(context), self.num_heads)
        return y


class KeysAndValues(nn.Module):
    """What makes an attention's keys and values (b, m, dim) of tokens (b, m, d). Sampling computes them once:
    they are in the cache of its context."""

    layer_class = ImageAttention

    def __init__(self, d: int, dim: int, source: Path):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(d, dim, bias=False), nn.Linear(d, dim, bias=False)
        self.scale, self.source = 1.0, source

    def keys_and_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """ValueError, naming the file, if no image was given."""
        known = context.cache if isinstance(context, CachedContext) else {}
        if self.to_k_ip not in known:
            raise ValueError(f"{self.source} is an IP-Adapter: it needs an image (--image_prompt)")
        return known[self.to_k_ip], known[self.to_v_ip]


class IPAdapter(nn.Module):
    """A file's networks, with its names, for attentions of these widths."""

    def __init__(self, image_proj: nn.Module, d: int, widths: list[int], source: Path):
        super().__init__()
        self.image_proj, self.source = image_proj, source
        layers = {str(2 * i + 1): KeysAndValues(d, width, source) for i, width in enumerate(widths)}
        self.ip_adapter = nn.ModuleDict(layers)


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith((PROJECTION, ATTENTION)) for name in tensors)


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> Adapter:
    """Return the keys and values for each cross-attention. ValueError, naming the file, if it is for another
    UNet, or of another kind."""
    blocks = [(n, m) for n, m in sd.unet.named_modules() if isinstance(m, TransformerBlock)]
    blocks.sort(key=lambda block: ORDER.index(block[0].partition(".")[0]))
    widths, d = [m.attn2.to_q.out_features for _, m in blocks], sd.unet.config.cross_attention_dim
    shapes = {n.removeprefix(PROJECTION): t.shape for n, t in tensors.items() if n.startswith(PROJECTION)}
    kind = next((kind for name, kind in KINDS.items() if name in shapes), None)
    require(kind, f"{source}: an IP-Adapter, but none of basic, plus and full-face; FaceID is not read")
    keys = {  # by number
        n.split(".")[1]: t.shape[-1] if t.ndim else 0 for n, t in tensors.items() if n.startswith(ATTENTION)
    }
    given = f"{len(keys)} attentions to tokens of width {max(keys.values(), default=0)}"
    fits = len(keys) == len(widths) and {*keys.values()} == {d}
    require(fits, f"{source}: an IP-Adapter for {given}; this UNet has {len(widths)}, of width {d}")
    problem = f"{source}: not the layout of an IP-Adapter"
    network = parts.on_meta(lambda: IPAdapter(kind(shapes), d, widths, source), problem)
    parts.fill(network, tensors, source).to(sd.device, sd.unet.conv_in.weight.dtype).requires_grad_(False)
    layers = network.ip_adapter.values()
    updates = {f"unet.{name}.attn2": layer for (name, _), layer in zip(blocks, layers, strict=True)}
    description = f"IP-Adapter on {len(updates)} cross-attentions, by a {kind.__name__} of the image"
    return Adapter(description=description, tokens={}, updates=updates, image_prompt=network)
