"""New tokens: rows of their own behind the text encoder's frozen table (Gal et al. 2022, arXiv 2208.01618).

The file is {token: (d,) or (n, d)}, as diffusers writes it; or it holds one token, which has the file's
name: {"emb_params": (n, d)}, or {"string_to_param": {"*": (n, d)}, ...} as A1111 and the authors write it.
LoRA files may carry either with `bundle_emb.TOKEN.` before their keys.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minisd import files
from minisd.adapters._adapter import Adapter
from minisd.models.text import TextConfig, TextEncoder
from minisd.models.tokenizer import Tokenizer

PARAM, BUNDLE = "string_to_param.", "bundle_emb."
NAMELESS = ("emb_params", "*")  # keys that stand for the file's name
SDXL = {"clip_l", "clip_g"}


class TokenEmbedding(nn.Embedding):
    """`weight` is the table as it was; ids behind it are rows of the parameter `extra` (n, d), in fp32."""

    @classmethod
    def of(cls, table: nn.Embedding, extra: Tensor) -> "TokenEmbedding":
        self = cls(*table.weight.shape, _weight=table.weight)  # drawing one would be for nothing
        self.weight = table.weight
        self.extra = nn.Parameter(extra)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        known = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        extra = F.embedding((ids - self.num_embeddings).clamp(min=0), self.extra).to(known.dtype)
        return torch.where((ids >= self.num_embeddings)[..., None], extra, known)  # (b, s, d)


def insert(text_encoder: TextEncoder, rows: Tensor) -> nn.Parameter:
    """Put rows (n, d) behind the table; returns the parameter of all extra rows."""
    embeddings = text_encoder.text_model.embeddings
    table = embeddings.token_embedding
    rows = rows.detach().to(table.weight.device, torch.float32)
    if isinstance(table, TokenEmbedding):
        rows = torch.cat([table.extra.detach(), rows])
    embeddings.token_embedding = TokenEmbedding.of(table, rows)
    return embeddings.token_embedding.extra


def add_token(tokenizer: Tokenizer, text_encoder: TextEncoder, token: str, rows: Tensor) -> nn.Parameter:
    """Teach both the token, with its rows (n, d)."""
    tokenizer.add_placeholder(token, len(rows))
    return insert(text_encoder, rows)


def merged(
    text_encoder: TextEncoder, tensors: dict[str, Tensor] | None = None
) -> tuple[TextConfig, dict[str, Tensor]]:
    """Config and tensors (`tensors`, or its own) of the text encoder, the extra rows part of its table."""
    tensors = text_encoder.state_dict() if tensors is None else tensors
    name = "text_model.embeddings.token_embedding"
    if (extra := tensors.pop(f"{name}.extra", None)) is not None:
        table = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = torch.cat([table, extra.to(table)])
    return replace(text_encoder.config, vocab_size=len(tensors[f"{name}.weight"])), tensors


def save(path: Path, token: str, rows: Tensor, metadata: dict[str, str]) -> None:
    """{token: (n, d)} in fp32; a .bin for tools that read nothing else."""
    tensors = {token: rows.detach().float().cpu().contiguous()}
    if path.suffix == files.SAFETENSORS:
        files.write(path, tensors, metadata)
    else:
        files.write_pickle(path, tensors)


def matches(tensors: dict[str, Tensor]) -> bool:
    if any(name.startswith((PARAM, BUNDLE)) for name in tensors) or SDXL & tensors.keys():
        return True
    return all(t.ndim in (1, 2) for t in tensors.values()) and not any(
        name.endswith((".weight", ".bias", ".alpha")) for name in tensors
    )


def read(sd, tensors: dict[str, Tensor], source: Path) -> Adapter:
    """The file's tokens."""
    tokens = {}
    for key, rows in tensors.items():
        bundled, name, key = key.startswith(BUNDLE), source.stem, key.removeprefix(BUNDLE)
        if bundled:
            name, _, key = key.partition(".")
        if key in SDXL:
            raise ValueError(f"{source} is an embedding for SDXL ({key}); minisd is for SD v1.x")
        if key.startswith("string_to_token."):  # an id in the vocabulary of whoever trained it
            continue
        token = name if bundled or key in NAMELESS or key.startswith(PARAM) else key
        if rows.ndim not in (1, 2) or token in tokens:
            raise ValueError(f"{source}: {key} {tuple(rows.shape)} is no embedding that is known here")
        tokens[token] = rows[None] if rows.ndim == 1 else rows  # (n, d)
    check(sd, tokens, source)
    return Adapter(about=describe(tokens), tokens=tokens)


def describe(tokens: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{t} ({len(rows)} vector{'s' if len(rows) > 1 else ''})" for t, rows in tokens.items())


def check(sd, tokens: Mapping[str, Tensor], source: Path) -> None:
    """ValueError, naming the file, if one of the tokens cannot be added to the model."""
    width = sd.text_encoder.config.hidden_size
    for token, rows in tokens.items():
        if rows.shape[-1] != width:
            kind = {768: "SD v1.x", 1024: "SD2", 1280: "SDXL"}.get(rows.shape[-1], "another model")
            raise ValueError(
                f"{source}: {token} is {rows.shape[-1]} wide, for {kind}; this model's text encoder {width}"
            )
        try:
            sd.tokenizer.check_placeholder(token)
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from None
