"""Personalisation on what the tiny model never saw: every such method, on the things of concepts.py, with
several seeds. Each training leaves a row and its images in a folder; what is there is not trained again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from minisd import files
from minisd.data import images
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny.concepts import UNSEEN, Concept
from minisd.tiny.data import five, plain
from minisd.tiny.pictures import SIDE, on, posed
from minisd.tiny.trial import Trial, called, defaults

COUNT = 2  # images on each ground, of the class and of OTHERS
OTHERS = ("cat", "house")  # things that training should leave as they are
TOKEN = "<it>"


# ------------------------------ The methods


def textual_inversion(t: Trial, concept: Concept) -> tuple[StableDiffusion, str]:
    """From captions that name the backgrounds."""
    data = _captioned(t, concept, TOKEN)
    out = t.train_model(data=data, placeholder_token=TOKEN, initializer_token=concept.start)
    return _with_adapter(t, out), TOKEN


def dreambooth(t: Trial, concept: Concept) -> tuple[StableDiffusion, str]:
    """From captions that name the backgrounds, without class images."""
    word = f"sks {concept.start}"
    out = t.train_model(data=_captioned(t, concept, word), instance_prompt=called("3d", word))
    return t.load(out), word


def lora(t: Trial, concept: Concept) -> tuple[StableDiffusion, str]:
    """From captions that name the backgrounds."""
    word = f"sks {concept.start}"
    return _with_adapter(t, t.train_model(data=_captioned(t, concept, word))), word


def on_white(concept: Concept) -> list[Image.Image]:
    """Return five poses of it on white."""
    poses = [(1, (0, 0)), (0.95, (2, -2)), (0.95, (-2, 2)), (0.9, (2, 2)), (0.9, (-2, -2))]
    return [on(posed(concept.tile(), scale=scale, shift=shift)) for scale, shift in poses]


def lora_as_dreambooth(t: Trial, concept: Concept) -> tuple[StableDiffusion, str]:
    """From images on white with one prompt for all."""
    word = f"sks {concept.start}"
    data = t.write("instance", [{"": image} for image in on_white(concept)])
    return _with_adapter(t, t.train_model(data=data, instance_prompt=called("3d", word))), word


def custom_diffusion(t: Trial, concept: Concept) -> tuple[StableDiffusion, str]:
    """From captions that name the backgrounds, without class images."""
    words = {"modifier_token": TOKEN, "initializer_token": concept.start}
    data = _captioned(t, concept, TOKEN)
    return _with_adapter(t, t.train_model(data=data, instance_prompt=called("3d", TOKEN), **words)), TOKEN


def _captioned(t: Trial, concept: Concept, word: str) -> Path:
    """Write the thing on five backgrounds, with captions that call it `word`."""
    shown = five(concept.tile())
    return t.write("instance", [{"": image, "text": text.replace("{}", word)} for image, text in shown])


def _with_adapter(t: Trial, out: Path) -> StableDiffusion:
    sd = t.load()
    sd.attach(out)
    return sd


Trainer = Callable[[Trial, Concept], tuple[StableDiffusion, str]]
TRAINERS: dict[str, Trainer] = {
    f.__name__: f for f in (textual_inversion, dreambooth, lora, lora_as_dreambooth, custom_diffusion)
}


# ------------------------------ The measures


def draw(t: Trial, sd: StableDiffusion, word: str, start: str) -> list[Image.Image]:
    """Draw COUNT images of `word` on white, of it on blue, of its class, and of OTHERS."""
    prompts = [called("3d", word), called("3d", word, "blue"), called("3d", start)]
    prompts = [prompt for prompt in prompts for _ in range(COUNT)]
    return t.draw(sd, prompts + [called("3d", plain(name)) for name in OTHERS])


def measure(t: Trial, concept: Concept, drawn: list[Image.Image]) -> dict[str, float]:
    """Return the shares of images that show what they should, and how alike the shape of the thing is."""
    own, new, kind = (
        t.lineup(concept.tile(), concept.bank),
        t.lineup(concept.tile(), concept.bank, ground="blue"),
        t.lineup(t.bank[concept.kind, "3d"], concept.kind),
    )
    parts = [drawn[i : i + COUNT] for i in range(0, len(drawn), COUNT)]
    others = [
        t.lineup(t.bank[name, "3d"], name).recognised([image])
        for name, image in zip(OTHERS, parts[3], strict=True)
    ]
    return {
        "on white": own.recognised(parts[0]).float().mean().item(),
        "on blue": new.recognised(parts[1]).float().mean().item(),
        "shape": torch.cat([own.shape(parts[0]), new.shape(parts[1])]).mean().item(),
        "class": kind.recognised(parts[2]).float().mean().item(),
        "others": torch.cat(others).float().mean().item(),
    }


def run(method: str, name: str, seed: int, model: Path, out: Path, flags: list[str], trial=Trial) -> dict:
    """Train a method on a concept, draw, and return the row; from the folder, if the same was done before."""
    concept, script = UNSEEN[name], method.removesuffix("_as_dreambooth")
    key = f"{method}-{name}-{seed}"
    asked = {"defaults": defaults()[script], "flags": flags, "model": str(model)}
    row, sheet = out / f"{key}.json", out / f"{key}.png"
    t = trial(script, model, out / key, [*flags, "--seed", str(seed)], False)
    if row.is_file() and (known := json.loads(row.read_text()))["asked"] == asked:
        with Image.open(sheet) as image:
            drawn = [image.crop((x, 0, x + SIDE, SIDE)) for x in range(0, image.width, SIDE)]
    else:
        drawn = draw(t, *TRAINERS[method](t, concept), concept.start)
        images.save_png(_strip(drawn), sheet)
        known = {"asked": asked, "training": t.training}
    shutil.rmtree(t.folder)
    known |= {"method": method, "concept": name, "seed": seed, **measure(t, concept, drawn)}
    files.write_text(row, json.dumps(known))
    return known


def _strip(drawn: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (SIDE * len(drawn), SIDE))
    for i, image in enumerate(drawn):
        strip.paste(image, (SIDE * i, 0))
    return strip


def learned(row: dict) -> bool:
    """Whether half of the images show the thing, both on white and on a background that training lacked."""
    return row["on white"] >= 0.5 and row["on blue"] >= 0.5


# ------------------------------ The table


# The share of things that a method has to learn, each with most seeds. Textual inversion trains one vector,
# so it reaches only what the model can draw already.
NEED = dict.fromkeys(TRAINERS, 1.0) | {"custom_diffusion": 0.75, "textual_inversion": 0.5}


def table(
    methods: Sequence[str], concepts: Sequence[str], seeds: int, model: Path, out: Path, flags: list[str]
) -> bool:
    """Run all, print a line for each and for each method, and return whether every method learned enough."""
    columns = ("on white", "on blue", "shape", "class", "others")
    print(f"{'':44}{''.join(f'{name:>10}' for name in columns)}")
    rows = []
    for seed in range(seeds):
        for name in concepts:
            for method in methods:
                row = run(method, name, seed, model, out, flags)
                rows.append(row)
                values = "".join(f"{row[column]:10.2f}" for column in columns)
                verdict = "learned" if learned(row) else "not learned"
                print(f"{method:20} {name:17} {seed:4} {values}  {verdict}", flush=True)
    passed = True
    for method in methods:
        counts = {name: 0 for name in concepts}
        for row in rows:
            counts[row["concept"]] += row["method"] == method and learned(row)
        share = sum(2 * count > seeds for count in counts.values()) / len(counts)
        passed &= share >= NEED[method]
        verdict = "pass" if share >= NEED[method] else "FAIL"
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{method}: of {seeds} seeds each, {listed}: {share:.2f} >= {NEED[method]}  {verdict}")
    return passed
