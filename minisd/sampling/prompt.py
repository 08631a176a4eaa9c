"""A1111's prompt syntax: weights, chunks, and LoRAs by name.

(word) has weight 1.1, (word:1.3) weight 1.3, [word] weight 1 / 1.1, and nested brackets multiply; an unclosed
bracket extends to the end. A backslash makes the next bracket plain text. BREAK begins a new chunk: the text
encoder takes 75 tokens at a time, and the contexts of the chunks are concatenated.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd import files, reading
from minisd.models.tokenizer import Tokenizer
from minisd.options import check_text, require
from minisd.sampling.options import Settings

if TYPE_CHECKING:
    from minisd.sampling.generate import Model

Section = list[tuple[str, float]]  # the text between two BREAKs: spans and their weights
Chunk = list[tuple[int, float]]  # token ids and weights, one for each position of the text encoder

# Possessive (++): a text of n characters is searched in a time proportional to n.
NUMBER = r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)"
PIECE = re.compile(rf"\\(?P<escaped>[\\()\[\]]?)|:\s*(?P<weight>{NUMBER})\s*\)|[()\[\]:]|[^\\()\[\]:]+")
BREAK = re.compile(r"\bBREAK\b")
# A1111's syntax that is not supported here: refused, because as plain text it would mean something else.
UNSUPPORTED = (
    (re.compile(rf"(?<!\\)\[[^\[\]]*:\s*{NUMBER}\s*\]"), "[from:to:when]"),
    (re.compile(r"(?<!\\)\[[^\[\]|]*+\|[^\[\]]*+\]"), "[a|b]"),
    (re.compile(r"\bAND\b"), "AND"),
    (re.compile(r"<hypernet:[^<>]*>"), "<hypernet:...>"),
)
LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
MAX_DEPTH = 50  # of nested brackets; each multiplies the weights of all that it encloses
BACKTRACK = 20  # most tokens that move to the next chunk so that it begins after a comma


@dataclass(kw_only=True)
class Prompt:
    """A prompt, parsed."""

    text: str  # as it was written
    sections: list[Section] = field(default_factory=lambda: [[]])  # without the <lora:...>
    loras: dict[str, tuple[float, float]] = field(default_factory=dict)  # scales of text encoder and UNet
    plain: bool = False  # encode `text` as it is
    negative: Prompt | None = None
    chunks: list[Chunk] = field(default_factory=list)  # filled in by `prepare`, with the model's tokenizer


# Parsing


def parse(text: str, plain: bool = False) -> Prompt:
    """Parse a text, unless it is `plain`. ValueError for A1111's syntax that is not supported, or if the text
    would take minutes to encode."""
    check_text(text, "a prompt")
    if plain:
        return Prompt(text=text, plain=True)
    return Prompt(text=text, sections=_sections(LORA.sub("", text)), loras=_loras(text))


def parse_all(texts: Sequence[str], settings: Settings) -> list[Prompt]:
    """Parse texts, each different one once, and give each prompt the settings' negative prompt."""
    negative = parse(settings.negative_prompt, settings.plain_prompt)
    require(not negative.loras, "--negative_prompt has a <lora:...>, which would act on both: use --prompt")
    prompts = {text: parse(text, settings.plain_prompt) for text in dict.fromkeys(texts)}
    return [replace(prompts[text], negative=negative) for text in texts]


def _sections(text: str) -> list[Section]:
    """The sections of a text; neighbouring spans differ in weight."""
    for pattern, form in UNSUPPORTED:
        if match := pattern.search(text):
            raise ValueError(f"prompt: {form} is not supported ({match[0]!r}); as text, use --plain_prompt")
    spans: Section = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # indices of the spans that open brackets precede

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        spans[start:] = [(span, weight * factor) for span, weight in spans[start:]]

    for match in PIECE.finditer(text):
        piece = match[0]
        if piece in opened:
            if len(opened[piece]) == MAX_DEPTH:
                raise ValueError(f"prompt: more than {MAX_DEPTH} open brackets; as text, use --plain_prompt")
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
        require(math.isfinite(weight), f"prompt: a weight of {weight}")
        first, *rest = BREAK.split("".join(span for span, _ in run))
        if rest:
            first, *rest = first.rstrip(), *map(str.strip, rest[:-1]), rest[-1].lstrip()
        sections[-1].append((first, weight))
        sections += [[(span, weight)] for span in rest]
    return sections


def _loras(text: str) -> dict[str, tuple[float, float]]:
    """The scales of each <lora:NAME:SCALE> and <lora:NAME:TEXT:UNET>, added up if a name occurs twice."""
    loras: dict[str, tuple[float, float]] = {}
    for inside in LORA.findall(text):
        name, *values = inside.split(":")
        places = zip(("te", "unet", ""), values, strict=False)
        scales = dict((v if "=" in v else f"{place}={v}").split("=", 1) for place, v in places)
        try:
            text_scale = float(scales.pop("te", 1.0))
            unet_scale = float(scales.pop("unet", text_scale))
            if scales or not name or not math.isfinite(text_scale + unet_scale):
                raise ValueError
        except ValueError:
            forms = "<lora:NAME:SCALE> or <lora:NAME:TEXT:UNET>"
            raise ValueError(f"prompt: <lora:{inside}> is not {forms}") from None
        before = loras.get(name, (0.0, 0.0))
        loras[name] = before[0] + text_scale, before[1] + unet_scale
    return loras


