"""Train every method on images that the tiny model has not seen, and measure whether it learned them.

    python -m minisd.tiny.judge                          all methods, 25 minutes on two CPU cores
    python -m minisd.tiny.judge lora controlnet          these methods
    python -m minisd.tiny.judge lora -- --rank 2         with other flags for train.py
    python -m minisd.tiny.judge --unseen                 personalisation on six things, three seeds each
    python -m minisd.tiny.judge lora --clock             quality over seconds: OUT/clock.png

Each measure is taken before and after training, from the same noise, and printed with its value by chance and
the value needed. OUT/METHOD.png shows the images. The exit status is 1 if a measure falls short.

Training runs train.py's code with the tiny model's defaults and the flags in this file. --shuffle is a
deliberate fault: every image gets the caption or the condition of another.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps

from minisd import cli, registry
from minisd.data import images
from minisd.formats import config_json
from minisd.models.unet2d import UNet2DConfig
from minisd.options import TINY
from minisd.sampling.generate import Control, Settings, pictures
from minisd.sampling.pixel_diffusion import PixelDiffusion
from minisd.tiny import bank, clock, measures, tuned, unseen
from minisd.tiny.concepts import UNSEEN
from minisd.tiny.data import TURQUOISE, loose, plain
from minisd.tiny.pictures import HUES, SIDE, on, recoloured, silhouette
from minisd.tiny.trial import Measure, Thing, Trial, called

# A pixel-space UNet for 32x32 images that learns in minutes.
PIXELS = UNet2DConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32, 64),
    attention=(False, False, True),
    head_dim=None,
    layers_per_block=1,
    norm_num_groups=8,
    norm_eps=1e-5,
    sample_size=32,
)


# ------------------------------ The methods


def textual_inversion(t: Trial) -> None:
    thing, base = Thing("cat", TURQUOISE), t.load()
    out = t.train_model(data=t.concept(thing, "<cat>"), placeholder_token="<cat>", initializer_token="cat")
    new = t.load()
    new.attach(out)
    t.learned(thing, base, "cat", new, "<cat>", need=(2, 2, 2))


def dreambooth(t: Trial) -> None:
    thing, base, word = Thing("bat"), t.load(), "sks mouse"
    prompt = called("3d", "mouse")
    drawn = t.draw(base, [prompt] * 16, 100)
    out = t.train_model(
        data=t.concept(thing, word),
        instance_prompt=called("3d", word),
        with_prior_preservation=True,
        class_data_dir=t.write("class", [{"": image} for image in drawn]),
        class_prompt=prompt,
        num_class_images=len(drawn),
    )
    new = t.load(out)
    t.learned(thing, base, "mouse", new, word, need=(5, 5, 40), shown=(0.75, 0.75, 0))
    t.prior(thing, "mouse", base, new)
    t.others(base, new)


def custom_diffusion(t: Trial) -> None:
    things = {"<camel>": Thing("camel", HUES["green"]), "<dog>": Thing("dog", HUES["purple"])}
    base, concepts = t.load(), []
    for word, thing in things.items():
        prompt = called("3d", thing.name)
        drawn = t.draw(base, [prompt] * 8, 100)
        concepts.append({
            "instance_prompt": called("3d", word),
            "instance_data_dir": str(t.concept(thing, word)),
            "class_prompt": prompt,
            "class_data_dir": str(t.write(f"class-{thing.name}", [{"": image} for image in drawn])),
        })  # fmt: skip
    listed = t.folder / "concepts.json"
    listed.write_text(json.dumps(concepts))
    out = t.train_model(
        concepts_list=listed,
        modifier_token="+".join(things),
        initializer_token="+".join(thing.name for thing in things.values()),
        with_prior_preservation=True,
        num_class_images=8,
    )
    new = t.load()
    new.attach(out)
    for word, thing in things.items():
        t.learned(thing, base, thing.name, new, word, need=(5, 5, 5))
        t.prior(thing, thing.name, base, new)
    t.others(base, new)


def lora(t: Trial) -> None:
    """The style is "blueprint": the 3d things in blue on white."""
    names, base, style = t.known("lora"), t.load(), "blueprint"
    for name in bank.names():
        t.bank[name, style] = blueprint(t.bank[name, "3d"])
    taught, tested = names[12:60], names[:12]
    out = t.train_model(data=t.in_style(taught, style))
    prompts, styles = [called(style, plain(n)) for n in tested], t.styles(base, ("3d", "flat", style))
    base.attach(out)
    drawn = {}
    for scale in (0, 0.5, 1):
        base.rescale(out, scale)
        drawn[scale] = t.draw(base, prompts)
        t.rows.append((f"scale {scale}: " + ", ".join(map(plain, tested[:8])), drawn[scale][:8]))
    shares = [styles.share(drawn[scale], style) for scale in (0, 1)]
    t.measure("things not taught: share in the style", shares[0], 1 / 3, shares[1], 0.6, more=True)
    scores = [styles.score(d, style).mean().item() for d in drawn.values()]
    rises = min(scores[1] - scores[0], scores[2] - scores[1])
    t.measure("smaller rise, scale 0 to 0.5 to 1", 0, 0, rises, 0.05, more=True)
    ranks = [t.rank_of(tested, drawn[scale], style) for scale in (0, 1)]
    t.measure("things not taught: rank in the style", ranks[0], len(bank.names()) / 2, ranks[1], 10)


def blueprint(image: Image.Image) -> Image.Image:
    """Return the image in shades of blue."""
    drawn = ImageOps.colorize(image.convert("L"), (20, 40, 120), (240, 245, 255))
    drawn.putalpha(image.getchannel("A"))
    return drawn


def text_to_image(t: Trial) -> None:
    names, base = t.known("text to image"), t.load()
    taught, held_out = names[12:52], names[:12]
    new = t.load(t.train_model(data=t.in_style(taught, "noto")))
    for label, tested in (("taught", taught[:16]), ("not taught", held_out)):
        prompts = [called("noto", plain(n)) for n in tested]
        before, after = (t.draw(sd, prompts) for sd in (base, new))
        shown = [[on(t.bank[n, style]) for n in tested] for style in bank.STYLES]
        t.rows += [(f"{label}: data", shown[-1][:8]), ("before", before[:8]), ("after", after[:8])]
        ranks = [t.rank_of(tested, d, "noto") for d in (before, after)]
        t.measure(f"things {label}: rank in the style", ranks[0], len(bank.names()) / 2, ranks[1], 10)
        if label == "taught":
            shares = []
            for drawn in (before, after):
                near = torch.stack([measures.distance(drawn, things) for things in shown])  # (styles, n)
                shares.append((near.argmin(dim=0) == len(shown) - 1).float().mean())
            t.measure("taught: share nearest in the style", shares[0], 1 / 3, shares[1], 0.5, more=True)


def controlnet(t: Trial) -> None:
    names, chance, base = t.known("control"), random.Random("control"), t.load()

    def pair(name: str) -> dict:
        shape = loose(t.bank[name, "3d"], chance)
        return {"": on(shape), "conditioning_image": silhouette(shape), "text": called("3d", plain(name))}

    out = t.train_model(data=t.write("control", [pair(n) for n in names for _ in range(3)]))
    # Only things whose outline is visible on white.
    clear = [n for n in names if measures.overlap(*outlines(on(t.bank[n, "3d"]), t.bank[n, "3d"])) > 0.95]
    tested = [pair(n) for n in clear[:16]]
    prompts, hints = [p["text"] for p in tested], [p["conditioning_image"] for p in tested]
    shapes = [images.to_tensor(h)[0] > 0 for h in hints]
    control = base.controlnet(str(out))
    hint = torch.stack([images.to_tensor(h) for h in hints]) / 2 + 0.5
    before = t.draw(base, prompts)
    after = t.draw(base, prompts, controls=[Control(network=control, hint=hint)])
    same, another = (
        sum(measures.overlap(measures.outline(d), shapes[i - k]) for i, d in enumerate(after)) / len(after)
        for k in (0, 1)
    )
    free = sum(measures.overlap(measures.outline(d), s) for d, s in zip(before, shapes, strict=True))
    t.measure("overlap with the silhouette", free / len(before), another, same, 0.75, more=True)
    t.rows += [("silhouette", hints[:8]), ("without control", before[:8]), ("drawn", after[:8])]


def outlines(image: Image.Image, transparent: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outline found in an image, and the true one from the transparency."""
    return measures.outline(image), images.to_tensor(silhouette(transparent))[0] > 0


