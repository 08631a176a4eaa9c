"""How a picture was made, as the text that A1111 puts into its PNG files: written, and read again.

The prompt's lines, those of the negative prompt, and a last line of `Key: value`. A flag that A1111 has a key
for is under that, and any other that differs from its default under its own name.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from minisd import registry
from minisd.options import TINY

# Flags and A1111's keys.
KEYS = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "strength": "Denoising strength",
    "image_guidance_scale": "Image CFG scale",
    "clip_skip": "Clip skip",
    "eta": "Eta",
    "model": "Model path",
}
# Flags that are written in another way, or say where and how to draw and not what.
NOT_BY_NAME = (
    "prompt prompt_file negative_prompt width height plain_prompt karras num_images batch_size output device "
    "kernels cache_dir like csv preview export"
).split()
NEGATIVE = "Negative prompt: "
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write(prompt: str, seed: int, model: str, *sources) -> str:
    """The text for a picture by the model of that name. `sources` are dataclasses with the flags' names: what
    the later ones say counts."""
    said, unusual = {}, {}
    for source in sources:
        for f in dataclasses.fields(source):
            said[f.name] = getattr(source, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if said[f.name] != default:
                unusual[f.name] = said[f.name]
    pairs = [
        ("Steps", said["steps"]),
        ("Sampler", registry.load("schedulers", said["scheduler"]).A1111),
        ("CFG scale", said["guidance_scale"]),
        ("Seed", seed),
        ("Size", f"{said['width']}x{said['height']}"),
        ("Model", model),
    ]
    if said.get("karras") is not None:
        pairs.insert(2, ("Schedule type", "Karras" if said["karras"] else "Uniform"))
    for name, value in unusual.items():
        key = KEYS.get(name, name)
        if name not in NOT_BY_NAME and key not in dict(pairs) and value not in (None, str(TINY)):
            pairs += [(key, v) for v in (value if isinstance(value, list) else [value])]
    if said["plain_prompt"]:
        pairs.append(("Emphasis", "None"))
    pairs += [("RNG", "CPU"), ("Version", "minisd")]
    negative = said["negative_prompt"]
    text = _joined(prompt, negative, pairs)
    if parse(text)[:2] != (prompt, negative):  # a line of it looks like another part of this text
        text = _joined(prompt, negative, [("Prompts", json.dumps([prompt, negative])), *pairs])
    return text


def _joined(prompt: str, negative: str, pairs: Iterable[tuple[str, object]]) -> str:
    lines = [prompt, *([NEGATIVE + negative] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs)])


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r'[,:"\n]|^\s|\s$', text) else text


def parse(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """(prompt, negative prompt, the keys and their values) of such a text, whoever wrote it. A key may be
    there more than once. A last line of fewer than three pairs is part of the prompts."""
    lines = text.split("\n")
    pairs = PAIR.findall(lines[-1].rstrip())
    if len(pairs) < 3:
        pairs = []
    else:
        lines.pop()
    pairs = [(key, _unquoted(value)) for key, value in pairs]
    begins = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE.rstrip())), len(lines))
    prompt = "\n".join(lines[:begins])
    negative = "\n".join(lines[begins:]).removeprefix(NEGATIVE.rstrip()).removeprefix(" ")
    if "Prompts" in dict(pairs):
        prompt, negative = json.loads(dict(pairs)["Prompts"])
    return prompt, negative, pairs


def _unquoted(value: str) -> str:
    value = value.strip()
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value


def read(path: Path) -> str:
    """The text in a PNG. ValueError if it is no picture, or has none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
            text = image.info.get("parameters")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"--like {path} cannot be read: {e}") from None
    if not isinstance(text, str):
        raise ValueError(f"--like {path} does not say how it was made: it has no `parameters`")
    return text


def flags(text: str, known: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """What such a text says by the names of our flags (those `known`), each with its value or values; what it
    says in all; and the keys in it that have no meaning here."""
    prompt, negative, pairs = parse(text)
    found: dict[str, list[str]] = {"prompt": [prompt], "negative_prompt": [negative]}
    by_key = {key: name for name, key in KEYS.items()}
    karras = {"Karras": ["True"], "Uniform": ["False"]}
    ignored = []
    for key, value in pairs:
        name = by_key.get(key, key)
        if name == "scheduler":  # older texts have it all in one
            found[name] = [value.removesuffix(" Karras")]
            found |= {"karras": ["True"]} if value.endswith(" Karras") else {}
        elif key == "Schedule type" and value in karras:
            found["karras"] = karras[value]
        elif key == "Size" and (size := re.fullmatch(r"(\d+)x(\d+)", value)):
            found["width"], found["height"] = [size[1]], [size[2]]
        elif (key, value) == ("Emphasis", "None"):
            found["plain_prompt"] = ["True"]
        elif name in known and name not in NOT_BY_NAME:
            found.setdefault(name, []).append(value)
        elif key not in ("Model", "RNG", "Version", "Prompts"):
            ignored.append(key)
    return found, dict(pairs), ignored
