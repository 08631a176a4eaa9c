"""Concepts erased, or replaced by others, in closed form (UCE: Gandikota et al. 2023, arXiv 2308.14761)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minisd.adapters import lora
from minisd.options import require
from minisd.sampling.stable_diffusion import StableDiffusion

EDITED = (".attn2.to_k", ".attn2.to_v")  # the layers that read the text


@torch.no_grad()
def edit(
    sd: StableDiffusion,
    erase: Sequence[str],
    guide: Sequence[str] = ("",),
    preserve: Sequence[str] = (),
    *,
    lamb: float = 0.5,
    clip_skip: int = 1,
) -> str:
    """Give the UNet for the prompts `erase` the keys and values of the prompts `guide`, one for all or one
    for each, and leave those of the prompts `preserve`, as nearly as least squares can: equation 7,

        W = (sum W0 g c^T + sum W0 p p^T + lamb W0) (sum c c^T + sum p p^T + lamb I)^-1

    where c, g and p (d,) are the contexts of these prompts from their last token on, to the end of the
    padding, which knows what came before, and W0 is the weight with all that is attached. As W0 is a common
    factor, one system of d equations serves all layers; it is solved in fp64. The change is an update beside
    the weights: `sd.export` writes it into them. Returns a line that says what was edited.
    """
    given = "one for all prompts to erase, or one for each"
    require(len(guide) in (1, len(erase)), f"{len(guide)} --guide_concepts: {given}")
    guide = [*guide] * (len(erase) if len(guide) == 1 else 1)
    require(all(map(str.strip, erase)), "--erase_concepts: an empty prompt is no concept")
    same = next((e for e, g in zip(erase, guide, strict=True) if e == g), None)
    require(same is None, f"--erase_concepts {same!r} is its own --guide_concepts, which changes nothing")
    matrix = lamb * torch.eye(sd.unet.config.cross_attention_dim, dtype=torch.float64)
    moved = torch.zeros_like(matrix)  # sum (g - c) c^T
    for old, new in [*zip(erase, guide, strict=True), *((prompt, prompt) for prompt in preserve)]:
        c, g = endings(sd, old, clip_skip), endings(sd, new, clip_skip)
        c, g = c[: len(g)], g[: len(c)]
        matrix += c.T @ c
        moved += (g - c).T @ c
    change = torch.linalg.solve(matrix, moved, left=False)  # W = W0 + W0 change
    own = {name: sd.exact("unet", name, tensor) for name, tensor in lora.own_state(sd.unet).items()}
    weights, updates = lora.merged(sd.unet, own, torch.float32), {}
    for name in [name for name in lora.layers(sd.unet) if name.endswith(EDITED)]:
        delta = weights[f"{name}.weight"].cpu().double() @ change  # (d_out, d)
        updates[f"unet.{name}"] = lora.FullDelta(delta.float().to(sd.device))
    lora.put(lora.networks(sd), updates)
    return f"{len(erase)} erased, {len(preserve)} preserved, by {len(updates)} layers of the UNet"


def endings(sd: StableDiffusion, prompt: str, clip_skip: int) -> Tensor:
    """The context of a prompt from its last token on, or of the empty one from its start, (n, d), in fp64."""
    last = min(len(sd.tokenizer.encode(prompt)), sd.tokenizer.max_length - 2)  # before it is the start
    return sd.encode_ids(sd.tokenizer([prompt]), clip_skip)[0, last:].cpu().double()
