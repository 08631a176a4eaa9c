"""An image's parameters as text in the PNG file, in A1111's format.

The prompt's lines, the negative prompt's lines, and a last line of `Key: value`. Each option's key is
declared with it (sampling/options.py): A1111's key, or else the option's own name.
"""

import json
import re
from dataclasses import Field, fields
from pathlib import Path

from minisd import reading, registry
from minisd.options import TINY, default_of, require
from minisd.sampling.options import Sample, Settings

FIRST = "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model"  # in this order
ALWAYS = "Steps", "Sampler", "CFG scale", "RNG"  # others only where they are not the default
NEGATIVE = "Negative prompt: "
MOST = 1000  # parameters
# A key's length is bounded: a search for its colon to the end of the line from every letter takes too long.
PAIR = re.compile(r'(\w[\w \-/]{1,80}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def key_of(f: Field) -> str | None:
    """The key of an option; None if it has none."""
    return f.metadata.get("infotext", f.name)


def write(
    prompt: str, seed: int, model: str, settings: Settings, flags: set[str] | None = None, kernels: str = ""
) -> str:
    """The parameters of an image, for the model of that name; of `flags` alone, if given. `kernels` is
    the digest of those in use."""
    pairs = [("Seed", seed), ("Size", f"{settings.width}x{settings.height}"), ("Model", model)]
    for f in [f for f in fields(settings) if flags is None or f.name in flags]:
        key, value = key_of(f), getattr(settings, f.name)
        if key in ALWAYS or key not in (None, "Seed") and value not in (None, str(TINY), default_of(f)):
            words = {value: word for word, value in f.metadata.get("words", {}).items()}
            values = value if isinstance(value, list) else [words[value] if words else value]
            pairs += [(key, v) for v in values]
    pairs.sort(key=lambda pair: FIRST.index(pair[0]) if pair[0] in FIRST else len(FIRST))
    module = registry.load("schedulers", settings.scheduler)
    pairs[1] = "Sampler", getattr(module, "A1111", Path(settings.scheduler).name)
    pairs += [("Sampler digest", own)] if (own := digest(settings.scheduler)) else []
    pairs += [("Version", "minisd"), *([("Kernels", kernels)] if kernels else [])]
    negative = settings.negative_prompt
    prompts = f"{prompt}\n{NEGATIVE}{negative}" if negative else prompt
    last = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs)
    if parse(f"{prompts}\n{last}")[:2] != (prompt, negative):  # a line of a prompt looks like another part
        last = f"Prompts: {_quoted(json.dumps([prompt, negative]))}, {last}"
    return f"{prompts}\n{last}"


def digest(scheduler: str) -> str:
    """The first digits of the digest of a scheduler from a file; "" for those of the folder."""
    return (registry.digest(scheduler) or "")[:12]


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r'[,:"\n]|^\s|\s$', text) else text


def parse(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """(prompt, negative prompt, keys and values) of a text by minisd or A1111. A key may occur more than
    once. A last line of fewer than three pairs is part of the prompts."""
    lines = text.split("\n")
    pairs = [(key, _unquoted(value)) for key, value in PAIR.findall(lines[-1].rstrip())]
    lines, pairs = (lines[:-1], pairs) if len(pairs) >= 3 else (lines, [])
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE.rstrip())), len(lines))
    prompt = "\n".join(lines[:start])
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE.rstrip()).removeprefix(" ")
    if written := dict(pairs).get("Prompts"):
        prompts = reading.parse_json(written, "Prompts")
        if not isinstance(prompts, list) or [type(text) for text in prompts] != [str, str]:
            raise ValueError("Prompts: not the prompt and the negative prompt")
        prompt, negative = prompts
    return prompt, negative, pairs


def _unquoted(value: str) -> str:
    value = value.strip()
    try:
        return reading.parse_json(value, "a value") if value.startswith('"') else value
    except ValueError:
        return value


def read(path: Path) -> str:
    """The parameters in a PNG. ValueError if it is not an image, or has none."""
    from PIL import Image

    try:
        reading.check_regular(path)
        with Image.open(path) as image:
            image.load()  # the text may come after the pixels
            text = image.info.get("parameters")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"cannot be read: {e}") from None
    if not isinstance(text, str):
        raise ValueError("does not say how it was made: it has no `parameters`")
    return text


def flags(text: str) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """The parameters as values of our flags, all keys with their last values, and the unsupported keys.
    ValueError if there are too many."""
    prompt, negative, pairs = parse(text)
    require(len(pairs) <= MOST, f"{len(pairs):,} parameters; at most {MOST:,} are read")
    values, ignored = {"prompt": [prompt], "negative_prompt": [negative]}, []
    options = {key_of(f): f for f in fields(Sample)}
    for key, value in pairs:
        f = options.get(key)
        if key == "Sampler":
            value, kind = registry.split_scheduler(value)
            values |= {"schedule_type": [kind]} if kind else {}  # older texts have both in one
        if key == "Size" and (size := re.fullmatch(r"(\d+)x(\d+)", value)):
            values["width"], values["height"] = [size[1]], [size[2]]
        elif f and value in (words := f.metadata.get("words", {value: value})):
            values.setdefault(f.name, []).append(str(words[value]))
        elif key not in ("Model", "Version", "Kernels", "Prompts", "Sampler digest"):
            ignored.append(key)
    if not any(key == "RNG" for key, _ in pairs):
        values["rng"] = ["nv"]  # A1111's default is that of a GPU
    return values, dict(pairs), ignored
