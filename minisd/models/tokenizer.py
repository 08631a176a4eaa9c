"""The tokenizer of the CLIP text encoder: byte pair encoding, and tokens added to it."""

import re
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from minisd import reading
from minisd.options import check_text, require

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: the two marks, an English ending, letters, one digit, or a run of other characters.
WORDS = rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"

LONG = 10_000  # characters


def byte_pairs(folder: Path) -> tokenizers.Tokenizer:
    """The byte pair encoding in a folder with vocab.json and merges.txt. ValueError if there is none.

    It is assembled here because importing transformers takes longer than generating a small image. Only a
    folder with a changed tokenizer is read by transformers.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in names & {"vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"}:
        reading.check_regular(folder / name)
    if {"tokenizer.json", "added_tokens.json"} & names:
        return _transformers_tokenizer(folder).backend_tokenizer
    require({"vocab.json", "merges.txt"} <= names, f"{folder} has no tokenizer: no vocab.json and merges.txt")
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    try:
        model = models.BPE.from_file(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    except Exception as e:  # tokenizers raises no narrower class
        raise ValueError(f"{folder} has no readable tokenizer: {e}") from None
    bpe = tokenizers.Tokenizer(model)
    blanks = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    bpe.add_special_tokens([START, END])
    return bpe


def _transformers_tokenizer(folder: Path):
    """The tokenizer in a folder, as transformers reads it; this one can also be saved."""
    from transformers import CLIPTokenizer  # the only use of transformers; takes a second to import

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # of whatever class
        raise ValueError(f"{folder} has no readable tokenizer: {type(e).__name__}: {e}") from None


def beginning(text: str, tokens: int) -> str:
    """As much of a text as its first `tokens` tokens need, or all of it unless it is very long: encoding a
    megabyte takes ten seconds."""
    if len(text) <= LONG:
        return text
    return " ".join(word[:LONG] for word in text.split(maxsplit=2 * tokens)[: 2 * tokens])


class Tokenizer:
    """Turns prompts into ids (b, max_length): start, at most max_length - 2 tokens, end, and end as padding.

    A placeholder is an added token: one or more ids after those of the vocabulary, which replace its name
    wherever a prompt contains it, in upper or lower case.
    """

    def __init__(self, folder: Path, max_length: int):
        self.folder = folder
        self.max_length = max_length
        self.bpe = byte_pairs(folder)
        self.vocab_size: int = self.bpe.get_vocab_size()
        self.start, self.end = self.bpe.token_to_id(START), self.bpe.token_to_id(END)
        self.check_ids(self.start, self.end)
        self.placeholders: dict[str, list[int]] = {}

    def check_ids(self, *ids: int | None) -> None:
        """ValueError if an id is none of a vocabulary that is numbered from 0."""
        known = all(i is not None and i < self.vocab_size for i in ids)
        require(known, f"{self.folder}: the ids of its {self.vocab_size} tokens are not 0, 1, 2, ...")

    def add_placeholder(self, token: str, num_vectors: int = 1) -> list[int]:
        """Give `token` the next `num_vectors` ids, and return them. ValueError if it is a token already."""
        token = self.check_placeholder(token)
        first = self.vocab_size + sum(len(ids) for ids in self.placeholders.values())
        self.placeholders[token] = list(range(first, first + num_vectors))
        return self.placeholders[token]

    def check_placeholder(self, token: str) -> str:
        """Return the token in lower case. ValueError if it is taken, empty, or has blanks around it."""
        if not token or token != token.strip():
            raise ValueError(f"placeholder {token!r} is empty or begins or ends with a blank")
        token = token.lower()
        known = (self.bpe.token_to_id(t) for t in (token, f"{token}</w>"))
        problem = f"placeholder {token!r} is a token already; choose another, for example '<{token}>'"
        require(not (token in self.placeholders or any(i is not None for i in known)), problem)
        return token

    def save(self, folder: Path) -> Path:
        """Write the tokenizer with its placeholders; one of n vectors is written as token, token_1, ...,
        token_(n-1). Return its folder: without placeholders the one it was read from, else `folder`."""
        if not self.placeholders:
            return self.folder
        tokenizer = _transformers_tokenizer(self.folder)
        for token, ids in self.placeholders.items():
            tokenizer.add_tokens([token, *(f"{token}_{i}" for i in range(1, len(ids)))])
        tokenizer.save_pretrained(str(folder))
        return folder

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start, end, truncation or padding."""
        return [i for unit in self.units(text) for i in unit]

    def units(self, text: str) -> list[list[int]]:
        """As `encode`, grouped into what must stay together: single ids, and all ids of a placeholder."""
        longest_first = sorted(self.placeholders, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        pieces = re.split(pattern, text, flags=re.IGNORECASE) if longest_first else [text]
        units = []
        for piece in pieces:
            known = self.placeholders.get(piece.lower())
            ids = [] if known else self.bpe.encode(piece, add_special_tokens=False).ids
            self.check_ids(*ids)
            units += [known] if known else [[i] for i in ids]
        return units

    def one(self, word: str) -> int | None:
        """The id of a word that is one token, or else that of the vocabulary's entry with this name, or None.
        (No text is encoded to the entry "ktn", which Custom Diffusion uses.)"""
        ids = self.encode(word)
        return ids[0] if len(ids) == 1 else self.bpe.token_to_id(word)

    def __call__(self, prompts: list[str]) -> Tensor:
        room = self.max_length - 2
        texts = [beginning(prompt, room) for prompt in prompts]
        for text in texts:
            check_text(text, "a prompt")
        rows = [[self.start, *self.encode(text)[:room], self.end] for text in texts]
        return torch.tensor([row + [self.end] * (self.max_length - len(row)) for row in rows])
