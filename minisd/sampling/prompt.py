"""A1111's prompt syntax: weights, chunks, and LoRAs by name.

(word) counts 1.1 times, (word:1.3) 1.3 times, [word] 1 / 1.1 times, and nested brackets multiply; one that is
never closed reaches to the end. A backslash before a bracket makes it a character. BREAK begins a new chunk:
the encoder sees 75 tokens at a time, and the chunks' contexts are laid side by side.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from minisd import files
from minisd.models.tokenizer import Tokenizer

Chunk = list[tuple[int, float]]  # ids and weights, as many as the encoder has positions

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
PIECE = re.compile(rf"\\(?P<escaped>[\\()\[\]]?)|:\s*(?P<weight>{NUMBER})\s*\)|[()\[\]:]|[^\\()\[\]:]+")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What A1111 reads otherwise and this file does not: better refused than drawn as something else.
UNKNOWN = (
    (re.compile(rf"(?<!\\)\[[^\[\]]*:\s*{NUMBER}\s*\]"), "[from:to:when]"),
    (re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"), "[a|b]"),
    (re.compile(r"\bAND\b"), "AND"),
    (re.compile(r"<hypernet:[^<>]*>"), "<hypernet:...>"),
)
LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
BACKTRACK = 20  # tokens that may move to the next chunk, so that it begins behind a comma


# --- Weights and chunks ----------------------------------------------------------------------------------


def parse(prompt: str) -> list[list[tuple[str, float]]]:
    """The sections between BREAKs, each as spans of text with their weights; neighbours differ in weight.

    ValueError for what has another meaning in A1111 and none here.
    """
    for pattern, form in UNKNOWN:
        if found := pattern.search(prompt):
            raise ValueError(
                f"prompt: {form} has no meaning here ({found[0]!r}); --plain_prompt takes it as text"
            )
    spans: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each begins

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        spans[start:] = [(text, weight * factor) for text, weight in spans[start:]]

    for match in PIECE.finditer(prompt):
        piece = match[0]
        if piece in opened:
            opened[piece].append(len(spans))
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif piece == ")" and opened["("]:
            close("(", 1.1)
        elif piece == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            spans.append((piece if match["escaped"] is None else match["escaped"], 1.0))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)

    sections: list[list[tuple[str, float]]] = [[]]
    for weight, run in groupby(spans, key=lambda span: span[1]):
        first, *rest = BREAK.split("".join(text for text, _ in run))
        sections[-1].append((first, weight))
        sections += [[(text, weight)] for text in rest]
    return sections


def chunks(tokenizer: Tokenizer, prompt: str, plain: bool = False) -> list[Chunk]:
    """The prompt as the text encoder reads it. If it is `plain`, one chunk, cut off where it is full."""
    if plain:
        return [[(i, 1.0) for i in tokenizer([prompt])[0].tolist()]]
    room, comma = tokenizer.max_length - 2, tokenizer.encode(",")
    done: list[Chunk] = []
    for section in parse(prompt):
        chunk: Chunk = []
        behind_comma = 0
        for text, weight in section:
            for unit in tokenizer.units(text):
                if len(unit) > room:
                    raise ValueError(
                        f"prompt: an embedding of {len(unit)} vectors; a chunk has room for {room}"
                    )
                if unit == comma:
                    behind_comma = len(chunk) + 1
                elif len(chunk) == room and behind_comma > room - BACKTRACK:
                    done.append(chunk[:behind_comma])
                    chunk, behind_comma = chunk[behind_comma:], 0
                if len(chunk) + len(unit) > room:
                    done.append(chunk)
                    chunk, behind_comma = [], 0
                chunk += [(i, weight) for i in unit]
        done.append(chunk)
    if len(done) > 1 and not done[-1]:
        done.pop()  # nothing stands behind the last BREAK
    end = (tokenizer.end, 1.0)
    return [[(tokenizer.start, 1.0), *chunk, *[end] * (room - len(chunk)), end] for chunk in done]


def contexts(
    sd, prompts: Sequence[str], negative: str | None, *, clip_skip: int = 1, plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Context (b, k * s, d) of the prompts, and of as many copies of the negative one if there is one: all as
    long as the longest needs, of k chunks, filled up with empty ones."""
    texts = [chunks(sd.tokenizer, prompt, plain) for prompt in prompts]
    others = [] if negative is None else [chunks(sd.tokenizer, negative, plain)] * len(prompts)
    count = max(map(len, texts + others))
    context = _encode(sd, texts, count, clip_skip)
    return context, _encode(sd, others, count, clip_skip) if others else None


