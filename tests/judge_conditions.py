"""What controlnet and instruct_pix2pix learn beside the conditions and edits of the judge, on the tiny model.

    python tests/judge_conditions.py [NAME ...] [--steps 400 1600]

A condition's row has the updates, and the likeness of 16 images to it: drawn without it, drawn with it but
compared with another thing's, drawn with it. An edit's row has the updates, and for things of the training
data and for others how many images are nearer to the edited image than to the one that was given, and their
mean distance from it (in brackets that between both).
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisd.data import images  # noqa: E402
from minisd.data.canny import canny  # noqa: E402
from minisd.options import TINY  # noqa: E402
from minisd.sampling.generate import Control  # noqa: E402
from minisd.tiny import measures  # noqa: E402
from minisd.tiny.data import loose, plain  # noqa: E402
from minisd.tiny.pictures import HUES, on, posed, recoloured, silhouette  # noqa: E402
from minisd.tiny.trial import Trial, called  # noqa: E402


def cells(image: Image.Image) -> Image.Image:
    """The mean colour of each 8x8 pixels."""
    return image.resize((8, 8), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def white(image: Image.Image) -> torch.Tensor:
    """Where a condition is white, (h, w) of bool."""
    return images.to_tensor(image)[0] > 0


def far(a: Image.Image, b: Image.Image) -> float:
    """The mean difference of two images, from 0 to 2."""
    return (images.to_tensor(a) - images.to_tensor(b)).abs().mean().item()


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def f1(a: torch.Tensor, b: torch.Tensor) -> float:
    """F1 of two sets of edges, each within a pixel of the other's."""
    near = [torch.nn.functional.max_pool2d(x[None].float(), 3, 1, 1)[0] > 0 for x in (a, b)]
    found, true = (a & near[1]).sum() / a.sum().clamp(min=1), (b & near[0]).sum() / b.sum().clamp(min=1)
    return (2 * found * true / (found + true).clamp(min=1e-9)).item()


# By name: the condition of a thing with transparency, and how alike a drawn image is to it.
CONDITIONS = {
    "silhouette": (silhouette, lambda d, c: measures.overlap(measures.outline(d), white(c))),
    "edges": (lambda tile: canny(on(tile)), lambda d, c: f1(white(canny(d)), white(c))),
    "colours of cells": (lambda tile: cells(on(tile)), lambda d, c: 1 - far(cells(d), c)),
    "grey values": (lambda tile: grey(on(tile)), lambda d, c: 1 - far(grey(d), c)),
    "mirrored silhouette": (
        lambda tile: ImageOps.mirror(silhouette(tile)),
        lambda d, c: measures.overlap(measures.outline(d), white(ImageOps.mirror(c))),
    ),
}
EDITS = {
    "make it purple": lambda tile: recoloured(tile, HUES["purple"]),
    "mirror it": ImageOps.mirror,
    "turn it upside down": lambda tile: tile.rotate(180),
    "move it right": lambda tile: posed(tile, shift=(16, 0)),
}


def control(name: str, steps: int, out: Path) -> str:
    t = Trial("controlnet", TINY, out, ["--max_train_steps", str(steps)], False)
    condition, likeness = CONDITIONS[name]
    names, chance, base = t.known("control"), random.Random("control"), t.load()

    def pair(thing: str) -> dict:
        tile = loose(t.bank[thing, "3d"], chance)
        return {"": on(tile), "conditioning_image": condition(tile), "text": called("3d", plain(thing))}

    trained = t.train_model(data=t.write("control", [pair(n) for n in names for _ in range(3)]))
    tested = [pair(n) for n in names[:16]]
    prompts, hints = [p["text"] for p in tested], [p["conditioning_image"] for p in tested]
    hint = torch.stack([images.to_tensor(h) for h in hints]) / 2 + 0.5
    before = t.draw(base, prompts)
    after = t.draw(base, prompts, controls=[Control(network=base.controlnet(str(trained)), hint=hint)])
    found = [
        sum(likeness(d, hints[i - k]) for i, d in enumerate(drawn)) / len(drawn)
        for drawn, k in ((before, 0), (after, 1), (after, 0))
    ]
    rows = [("condition", hints[:8]), ("without it", before[:8]), ("with it", after[:8])]
    images.save_png(images.labelled_rows(rows, size=128), out / "sheet.png")
    return f"| {name} | {steps} | {found[0]:.2f} | {found[1]:.2f} | {found[2]:.2f} |"


def edit(name: str, steps: int, out: Path) -> str:
    t = Trial("instruct_pix2pix", TINY, out, ["--max_train_steps", str(steps)], False)

    def pair(thing: str) -> dict:
        tile = t.bank[thing, "3d"]
        return {"input_image": on(tile), "edited_image": on(EDITS[name](tile)), "edit_prompt": name}

    pairs = [pair(thing) for thing in t.known("edits")]
    sd = t.load(t.train_model(data=t.write("edits", pairs[12:])))
    guidance = {"guidance_scale": 1.5, "image_guidance_scale": 1.0}
    row, sheet = [name, str(steps)], []
    for part in (pairs[12:], pairs[:12]):
        given, true = ([p[k] for p in part] for k in ("input_image", "edited_image"))
        changed = [i for i, d in enumerate(measures.distance(given, true)) if d > 2][:12]
        given, true = ([some[i] for i in changed] for some in (given, true))
        originals = torch.stack([images.to_tensor(image) for image in given])
        drawn = t.draw(sd, [name] * len(given), sampling=guidance, init_images=originals)
        near, between = measures.distance(drawn, true), measures.distance(given, true).mean()
        right = (near < measures.distance(drawn, given)).sum()
        row += [f"{right} of {len(given)}", f"{near.mean():.1f} ({between:.1f})"]
        sheet += [("given", given[:8]), ("edited", true[:8]), ("drawn", drawn[:8])]
    images.save_png(images.labelled_rows(sheet, size=128), out / "sheet.png")
    return f"| {' | '.join(row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(CONDITIONS | EDITS))
    parser.add_argument("--steps", nargs="+", type=int, default=[400])
    parser.add_argument("--out", type=Path, default=Path("judged/conditions"))
    o = parser.parse_args()
    for name in o.names or CONDITIONS | EDITS:
        for steps in o.steps:
            kind = control if name in CONDITIONS else edit
            print(kind(name, steps, o.out / f"{name}-{steps}"), flush=True)


if __name__ == "__main__":
    main()
