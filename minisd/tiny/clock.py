"""Quality over seconds: the judge's trials at several lengths of training, as a table and a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from minisd import files, reading
from minisd.data import images
from minisd.tiny.trial import Measure, Trial, defaults

PARTS = 1 / 8, 1 / 4, 1 / 2, 1  # of the updates of a trial
WIDTH, HEIGHT, EDGE = 480, 240, 40
COLOURS = (200, 60, 40), (40, 90, 200), (40, 150, 70)


def quality(measures: Sequence[Measure]) -> float:
    """The mean over the measures of how much is gone of the way from before training to what is needed; of
    what was good enough before, and is not any more, the ratio of the two. From 0 to 1, if all pass."""
    shares = []
    for m in measures:
        if replace(m, after=m.before).passed:
            share = min(m.after, m.need) / max(m.after, m.need)
        else:
            share = (m.after - m.before) / (m.need - m.before)
        shares.append(1.0 if m.passed else min(max(share, 0.0), 1.0))
    return sum(shares) / len(shares)


def shorter(kind: type[Trial], part: float) -> type[Trial]:
    """A trial that trains a part of the updates."""

    class Shorter(kind):
        def train(self, **flags) -> Path:
            whole = flags.get("max_train_steps") or defaults()[self.method]["max_train_steps"]
            self.updates = max(1, round(part * whole))
            return super().train(**flags | {"max_train_steps": self.updates})

    return Shorter


def measure(
    trials: Mapping, methods: Sequence[str], kinds: Mapping[str, type[Trial]], model: Path, out: Path, flags
) -> dict[str, dict[str, list[dict]]]:
    """Run the `trials` of the methods by each of `kinds`, such as {"train.py": Trial}, print a line for each
    length, and write OUT/clock.json and OUT/clock.png. Each length is a training of its own, with its own
    schedule of the learning rate. Seconds are those of training, loading and saving included."""
    found: dict[str, dict[str, list[dict]]] = {}
    print(f"{'':32} {'updates':>8} {'seconds':>8} {'quality':>8}")
    for method in methods:
        found[method] = {name: [] for name in kinds}
        for part in PARTS:
            for name, kind in kinds.items():
                t = shorter(kind, part)(method, model, reading.real(out / f"{method}-{name}"), flags, False)
                trials[method](t)
                row = {"updates": t.updates, "seconds": t.training, "quality": quality(t.measures)}
                row["passed"] = all(m.passed for m in t.measures)
                found[method][name].append(row)
                numbers = f"{row['updates']:8} {row['seconds']:8.0f} {row['quality']:8.2f}"
                print(f"{f'{method}, {name}':32} {numbers}  {'pass' if row['passed'] else ''}", flush=True)
        for name, rows in found[method].items():
            passed = next((f"{r['seconds']:.0f} s" for r in rows if r["passed"]), "not reached")
            print(f"{method}, {name}: time to quality: {passed}", flush=True)
        files.write_text(out / "clock.json", json.dumps(found, indent=1) + "\n")
        charts = [(m, [chart(rows)]) for m, rows in found.items()]
        images.save_png(images.labelled_rows(charts, size=None), out / "clock.png")
    return found


def chart(lines: Mapping[str, list[dict]]) -> Image.Image:
    """Quality, from 0 to 1, over seconds, from 0; a filled point has passed all measures."""
    picture = Image.new("RGB", (WIDTH + 2 * EDGE, HEIGHT + 2 * EDGE), "white")
    draw, longest = ImageDraw.Draw(picture), max(r["seconds"] for rows in lines.values() for r in rows)
    draw.rectangle((EDGE, EDGE, EDGE + WIDTH, EDGE + HEIGHT), outline=(150, 150, 150))
    for x, text in ((EDGE, "0"), (EDGE + WIDTH - 30, f"{longest:.0f} s")):
        draw.text((x, EDGE + HEIGHT + 8), text, fill="black")
    for y, text in ((EDGE, "1"), (EDGE + HEIGHT - 10, "0")):
        draw.text((EDGE - 14, y), text, fill="black")
    for i, (name, rows) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [(EDGE + WIDTH * r["seconds"] / longest, EDGE + HEIGHT * (1 - r["quality"])) for r in rows]
        draw.line(points, fill=colour, width=2)
        for (x, y), row in zip(points, rows, strict=True):
            fill = colour if row["passed"] else "white"
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=fill, outline=colour, width=2)
        draw.text((EDGE + 8 + 120 * i, 16), name, fill=colour)
    return picture