# Tokens and contexts


def prepare(sd: Model, prompts: Sequence[str | Prompt], settings: Settings) -> list[Prompt]:
    """Parse and tokenize the prompts, and attach their LoRAs to the model; none of this happens twice."""
    if not all(isinstance(prompt, Prompt) for prompt in prompts):
        prompts = parse_all(prompts, settings)
    attach_loras(sd, prompts, settings.lora_dir)
    for prompt in () if sd.is_pixels else prompts:
        for one in (prompt, prompt.negative):
            one.chunks = one.chunks or tokenize(sd.tokenizer, one)
    return prompts


def tokenize(tokenizer: Tokenizer, prompt: Prompt) -> list[Chunk]:
    """The chunks of a prompt; if it is plain, one chunk, truncated where it is full."""
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
        done.pop()  # the text ends with BREAK
    start, end = (tokenizer.start, 1.0), (tokenizer.end, 1.0)
    return [[start, *chunk, *[end] * (room - len(chunk)), end] for chunk in done]


def contexts(sd: Model, prompts: Sequence[Prompt], settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Context (b, k * s, d) of the prompts and, with guidance, of their negative prompts; each is padded with
    empty chunks to the k chunks of the longest. A model of pixels takes an empty context."""
    if sd.is_pixels:
        return sd.unet.conv_in.weight.new_empty(len(prompts), 0, 0), None
    positive = [prompt.chunks for prompt in prompts]
    negative = [prompt.negative.chunks for prompt in prompts] if settings.guidance_scale > 1 else []
    count = max(map(len, positive + negative))
    context = _encode(sd, positive, count, "clip_skip", settings.clip_skip)
    name = "negative_clip_skip" if settings.negative_clip_skip else "clip_skip"
    return context, _encode(sd, negative, count, name, getattr(settings, name)) if negative else None


def _encode(sd: Model, texts: Sequence[list[Chunk]], count: int, flag: str, clip_skip: int) -> Tensor:
    empty = tokenize(sd.tokenizer, Prompt(text=""))
    rows = [chunk for chunks in texts for chunk in chunks + empty * (count - len(chunks))]
    ids = torch.tensor([[i for i, _ in row] for row in rows])  # (b * count, s)
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    z = sd.encode_ids(ids, clip_skip, flag)  # (b * count, s, d)
    if (weights != 1).any():
        z = emphasise(z, weights.to(z.device))
    return z.unflatten(0, (-1, count)).flatten(1, 2)  # (b, count * s, d)


def emphasise(z: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token of z (b, s, d) by its weight (b, s), then restore the mean of each chunk. A1111
    restores the mean over the batch, where one prompt would change another."""
    before = z.float()
    after = before * weights[..., None]
    return (after * (before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True))).to(z.dtype)


# LoRAs


def find_lora(folder: Path | None, name: str) -> Path:
    """The file with this stem, or the folder with this name, in `folder` or below it, the nearest first."""
    require(folder is not None, f"prompt: <lora:{name}> needs --lora_dir, the folder of LoRAs")
    require(folder.is_dir(), f"--lora_dir {folder} is not a folder")
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


def attach_loras(sd: Model, prompts: Iterable[Prompt], folder: Path | None) -> None:
    """Attach the LoRAs that prompts name, each once, at scale 0, and print their descriptions. ValueError,
    naming the LoRA, if there is no such file or it is not a LoRA."""
    for name in lora_names(prompts):
        path = find_lora(folder, name)
        if reading.real(path) not in sd.attached:
            for line in sd.attach(path, 0.0):
                print(f"<lora:{name}>: {line}", file=sys.stderr)
        if not sd.attached[reading.real(path)].parts:
            raise ValueError(f"prompt: <lora:{name}>: {path} is no LoRA, and has no scale")


@contextmanager
def loras_on(sd: Model, loras: Mapping[str, tuple[float, float]], folder: Path | None) -> Iterator[None]:
    """Add these scales of the text encoder and the UNet to those of attached LoRAs, inside a `with`."""
    before = []
    for name, (text, unet) in loras.items():
        attached = sd.attached[reading.real(find_lora(folder, name))]
        before.append((attached, attached.scales))
        more = {"unet": unet, "text_encoder": text}
        attached.set_scales({part: scale + more[part] for part, scale in attached.scales.items()})
    try:
        yield
    finally:
        for attached, scales in reversed(before):
            attached.set_scales(scales)
