"""Image prompts: what an attached IP-Adapter's attention gets of an image (adapters/ip_adapter.py)."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from minisd.adapters.ip_adapter import IPAdapter
from minisd.data.images import to_tensor
from minisd.formats import hub
from minisd.options import require
from minisd.sampling.stable_diffusion import StableDiffusion

ENCODER = "image_encoder"  # folder beside the adapter, as it is published
MEAN = 0.48145466, 0.4578275, 0.40821073  # of CLIP's colours
STD = 0.26862954, 0.26130258, 0.27577711
NARROWEST = 100  # times its shorter side is the longer one of an image, at most


@torch.no_grad()
def project(
    sd: StableDiffusion, images: Sequence[Image.Image], encoder: str | None = None
) -> dict[nn.Module, Tensor]:
    """layer -> keys or values (2, m, d), of the image and of none, for one image for each IP-Adapter, in
    the order in which these were attached. `encoder` is a folder or a hub id; by default it is beside the
    adapter. ValueError, naming the flag, if one is missing or does not fit."""
    adapters = [adapter for attached in sd.attached.values() for adapter in attached.adapters]
    networks = [adapter.image_prompt for adapter in adapters if adapter.image_prompt]
    names = ", ".join(network.source.name for network in networks) or "none"
    given = f"{len(images)} --image_prompt and {len(networks)} IP-Adapters among --adapter ({names})"
    require(len(images) == len(networks), f"{given}: give one for each")
    found = {}
    for network, image in zip(networks, images, strict=True):
        tokens = network.image_proj(embed(sd, network, image, encoder))  # (2, m, d)
        for layer in network.ip_adapter.values():
            found |= {to: to(tokens) for to in (layer.to_k_ip, layer.to_v_ip)}
    return found


def embed(sd: StableDiffusion, network: IPAdapter, image: Image.Image, source: str | None) -> Tensor:
    """What the network takes, (2, e) or (2, s, e): of the image, and for no image zeros or, of hidden states,
    those of a grey one, as in diffusers."""
    beside, takes = network.source.parent / ENCODER, network.image_proj
    missing = f"{network.source} needs --image_encoder: there is no folder {ENCODER} beside it"
    require(source or beside.is_dir(), missing)
    source = source or str(beside)
    if source not in sd.image_encoders:
        (model,) = hub.pretrained(["CLIPVisionModelWithProjection"], source, "image_encoder")
        sd.image_encoders[source] = model.to(sd.device, sd.unet.conv_in.weight.dtype).eval()
    model = sd.image_encoders[source]
    width = model.config.hidden_size if takes.hidden else model.config.projection_dim
    problem = f"embeddings of width {width}, and {network.source.name} takes {takes.width}"
    require(width == takes.width, f"--image_encoder {source}: {problem}")
    pixels = clip_pixels(image, model.config.image_size).to(sd.device, model.dtype)  # (1, 3, side, side)
    if takes.hidden:
        both = torch.cat([pixels, torch.zeros_like(pixels)])
        return model(both, output_hidden_states=True).hidden_states[-2]  # (2, s, e)
    embedding = model(pixels).image_embeds
    return torch.cat([embedding, torch.zeros_like(embedding)])  # (2, e)


def clip_pixels(image: Image.Image, side: int) -> Tensor:
    """CLIP's input (1, 3, side, side): the shorter side resized, the middle cut out, colours normalized."""
    narrow = f"--image_prompt: {image.width}x{image.height} is too narrow; at most 1:{NARROWEST} is read"
    require(max(image.size) <= NARROWEST * min(image.size), narrow)
    width, height = (side * length // min(image.size) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = to_tensor(image.crop((left, top, left + side, top + side))) / 2 + 0.5
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std)[None]