def instruct_pix2pix(t: Trial) -> None:
    names, hues = t.known("edits"), ("green", "blue", "pink")
    count = 1 + len(hues)

    def pairs(name: str) -> list[dict]:
        image = t.bank[name, "3d"]
        edits = {"make it flat": t.bank[name, "flat"]}
        edits |= {f"make it {hue}": recoloured(image, HUES[hue]) for hue in hues}
        return [
            {"input_image": on(image), "edited_image": on(edited), "edit_prompt": text}
            for text, edited in edits.items()
        ]

    out = t.train_model(data=t.write("edits", [p for n in names[12:] for p in pairs(n)]))
    rows = [p for n in names[:12] for p in pairs(n)]
    inputs, targets = ([row[k] for row in rows] for k in ("input_image", "edited_image"))
    originals = torch.stack([images.to_tensor(image) for image in inputs])
    guidance = {"guidance_scale": 1.5, "image_guidance_scale": 1.0}
    prompts = [row["edit_prompt"] for row in rows]
    drawn = t.draw(t.load(out), prompts, sampling=guidance, init_images=originals)
    before, after = (measures.distance(d, targets).mean() for d in (inputs, drawn))
    others = targets[count:] + targets[:count]  # the same edits of another thing
    chance = measures.distance(drawn, others).mean()
    t.measure("distance from the true edit", before, chance, after, 0.85 * before)
    edits_of = [[targets[i - i % count + k] for i in range(len(rows))] for k in range(count)]
    near = torch.stack([measures.distance(drawn, edit) for edit in edits_of])  # (edits, n)
    right = (near.argmin(dim=0) == torch.arange(len(rows)) % count).float().mean()
    t.measure("share nearest to the requested edit", 1 / count, 1 / count, right, 0.6, more=True)
    edits = "true edit: flat, " + ", ".join(hues)
    t.rows += [("input", inputs[:12]), (edits, targets[:12]), ("drawn", drawn[:12])]


