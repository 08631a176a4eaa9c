"""The judge's trials of methods whose loss asks the model before training: what that knows is made faster,
forgotten or turned."""

import itertools
import time

import torch
from PIL import Image

from minisd.options import TINY
from minisd.sampling.edit import edit as edit_model
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import measures, redness
from minisd.tiny.data import captions, plain
from minisd.tiny.metrics import ground_of
from minisd.tiny.pictures import on
from minisd.tiny.trial import OTHERS, Trial, called

GONE = "camel"  # what is erased


def lcm(t: Trial) -> None:
    """The teacher, with guidance, and the student at few steps. This small teacher needs but four."""
    names, base = t.known("lcm"), t.load()
    layers = {"rank": 16, "target_modules": ["attention", "feed_forward", "projections", "resnet"]}
    out = t.train_model(data=t.in_style(names, "3d"), **layers)
    names = names[:16]
    prompts, truth = [called("3d", plain(n)) for n in names], [on(t.bank[n, "3d"]) for n in names]
    drawn = {("teacher", steps): t.draw(base, prompts, sampling={"steps": steps}) for steps in (20, 4, 2)}
    base.attach(out)
    few = {"guidance_scale": 1.0, "scheduler": "lcm"}
    drawn |= {("student", n): t.draw(base, prompts, sampling=few | {"steps": n}) for n in (4, 2)}
    t.rows += [(f"{who}, {steps} steps", shown[:8]) for (who, steps), shown in drawn.items()]
    far = {key: measures.distance(shown, truth).mean().item() for key, shown in drawn.items()}
    chance = measures.distance(truth[1:] + truth[:1], truth).mean()
    for teacher, student, factor in ((20, 4, 1.1), (4, 4, 1.1), (2, 2, 0.7)):
        before, label = (
            far["teacher", teacher],
            f"distance, {student} steps; before: teacher, {teacher} steps",
        )
        t.measure(label, before, chance, far["student", student], factor * before)
    seen = [t.share_shown(names, drawn[who, 2]) for who in ("teacher", "student")]
    t.measure("share that shows the thing, 2 steps", seen[0], 0, seen[1], 0.75, more=True)


def erase(t: Trial) -> None:
    """The camel, by two of its captions."""
    new = t.load(t.train_model(erase=[called(style, GONE) for style in ("3d", "flat")]))
    forgotten(t, t.load(), new)


def edit(t: Trial) -> None:
    """The camel again, in closed form: nothing trains. Forty other things are preserved."""
    others = [plain(n) for n in t.known("preserved") if n not in (GONE, *OTHERS)][:40]
    new, preserved = t.load(), [called(style, name) for style in ("3d", "flat") for name in others]
    started = time.monotonic()
    edit_model(new, [called(style, GONE) for style in ("3d", "flat")], preserve=preserved)
    t.training = time.monotonic() - started
    forgotten(t, t.load(), new)


def forgotten(t: Trial, base: StableDiffusion, new: StableDiffusion) -> None:
    """Measure whether what is gone is drawn, on a ground that no prompt names, too, and other things."""
    for label, ground in (("as in the prompts", ""), ("on blue", "blue")):
        prompts, lineup = [called("3d", GONE, ground)] * 8, t.lineup(t.bank[GONE, "3d"], GONE, "3d", ground)
        drawn = [t.draw(sd, prompts) for sd in (base, new)]
        seen = [lineup.recognised(d).float().mean() for d in drawn]
        t.measure(f"{GONE}, {label}: share that shows one", seen[0], 0, seen[1], 0.125)
        t.rows += [(f"before: {prompts[0]}", drawn[0]), (f"after: {prompts[0]}", drawn[1])]
    t.others(base, new)


def blueness(drawn: list[Image.Image]) -> torch.Tensor:
    """Return how much bluer than red the grounds of images are, (n,)."""
    grounds = torch.tensor([ground_of(image) for image in drawn]) / 255
    return grounds[:, 2] - grounds[:, 0]


