"""The CLIP text encoder (Radford et al. 2021, arXiv 2103.00020) and its tokenizer."""

import re
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from minisd import ops
from minisd.models.layers import LayerNorm


@dataclass(kw_only=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    activation: str  # a key of ACTIVATIONS
    eps: float


SD15 = TextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    max_positions=77,
    activation="quick_gelu",
    eps=1e-5,
)

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(ops.attention(q, k, v, causal=True).flatten(-2))  # (b, s, d)


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.layer_norm2.add(self.self_attn(self.layer_norm1(x)), x)
        return x + self.mlp(h)


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]  # (b, s, d)


class TextTransformer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers))}
        )
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        x = self.embeddings(ids)
        layers = self.encoder["layers"]
        for layer in layers[: len(layers) - skip]:
            x = layer(x)
        return self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """Token ids (b, s) -> context (b, s, d): the last layer's states behind the final LayerNorm, or those of
    the layer `skip` before it. Causal; the padding is attended to, as SD was trained."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.final_layer_norm.weight.dtype

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        return self.text_model(ids, skip)


START, END = "<|startoftext|>", "<|endoftext|>"
# Words as CLIP cuts them: the two marks, an English ending, letters, one digit, or neither of them.
WORDS = rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


def byte_pairs(folder: Path) -> tokenizers.Tokenizer:
    """The byte pair encoding of a folder with vocab.json and merges.txt. ValueError if it has none.

    It is put together here, for importing transformers to do the same takes longer than to draw a small
    picture. Only a folder in which a tokenizer has been changed is read by transformers.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {"tokenizer.json", "added_tokens.json"} & names:
        return clip_tokenizer(folder).backend_tokenizer
    if not {"vocab.json", "merges.txt"} <= names:
        raise ValueError(f"{folder} has no tokenizer: no vocab.json and merges.txt")
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    try:
        model = models.BPE.from_file(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    except Exception as e:  # it has no narrower class
        raise ValueError(f"{folder} has no readable tokenizer: {e}") from None
    bpe = tokenizers.Tokenizer(model)
    blanks = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    bpe.add_special_tokens([START, END])
    return bpe


def clip_tokenizer(folder: Path):
    """The same as transformers' class, which writes it too."""
    from transformers import CLIPTokenizer  # the only use of transformers; takes a second to import

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


class Tokenizer:
    """Prompts to ids (b, max_length): start, at most max_length - 2 tokens, end, and padding with end.

    A placeholder is a token of our own: one or more ids behind the vocabulary's. Wherever it stands in a
    prompt it becomes its ids, whatever its case.
    """

    def __init__(self, folder: Path, max_length: int):
        self.folder = folder
        self.max_length = max_length
        self.bpe = byte_pairs(folder)
        self.vocab_size: int = self.bpe.get_vocab_size()
        self.start, self.end = self.bpe.token_to_id(START), self.bpe.token_to_id(END)
        self.placeholders: dict[str, list[int]] = {}

    def add_placeholder(self, token: str, num_vectors: int = 1) -> list[int]:
        """Give `token` the next `num_vectors` ids. ValueError if it means something already."""
        token = self.check_placeholder(token)
        first = self.vocab_size + sum(len(ids) for ids in self.placeholders.values())
        self.placeholders[token] = list(range(first, first + num_vectors))
        return self.placeholders[token]

    def check_placeholder(self, token: str) -> str:
        """The token as it is looked up. ValueError if it means something already."""
        if not token or token != token.strip():
            raise ValueError(f"placeholder {token!r} is empty or begins or ends with a blank")
        token = token.lower()
        known = (self.bpe.token_to_id(t) for t in (token, f"{token}</w>"))
        if token in self.placeholders or any(i is not None for i in known):
            raise ValueError(
                f"placeholder {token!r} is a token already; choose another, for example '<{token}>'"
            )
        return token

    def save(self, folder: Path) -> Path:
        """The folder of a tokenizer that knows the placeholders too: this one's own if there are none, else
        `folder`, where it is written with n vectors as token, token_1, ..., token_(n-1)."""
        if not self.placeholders:
            return self.folder
        written = clip_tokenizer(self.folder)
        for token, ids in self.placeholders.items():
            written.add_tokens([token, *(f"{token}_{i}" for i in range(1, len(ids)))])
        written.save_pretrained(str(folder))
        return folder

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start, end, truncation or padding."""
        return [i for unit in self.units(text) for i in unit]

    def units(self, text: str) -> list[list[int]]:
        """The same, in what may not be cut apart: each id by itself, and all those of a placeholder."""
        longest_first = sorted(self.placeholders, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        pieces = re.split(pattern, text, flags=re.IGNORECASE) if longest_first else [text]
        units = []
        for piece in pieces:
            known = self.placeholders.get(piece.lower())
            units += [known] if known else [[i] for i in self.bpe.encode(piece, add_special_tokens=False).ids]
        return units

    def one(self, word: str) -> int | None:
        """The id of a word that is one token, or else the vocabulary's entry of that very name: "ktn", Custom
        Diffusion's, is one that no text becomes. None if there is neither."""
        ids = self.encode(word)
        return ids[0] if len(ids) == 1 else self.bpe.token_to_id(word)

    def __call__(self, prompts: list[str]) -> Tensor:
        return torch.tensor([self._padded(p) for p in prompts])  # (b, max_length)

    def _padded(self, prompt: str) -> list[int]:
        ids = [self.start, *self.encode(prompt)[: self.max_length - 2], self.end]
        return ids + [self.end] * (self.max_length - len(ids))