def unconditional(t: Trial) -> None:
    side, count = PIXELS.sample_size, 64
    things = [
        on(t.bank[n, "3d"]).resize((side, side), Image.Resampling.BOX) for n in t.known("unconditional")
    ]
    config_json.write(t.folder, "unet2d", PIXELS)
    out = t.train(
        data=t.write("pictures", [{"": image} for image in things]),
        model_config_name_or_path=t.folder / "config.json",
        resolution=side,
        use_ema=True,
        # Predicting the image looks right sooner than predicting noise, whose small errors add up.
        prediction_type="sample",
        snr_gamma=5.0,
        max_train_steps=500,
        learning_rate=2e-3,
        lr_warmup_steps=20,
        train_batch_size=16,
        eval_batch_size=1,
        ddpm_num_inference_steps=1,
        save_images_epochs=10000,
        save_model_epochs=10000,
    )
    new = PixelDiffusion.load(out)
    settings = Settings(steps=50, scheduler="ddpm", width=side, height=side)
    drawn = [*pictures(new, [""] * count, range(count), settings, batch_size=count)]
    noise = [images.to_pil(torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)))
             for i in range(count)]  # fmt: skip
    mean = images.to_pil(torch.stack([images.to_tensor(image) for image in things]).mean(dim=0))
    before, chance, after = (measures.frechet(d, things) for d in (noise, [mean] * count, drawn))
    t.measure("Frechet distance (before: noise; chance: mean)", before, chance, after, 0.7 * chance)
    t.rows += [("data", things[:12]), ("drawn", drawn[:12]), ("drawn", drawn[12:24])]


# ------------------------------ The table


TRIALS = {f.__name__: f for f in (textual_inversion, dreambooth, custom_diffusion, lora, text_to_image,
                                  controlnet, instruct_pix2pix, unconditional, *tuned.TRIALS)}  # fmt: skip


def judge(method: str, model: Path, out: Path, flags: list[str], shuffled: bool = False) -> list[Measure]:
    """Train and measure a method, print its lines of the table, and write OUT/METHOD.png."""
    started = time.monotonic()
    trial = Trial(method, model, out / method, flags, shuffled)
    TRIALS[method](trial)
    total = time.monotonic() - started
    print(f"{method}: {total:.0f} s, of which {trial.training:.0f} s training")
    for m in trial.measures:
        need = f"{'>=' if m.more else '<='} {m.need:.3g}"
        verdict = "pass" if m.passed else "FAIL"
        print(
            f"  {m.name:48} {m.before:8.3g} {m.chance:8.3g} {m.after:8.3g} {need:>9}  {verdict}", flush=True
        )
    images.save_png(images.labelled_rows(trial.rows, size=2 * SIDE), out / f"{method}.png")
    return trial.measures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.tiny.judge", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(TRIALS))
    parser.add_argument("--model", type=Path, default=TINY, help="folder of the model; default: the tiny one")
    parser.add_argument("--out", type=Path, default=Path("judged"), help="folder for the results")
    parser.add_argument("--shuffle", action="store_true", help="give every image the caption of another")
    parser.add_argument(
        "--unseen",
        action="store_true",
        help=f"{', '.join(unseen.TRAINERS)}, on things that the model never saw; goes on after a stop",
    )
    parser.add_argument(
        "--clock", action="store_true", help="train for parts of the updates: quality over time"
    )
    parser.add_argument("--seeds", type=int, default=3, help="with --unseen: trainings of each thing")
    parser.add_argument(
        "--concept", action="append", choices=UNSEEN, help="with --unseen: this thing; may be repeated"
    )
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    o = parser.parse_args(own)
    known = unseen.TRAINERS if o.unseen else TRIALS
    if wrong := set(o.methods) - known.keys():
        raise ValueError(f"no method {', '.join(wrong)}; there are {', '.join(known)}")
    if o.unseen:
        methods, things = o.methods or list(known), o.concept or list(UNSEEN)
        return int(not unseen.table(methods, things, o.seeds, o.model, o.out / "unseen", flags))
    if o.clock:
        methods = o.methods or [name for name in TRIALS if name in registry.names("methods")]
        clock.measure(TRIALS, methods, {"train.py": Trial}, o.model, o.out, flags)
        return 0
    print(f"{'':50} {'before':>8} {'chance':>8} {'after':>8} {'needed':>9}")
    results = [judge(m, o.model, o.out, flags, o.shuffle) for m in o.methods or TRIALS]
    return int(not all(m.passed for measured in results for m in measured))


if __name__ == "__main__":
    cli.run("minisd.tiny.judge", main)
