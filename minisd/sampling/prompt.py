"""A1111's prompt syntax: weights, chunks, and LoRAs by name.

(word) counts 1.1 times, (word:1.3) 1.3 times, [word] 1 / 1.1 times, and nested brackets multiply; one that is
never closed reaches to the end. A backslash before a bracket makes it a character. BREAK begins a new chunk:
the encoder sees 75 tokens at a time, and the contexts of the chunks are concatenated.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd import files
from minisd.models.tokenizer import Tokenizer
from minisd.sampling.options import Settings

if TYPE_CHECKING:
    from minisd.sampling.stable_diffusion import StableDiffusion

Section = list[tuple[str, float]]  # what stands between two BREAKs, as spans of text with their weights
Chunk = list[tuple[int, float]]  # ids and weights, as many as the encoder has positions

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
PIECE = re.compile(rf"\\(?P<escaped>[\\()\[\]]?)|:\s*(?P<weight>{NUMBER})\s*\)|[()\[\]:]|[^\\()\[\]:]+")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What means something in A1111 and is not supported here: better refused than drawn as something else.
UNSUPPORTED = (
    (re.compile(rf"(?<!\\)\[[^\[\]]*:\s*{NUMBER}\s*\]"), "[from:to:when]"),
    (re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"), "[a|b]"),
    (re.compile(r"\bAND\b"), "AND"),
    (re.compile(r"<hypernet:[^<>]*>"), "<hypernet:...>"),
)
LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
BACKTRACK = 20  # tokens that may move to the next chunk, so that it begins behind a comma


@dataclass(kw_only=True)
class Prompt:
    """A prompt, parsed."""

    text: str  # as it was written
    sections: list[Section] = field(default_factory=lambda: [[]])  # without the <lora:...>
    loras: dict[str, tuple[float, float]] = field(default_factory=dict)  # scales of text encoder and UNet
    plain: bool = False  # `text` itself is to be encoded
    negative: Prompt | None = None  # the negative prompt that goes with it
    chunks: list[Chunk] = field(default_factory=list)  # known once there is a tokenizer: see `prepare`


# Parsing


def parse(text: str, plain: bool = False) -> Prompt:
    """The prompt of a text; if it is `plain`, that text as it is. ValueError for what has a meaning in A1111
    and is not supported."""
    if plain:
        return Prompt(text=text, plain=True)
    return Prompt(text=text, sections=_sections(LORA.sub("", text)), loras=_loras(text))


def parse_all(texts: Sequence[str], settings: Settings) -> list[Prompt]:
    """The prompts of some texts, each with the negative prompt of the settings. Every text is parsed once,
    however often it occurs."""
    negative = parse(settings.negative_prompt, settings.plain_prompt)
    if negative.loras:
        raise ValueError("--negative_prompt has a <lora:...>: it acts on both, and belongs into --prompt")
    prompts = {text: parse(text, settings.plain_prompt) for text in dict.fromkeys(texts)}
    return [replace(prompts[text], negative=negative) for text in texts]


def _sections(text: str) -> list[Section]:
    """What stands between BREAKs, as spans with their weights; neighbours differ in weight."""
    for pattern, form in UNSUPPORTED:
        if match := pattern.search(text):
            raise ValueError(
                f"prompt: {form} is not supported ({match[0]!r}); --plain_prompt takes it as text"
            )
    spans: Section = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each begins

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        spans[start:] = [(span, weight * factor) for span, weight in spans[start:]]

    for match in PIECE.finditer(text):
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

    sections: list[Section] = [[]]
    for weight, run in groupby(spans, key=lambda span: span[1]):
        first, *rest = BREAK.split("".join(span for span, _ in run))
        sections[-1].append((first, weight))
        sections += [[(span, weight)] for span in rest]
    return sections


def _loras(text: str) -> dict[str, tuple[float, float]]:
    """The scales of each <lora:NAME:SCALE> and <lora:NAME:TEXT:UNET>, added up if a name occurs twice."""
    loras: dict[str, tuple[float, float]] = {}
    for inside in LORA.findall(text):
        name, *values = inside.split(":")
        by_place = (
            v if "=" in v else f"{part}={v}" for part, v in zip(("te", "unet", ""), values, strict=False)
        )
        scales = dict(value.split("=", 1) for value in by_place)
        try:
            text_scale = float(scales.pop("te", 1.0))
            unet_scale = float(scales.pop("unet", text_scale))
            if scales or not name:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"prompt: <lora:{inside}> is not <lora:NAME:SCALE> or <lora:NAME:TEXT:UNET>"
            ) from None
        before = loras.get(name, (0.0, 0.0))
        loras[name] = before[0] + text_scale, before[1] + unet_scale
    return loras


# Tokens and contexts


def prepare(sd: StableDiffusion, prompts: Sequence[str | Prompt], settings: Settings) -> list[Prompt]:
    """The prompts parsed, with the model's tokens, and with their LoRAs attached to it. What is done already
    stays as it is."""
    if not all(isinstance(prompt, Prompt) for prompt in prompts):
        prompts = parse_all(prompts, settings)
    attach_loras(sd, prompts, settings.lora_dir)
    for prompt in prompts:
        for one in (prompt, prompt.negative):
            one.chunks = one.chunks or tokenize(sd.tokenizer, one)
    return prompts


def tokenize(tokenizer: Tokenizer, prompt: Prompt) -> list[Chunk]:
    """The prompt as the text encoder reads it; if it is plain, one chunk, cut off where it is full."""
    if prompt.plain:
        return [[(i, 1.0) for i in tokenizer([prompt.text])[0].tolist()]]
    room, comma = tokenizer.max_length - 2, tokenizer.encode(",")
    done: list[Chunk] = []
    for section in prompt.sections:
        chunk: Chunk = []
        behind_comma = 0
        for unit, weight in ((unit, weight) for span, weight in section for unit in tokenizer.units(span)):
            if len(unit) > room:
                raise ValueError(f"prompt: an embedding of {len(unit)} vectors; a chunk has room for {room}")
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
    start, end = (tokenizer.start, 1.0), (tokenizer.end, 1.0)
    return [[start, *chunk, *[end] * (room - len(chunk)), end] for chunk in done]


def contexts(
    sd: StableDiffusion, prompts: Sequence[Prompt], settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Context (b, k * s, d) of the prompts, and of their negative prompts with guidance: all of as many
    chunks k as the longest needs, filled up with empty ones."""
    positive = [prompt.chunks for prompt in prompts]
    negative = [prompt.negative.chunks for prompt in prompts] if settings.guidance_scale > 1 else []
    count = max(map(len, positive + negative))
    context = _encode(sd, positive, count, settings.clip_skip)
    return context, _encode(sd, negative, count, settings.clip_skip) if negative else None