def sliders(t: Trial) -> None:
    """The ground of a cat, from yellow to blue, and that of other things, which it was not trained on."""
    base, prompt, drawn = t.load(), called("3d", "cat"), {}
    sides = {"positive_prompt": called("3d", "cat", "blue"), "negative_prompt": called("3d", "cat", "yellow")}
    out = t.train_model(target_prompt=prompt, **sides)
    base.attach(out)
    others = [n for n in t.known("sliders") if "cat" not in n][:8]
    prompts = [prompt] * 8 + [called("3d", plain(n)) for n in others]
    scales = (-1, -0.5, 0, 0.5, 1)
    for scale in scales:
        base.rescale(out, scale)
        drawn[scale] = t.draw(base, prompts)
        t.rows.append((f"scale {scale}", drawn[scale][4:12]))
    for label, rows, need in (("cat", slice(8), 0.4), ("others", slice(8, None), 0.2)):
        blue = [blueness(drawn[scale][rows]).mean().item() for scale in scales]
        t.measure(f"{label}: blueness at scale 1", blue[2], blue[2], blue[-1], blue[2] + need, more=True)
        t.measure(f"{label}: blueness at scale -1", blue[2], blue[2], blue[0], blue[2] - need)
        rise = min(after - before for before, after in itertools.pairwise(blue))
        t.measure(f"{label}: smallest rise from a scale to the next", 0, 0, rise, 0.0, more=True)
    t.measure_shapes(["cat"] * 8 + others, drawn[0], drawn[1])


def dpo(t: Trial) -> None:
    """Of a prompt that names no style, the model draws things in 3d or flat; the flat ones are preferred."""
    names, base, new = t.known("dpo"), t.load(), t.load()

    def prompt(name: str) -> str:
        return captions("", plain(name))[5]

    kinds = {"": "flat", "rejected_image": "3d"}
    pairs = [{c: on(t.bank[n, s]) for c, s in kinds.items()} | {"text": prompt(n)} for n in names[16:]]
    t.rows += [(f"{style} things", [pair[column] for pair in pairs[:8]]) for column, style in kinds.items()]
    new.attach(t.train_model(data=t.write("pairs", pairs)))
    styles, tested = t.styles(base, ("3d", "flat")), names[:16]
    lineups = [[t.lineup(t.bank[n, s], n, s) for s in kinds.values()] for n in tested]
    for seed in (300, 400):
        before, after = drawn = [t.draw(sd, [prompt(n) for n in tested], seed) for sd in (base, new)]
        t.rows += [("before", before[:8]), ("after", after[:8])]
        scores = [styles.score(d, "flat") for d in drawn]
        won, label = (scores[1] > scores[0]).float().mean(), f"things not taught, seeds from {seed}"
        t.measure(f"{label}: win rate", 0.5, 0.5, won, 0.7, more=True)
        shares = [styles.share(d, "flat") for d in drawn]
        t.measure(f"{label}: share that is flat", shares[0], 0.5, shares[1], 0.8, more=True)
        seen = [
            sum(any(line.recognised([image]) for line in own) for own, image in zip(lineups, d, strict=True))
            for d in drawn
        ]
        shown = [count / len(tested) for count in seen]
        t.measure(f"{label}: share that shows the thing", shown[0], 0, shown[1], 0.75, more=True)


def reward(t: Trial) -> None:
    """Redder images of four things, and of eight others, by the judge's own `redness`."""
    names, base, new = t.known("reward")[:12], t.load(), t.load()
    prompts = [called("3d", plain(n)) for n in names]
    new.attach(t.train_model(reward=TINY / "redness.py", prompt=prompts[:4]))
    for seed in (300, 400):
        drawn = [t.draw(sd, prompts, seed) for sd in (base, new)]
        t.rows += [(label, images[:12]) for label, images in zip(("before", "after"), drawn, strict=True)]
        red = [torch.tensor(redness.reward(images, prompts)) for images in drawn]
        for label, rows, need in (("taught", slice(4), 0.03), ("others", slice(4, None), 0.02)):
            before, after = (r[rows].mean().item() for r in red)
            t.measure(f"{label}, seeds from {seed}: redness", before, before, after, before + need, more=True)
        won = (red[1] > red[0]).float().mean()
        t.measure(f"seeds from {seed}: share that is redder", 0, 0.5, won, 0.75, more=True)
        t.measure_shapes(names, *drawn)


TRIALS = lcm, erase, edit, sliders, dpo, reward