def _encode(sd, texts: Sequence[list[Chunk]], count: int, clip_skip: int) -> Tensor:
    empty = chunks(sd.tokenizer, "")
    rows = [chunk for text in texts for chunk in text + empty * (count - len(text))]
    ids = torch.tensor([[i for i, _ in row] for row in rows])  # (b * count, s)
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    z = sd.encode_ids(ids, clip_skip)  # (b * count, s, d)
    if (weights != 1).any():
        z = emphasise(z, weights.to(z.device))
    return z.unflatten(0, (-1, count)).flatten(1, 2)  # (b, count * s, d)


def emphasise(z: Tensor, weights: Tensor) -> Tensor:
    """Each token of z (b, s, d) times its weight (b, s), and all of them brought back to the mean of before.
    A1111 takes the mean over the batch; here it is each chunk's own, so that none changes another."""
    before = z.float()
    after = before * weights[..., None]
    mean = (1, 2)
    return (after * (before.mean(mean, keepdim=True) / after.mean(mean, keepdim=True))).to(z.dtype)


# --- LoRAs -----------------------------------------------------------------------------------------------


def take_loras(prompt: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """The prompt without its <lora:NAME:SCALE> and <lora:NAME:TEXT:UNET>, and the scales of each name, that
    of the text encoder first. A name that stands there twice counts twice."""
    found: dict[str, tuple[float, float]] = {}
    for inside in LORA.findall(prompt):
        name, *given = inside.split(":")
        places = dict(enumerate(g for g in given if "=" not in g)) | dict(
            g.split("=", 1) for g in given if "=" in g
        )
        try:
            text = float(places.pop("te", places.pop(0, 1.0)))
            unet = float(places.pop("unet", places.pop(1, text)))
        except ValueError:
            places = {"": inside}
        if places or not name:
            raise ValueError(f"prompt: <lora:{inside}> is not <lora:NAME:SCALE> or <lora:NAME:TEXT:UNET>")
        before = found.get(name, (0.0, 0.0))
        found[name] = before[0] + text, before[1] + unet
    return LORA.sub("", prompt), found


def find_lora(folder: Path | None, name: str) -> Path:
    """The file of that stem, or the folder of that name, in `folder` or below it, the nearest first."""
    if folder is None:
        raise ValueError(f"prompt: <lora:{name}> is looked up in --lora_dir, which is not given")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--lora_dir {folder} is not a folder")
    known: dict[str, Path] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: (len(path.parts), path)):
        if path.is_dir() or path.suffix in (files.SAFETENSORS, *files.PICKLES):
            known.setdefault(path.name if path.is_dir() else path.stem, path)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)
        near = f"; the nearest name is {close[0]!r}" if close else ""
        raise ValueError(f"prompt: <lora:{name}> is not in --lora_dir {folder}{near}")
    return known[name]


def lora_names(prompts: Iterable[str]) -> list[str]:
    return sorted({name for prompt in prompts for name in take_loras(prompt)[1]})


def attach_loras(sd, prompts: Iterable[str], folder: Path | None) -> list[str]:
    """Attach the LoRAs that prompts name, each once, at scale 0; returns what those were that are new, for
    people. ValueError, naming it, if one is not there or is none."""
    said = []
    for name in lora_names(prompts):
        path = find_lora(folder, name)
        if path.resolve() not in sd.attached:
            said += [f"<lora:{name}>: {line}" for line in sd.attach(path, 0.0)]
        if not sd.attached[path.resolve()].parts:
            raise ValueError(f"prompt: <lora:{name}>: {path} is no LoRA, and has no scale")
    return said


@contextmanager
def loras_on(sd, loras: Mapping[str, tuple[float, float]], folder: Path | None) -> Iterator[None]:
    """Attached LoRAs at these scales of the text encoder and the UNet, added to what theirs were."""
    before = []
    for name, (text, unet) in loras.items():
        attached = sd.attached[find_lora(folder, name).resolve()]
        before.append((attached, attached.scales))
        more = {"unet": unet, "text_encoder": text}
        attached.set_scales({part: scale + more[part] for part, scale in attached.scales.items()})
    try:
        yield
    finally:
        for attached, scales in reversed(before):
            attached.set_scales(scales)