def _encode(sd: StableDiffusion, texts: Sequence[list[Chunk]], count: int, clip_skip: int) -> Tensor:
    empty = tokenize(sd.tokenizer, Prompt(text=""))
    rows = [chunk for chunks in texts for chunk in chunks + empty * (count - len(chunks))]
    ids = torch.tensor([[i for i, _ in row] for row in rows])  # (b * count, s)
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    z = sd.encode_ids(ids, clip_skip)  # (b * count, s, d)
    if (weights != 1).any():
        z = emphasise(z, weights.to(z.device))
    return z.unflatten(0, (-1, count)).flatten(1, 2)  # (b, count * s, d)


def emphasise(z: Tensor, weights: Tensor) -> Tensor:
    """Each token of z (b, s, d) times its weight (b, s), then all brought back to the mean of before. That is
    the mean of each chunk; A1111 takes it over the batch, where one prompt would change another."""
    before = z.float()
    after = before * weights[..., None]
    mean = (1, 2)
    return (after * (before.mean(mean, keepdim=True) / after.mean(mean, keepdim=True))).to(z.dtype)


# LoRAs


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


def lora_names(prompts: Iterable[Prompt]) -> list[str]:
    return sorted({name for prompt in prompts for name in prompt.loras})


def attach_loras(sd: StableDiffusion, prompts: Iterable[Prompt], folder: Path | None) -> None:
    """Attach the LoRAs that prompts name, each once, at scale 0; prints what they are. ValueError, naming it,
    if one is not there or is none."""
    for name in lora_names(prompts):
        path = find_lora(folder, name)
        if path.resolve() not in sd.attached:
            for line in sd.attach(path, 0.0):
                print(f"<lora:{name}>: {line}")
        if not sd.attached[path.resolve()].parts:
            raise ValueError(f"prompt: <lora:{name}>: {path} is no LoRA, and has no scale")


@contextmanager
def loras_on(
    sd: StableDiffusion, loras: Mapping[str, tuple[float, float]], folder: Path | None
) -> Iterator[None]:
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
