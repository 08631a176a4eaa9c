"""The judge's trials of methods whose loss asks the model before training: what that knows is made faster,
forgotten, preferred or turned."""

import torch
from PIL import Image

from minisd.tiny import measures
from minisd.tiny.data import plain
from minisd.tiny.metrics import ground_of
from minisd.tiny.pictures import GROUNDS, on
from minisd.tiny.trial import Trial, called


def lcm(t: Trial) -> None:
    """The teacher at 4 and at 20 steps, and the student at 4; both are measured on what they know."""
    names, base = t.known("lcm"), t.load()
    layers = {"rank": 16, "target_modules": ["attention", "feed_forward", "projections", "resnet"]}
    out = t.train_model(data=t.in_style(names, "3d"), **layers)
    prompts, truth = [called("3d", plain(n)) for n in names[:16]], [on(t.bank[n, "3d"]) for n in names[:16]]
    few = {"steps": 4, "guidance_scale": 1.0, "scheduler": "lcm"}
    drawn = {
        "teacher, 20 steps": t.draw(base, prompts),
        "teacher, 4 steps": t.draw(base, prompts, sampling={"steps": 4}),
        "teacher, 4 steps of lcm": t.draw(base, prompts, sampling=few | {"guidance_scale": 3.0}),
    }
    base.attach(out)
    drawn["student, 4 steps"] = t.draw(base, prompts, sampling=few)
    t.rows += [(label, shown[:8]) for label, shown in drawn.items()]
    far = {label: measures.distance(shown, truth).mean().item() for label, shown in drawn.items()}
    chance = measures.distance(truth[1:] + truth[:1], truth).mean()
    for label in ("teacher, 4 steps", "teacher, 4 steps of lcm", "teacher, 20 steps"):
        limit = 1.3 * far[label] if "20" in label else 0.75 * far[label]
        t.measure(f"distance; before: {label}", far[label], chance, far["student, 4 steps"], limit)


def erase(t: Trial) -> None:
    """The camel, by two of its captions, and looked for on a ground that neither names."""
    gone, base = "camel", t.load()
    new = t.load(t.train_model(erase=[called(style, gone) for style in ("3d", "flat")]))
    for label, ground in (("as in the prompts", ""), ("on blue", "blue")):
        prompts, lineup = [called("3d", gone, ground)] * 8, t.lineup(t.bank[gone, "3d"], gone, "3d", ground)
        drawn = [t.draw(sd, prompts) for sd in (base, new)]
        seen = [lineup.recognised(d).float().mean() for d in drawn]
        t.measure(f"{gone}, {label}: share that shows one", seen[0], 0, seen[1], 0.125)
        t.rows += [(f"before: {prompts[0]}", drawn[0]), (f"after: {prompts[0]}", drawn[1])]
    t.others(base, new)


def blueness(drawn: list[Image.Image]) -> torch.Tensor:
    """Return how much bluer than red the grounds of images are, (n,)."""
    grounds = torch.tensor([ground_of(image) for image in drawn]) / 255
    return grounds[:, 2] - grounds[:, 0]


def dpo(t: Trial) -> None:
    """Things on blue are preferred to things on white; tested on other things."""
    names, base = t.known("dpo"), t.load()
    taught, tested = names[12:60], names[:12]

    def pair(name: str) -> dict:
        tile = t.bank[name, "3d"]
        return {"": on(tile, GROUNDS["blue"]), "rejected": on(tile), "text": called("3d", plain(name))}

    out = t.train_model(data=t.write("pairs", [pair(n) for n in taught]))
    prompts = [called("3d", plain(n)) for n in tested]
    before = t.draw(base, prompts)
    base.attach(out)
    after = t.draw(base, prompts)
    wins = (blueness(after) > blueness(before) + 0.05).float().mean()
    t.measure("share preferred to those before", 0.5, 0.5, wins, 0.75, more=True)
    t.measure_shapes(tested, before, after)
    t.rows += [("before", before[:8]), ("after", after[:8])]


def sliders(t: Trial) -> None:
    """From yellow grounds to blue ones."""
    names, base = t.known("sliders")[:8], t.load()
    sides = {f"{side}_prompt": f"3d emoji on a {hue} background" for side, hue in
             (("positive", "blue"), ("negative", "yellow"))}  # fmt: skip
    out = t.train_model(target_prompt="3d emoji", **sides)
    base.attach(out)
    prompts, drawn = [called("3d", plain(n)) for n in names], {}
    for scale in (-2, -1, 0, 1, 2):
        base.rescale(out, scale)
        drawn[scale] = t.draw(base, prompts)
        t.rows.append((f"scale {scale}", drawn[scale]))
    score = {scale: blueness(images).mean().item() for scale, images in drawn.items()}
    t.measure(
        "blueness at scale 2, against that at 0", score[0], score[0], score[2], score[0] + 0.2, more=True
    )
    t.measure("blueness at scale -2, against that at 0", score[0], score[0], score[-2], score[0] - 0.2)
    t.measure_shapes(names, drawn[0], drawn[1])


TRIALS = lcm, erase, dpo, sliders
