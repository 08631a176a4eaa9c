"""New tokens: extra rows after the text encoder's frozen table (Gal et al. 2022, arXiv 2208.01618).

A file is {token: (d,) or (n, d)}, as diffusers writes it; or it holds one token, named after the file:
{"emb_params": (n, d)}, or {"string_to_param": {"*": (n, d)}, ...} as A1111 and the authors write it. In LoRA
files, `bundle_emb.TOKEN.` comes before any of these keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters._adapter import Adapter
from minisd.models.text import TextConfig, TextEncoder
from minisd.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

PARAM, BUNDLE = "string_to_param.", "bundle_emb."
NAMELESS = ("emb_params", "*")  # keys that stand for the file's name
SDXL = {"clip_l", "clip_g"}


class TokenEmbedding(nn.Embedding):
    """An embedding table whose higher ids are rows of a parameter `extra` (n, d), in fp32."""

    @classmethod
    def of(cls, table: nn.Embedding, extra: Tensor) -> TokenEmbedding:
        self = cls(*table.weight.shape, _weight=table.weight)  # so that none is drawn at random
        self.weight = table.weight
        self.extra = nn.Parameter(extra)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        known = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        extra = F.embedding((ids - self.num_embeddings).clamp(min=0), self.extra).to(known.dtype)
        return torch.where((ids >= self.num_embeddings)[..., None], extra, known)  # (b, s, d)


def add_token(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str, rows: Tensor) -> nn.Parameter:
    """Add a token to both, with its rows (n, d). Return the parameter that holds all extra rows."""
    tokenizer.add_placeholder(token, len(rows))
    embeddings = text_encoder.text_model.embeddings
    table = embeddings.token_embedding
    rows = rows.detach().to(table.weight.device, torch.float32)
    if isinstance(table, TokenEmbedding):
        rows = torch.cat([table.extra.detach(), rows])
    embeddings.token_embedding = TokenEmbedding.of(table, rows)
    return embeddings.token_embedding.extra


def merged(text_encoder: TextEncoder, tensors: dict[str, Tensor]) -> tuple[TextConfig, dict[str, Tensor]]:
    """Return the text encoder's config and `tensors` with the extra rows as part of its table."""
    name = "text_model.embeddings.token_embedding"
    if (extra := tensors.pop(f"{name}.extra", None)) is not None:
        table = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = torch.cat([table, extra.to(table)])
    return replace(text_encoder.config, vocab_size=len(tensors[f"{name}.weight"])), tensors


def save(path: Path, token: str, rows: Tensor, metadata: dict[str, str]) -> None:
    """Write {token: (n, d)} in fp32, as .safetensors or, for programs that read nothing else, as .bin."""
    tensors = {token: rows.detach().float().cpu().contiguous()}
    if path.suffix == files.SAFETENSORS:
        files.write(path, tensors, metadata)
    else:
        files.write_pickle(path, tensors)


def matches(tensors: Mapping[str, Tensor]) -> bool:
    if any(name.startswith((PARAM, BUNDLE)) for name in tensors) or SDXL & tensors.keys():
        return True
    return all(t.ndim in (1, 2) for t in tensors.values()) and not any(
        name.endswith((".weight", ".bias", ".alpha")) for name in tensors
    )


def read(
    sd: StableDiffusion, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path
) -> Adapter:
    """Return the tokens of a file. ValueError, naming it, if a token cannot be added to the model."""
    tokens: dict[str, Tensor] = {}
    for key, rows in tensors.items():
        bundled, token, key = key.startswith(BUNDLE), source.stem, key.removeprefix(BUNDLE)
        if bundled:
            token, _, key = key.partition(".")
        if key in SDXL:
            raise ValueError(f"{source} is an embedding for SDXL ({key}); minisd is for SD v1.x")
        if key.startswith("string_to_token."):  # the id of "*" in the vocabulary
            continue
        if not (bundled or key in NAMELESS or key.startswith(PARAM)):
            token = key
        if rows.ndim not in (1, 2) or not rows.numel() or token in tokens:
            raise ValueError(f"{source}: {key} {tuple(rows.shape)} is no embedding in a known format")
        tokens[token] = rows[None] if rows.ndim == 1 else rows  # (n, d)
    width, counts = sd.text_encoder.config.hidden_size, []
    for token, rows in tokens.items():
        if rows.shape[-1] != width:
            kind = {768: "SD v1.x", 1024: "SD2", 1280: "SDXL"}.get(rows.shape[-1], "another model")
            raise ValueError(
                f"{source}: {token} is {rows.shape[-1]} wide, for {kind}; this model's text encoder {width}"
            )
        try:
            sd.tokenizer.check_placeholder(token)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        counts.append(f"{token} ({len(rows)} vector{'s' if len(rows) > 1 else ''})")
    return Adapter(description=", ".join(counts), tokens=tokens)
