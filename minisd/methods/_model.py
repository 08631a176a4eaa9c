"""Loading the model that a method starts from, and adding tokens to it."""

from __future__ import annotations

import torch

from minisd.adapters import token_embedding
from minisd.options import Diffusion, Training
from minisd.sampling.stable_diffusion import StableDiffusion


def load(
    options: Training, device: torch.device, dtype: torch.dtype, revision: str | None = None
) -> StableDiffusion:
    """The model that the options name, frozen and in `dtype`, with their noise schedule."""
    o = options
    sd = StableDiffusion.load(
        o.model,
        device=device,
        dtype=dtype,
        revision=revision or o.revision,
        variant=o.variant,
        ema=o.load_ema,
        tokenizer=o.tokenizer_name,
        cache_dir=o.cache_dir,
    )
    if isinstance(o, Diffusion) and o.prediction_type:
        sd.set_schedule(prediction_type=o.prediction_type)
    if isinstance(o, Diffusion) and o.rescale_betas_zero_snr:
        sd.set_schedule(rescale_betas_zero_snr=True)
    if o.gradient_checkpointing:
        sd.unet.enable_gradient_checkpointing()
    return sd


def add_token(sd: StableDiffusion, token: str, word: str, count: int, *, flag: str) -> torch.nn.Parameter:
    """Give the model a new token of `count` vectors, each initialized from that of `word`. Returns those of
    all new tokens (n, d). ValueError if the word is several tokens, or the token cannot be one."""
    start = sd.tokenizer.one(word)
    if start is None:
        several = f"{len(sd.tokenizer.encode(word))} tokens of this model"
        raise ValueError(f"--initializer_token {word!r} is {several}; give a word that is one token")
    sd.text_encoder.float()  # the vectors' gradient passes through it, and it is a seventh of the UNet
    table = sd.text_encoder.text_model.embeddings.token_embedding.weight
    rows = table[start].repeat(count, 1)  # (n, d)
    try:
        return token_embedding.add_token(sd.tokenizer, sd.text_encoder, token, rows)
    except ValueError as e:
        raise ValueError(f"{flag}: {e}") from None
