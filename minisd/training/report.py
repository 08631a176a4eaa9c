"""Runs on a page of HTML: report.html in the folder of each, or by `minisd compare RUN RUN...` side by side.

A page needs no network, and is a function of options.json, run.json, log.jsonl and the names of the pictures
alone, so that a run which was stopped and went on ends with the bytes of one that was not.
"""

import html
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote

from minisd import files, reading, registry
from minisd.options import default_of, require

NAME, MOST = "report.html", 500  # points of a curve; of longer ones, means of as many parts are drawn
CURVES = {
    "loss": "Loss", "validation_loss": "Held-out loss", "lr": "Learning rate", "grad_norm": "Gradient norm",
}  # fmt: skip
COLOURS = "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"
WIDTH, HEIGHT, LEFT, BELOW = 560, 220, 62, 22  # of a diagram, in its own units
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1rem auto;max-width:84rem;padding:0 1rem;color:#111}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0}figcaption{font-weight:600}svg,img{display:block;width:100%;height:auto}img{max-width:40rem}
svg text{font-size:12px;fill:#555}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}td{overflow-wrap:anywhere}
"""
Points = list[tuple[float, float]]


@dataclass
class RunData:
    """What the files of a run say."""

    path: Path
    options: dict
    facts: dict  # of run.json
    log: list[dict]
    pictures: list[str]  # names within the folder, oldest first

    @classmethod
    def read(cls, path: Path) -> "RunData":
        """ValueError, naming the file, if the folder is not that of a run."""
        options = reading.read_json(path / "options.json")
        facts = reading.read_json(path / "run.json") if (path / "run.json").is_file() else {}
        log, lines = path / "log.jsonl", []
        if log.is_file():  # whose last line a kill may have cut off
            texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [reading.parse_json(text, log) for text in texts if text.endswith("}")]
        for line in lines:
            numbers = isinstance(line, dict) and all(isinstance(v, int | float) for v in line.values())
            require(numbers and "step" in line, f"{log} has a line that is not of a run: {str(line)[:100]}")
        last = max((line["step"] for line in lines), default=0)
        drawn = [p.name for p in path.glob("validation/step-*.png") if p.stem[5:].isdecimal()]
        names = [f"validation/{name}" for name in sorted(drawn) if int(name[5:-4]) <= last]
        names += ["result.png"] * (path / "result.png").is_file()
        return cls(path, options, facts, lines, names)

    def points(self, name: str) -> Points:
        return [(line["step"], line[name]) for line in self.log if name in line]

    def changed(self) -> set[str]:
        """The names of the flags that are not their method's defaults; of all, if the method is gone."""
        method = self.options.get("method")
        declared = (
            fields(registry.load("methods", method).Options) if method in registry.names("methods") else ()
        )
        known = {f.name: shown(default_of(f)) for f in declared}
        return {name for name, value in self.options.items() if shown(value) != known.get(name)}


def shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def thinned(points: Points) -> Points:
    """At most MOST points: the means of equal parts."""
    count = max(1, -(-len(points) // MOST))
    parts = (points[i : i + count] for i in range(0, len(points), count))
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Points) -> Points:
    """The mean of each value and those just before it, a twentieth of all."""
    window, sums = max(1, len(points) // 20), [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    spans = [(max(0, i - window), i) for i in range(1, len(points) + 1)]
    return [(points[b - 1][0], (sums[b] - sums[a]) / (b - a)) for a, b in spans]


def diagram(title: str, curves: Iterable[tuple[str, str, Points]]) -> str:
    """An SVG of curves, each with its label and how its line looks."""
    curves = [(label, look, thinned(points)) for label, look, points in curves if points]
    if not curves:
        return ""
    xs, ys = zip(*(point for _, _, points in curves for point in points), strict=True)
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)
    across, up = (WIDTH - LEFT - 8) / (last - first or 1), (HEIGHT - BELOW - 10) / (high - low or 1)
    parts = []
    for label, look, points in curves:
        places = (
            f"{LEFT + (x - first) * across:.1f},{HEIGHT - BELOW - (y - low) * up:.1f}" for x, y in points
        )
        value = f"<title>{html.escape(label)}: {points[-1][1]:.4g}</title>"
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" {look}>{value}</polyline>')
    parts += [f'<text x="0" y="{y}">{value:.3g}</text>' for y, value in ((14, high), (HEIGHT - BELOW, low))]
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{first}</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{last} updates</text>')
    view = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{view}</figure>"


def diagrams(runs: list[RunData]) -> str:
    """The diagrams of all values; the loss is smoothed, and of a single run as it is too."""
    found = []
    for name, title in CURVES.items():
        curves = []
        for i, run in enumerate(runs):
            points, look = run.points(name), f'stroke="{COLOURS[i % len(COLOURS)]}"'
            if name == "loss" and len(runs) == 1:
                curves.append(("raw", f'{look} stroke-opacity=".3"', points))
            line = smoothed(points) if name == "loss" else points
            curves.append((run.path.name, f'{look} stroke-width="2"', line))
        found.append(diagram(title, curves))
    return "".join(found)


def table(of: list[dict], heads: list[str]) -> str:
    """A table of texts with a column for each of `heads`; of several, the rows whose columns differ."""
    names = dict.fromkeys(name for values in of for name in values)
    rows = {name: [shown(values.get(name, "")) for values in of] for name in names}
    rows = {name: row for name, row in rows.items() if len(heads) == 1 or len({*row}) > 1}
    colours = (COLOURS[i % len(COLOURS)] for i in range(len(heads)))
    top = [f'<th style="color:{c}">{html.escape(h)}</th>' for h, c in zip(heads, colours, strict=True)]
    cells = [
        [f"<th>{html.escape(k)}</th>", *(f"<td>{html.escape(v)}</td>" for v in row)]
        for k, row in rows.items()
    ]
    lines = "".join(f"<tr>{''.join(line)}</tr>" for line in [["<th></th>", *top], *cells])
    return f"<table>{lines}</table>" if rows else "<p>the same</p>"


def pictures(run: RunData, place: Path) -> str:
    """All pictures of a run, the latest first, by links from the folder `place`."""
    figures = []
    for name in map(html.escape, reversed(run.pictures)):
        source = quote(Path(os.path.relpath(run.path / name, place)).as_posix())
        figures.append(f'<figure><figcaption>{name}</figcaption><img src="{source}" alt="{name}"></figure>')
    return f"<div>{''.join(figures)}</div>" if figures else ""


def page(runs: list[RunData], place: Path) -> str:
    """The page of runs, to be written into the folder `place`."""
    heads, ends = [reading.real(run.path).name for run in runs], []
    for run in runs:
        last = {t: f"{smoothed(p)[-1][1]:.4g}" for n, t in CURVES.items() if (p := run.points(n))}
        done = {"Method": run.options.get("method", ""), "Updates": run.log[-1]["step"] if run.log else 0}
        ends.append(done | last)
    changed = set().union(*(run.changed() for run in runs))
    flags = [{name: shown(v) for name, v in run.options.items() if name in changed} for run in runs]
    title = html.escape(", ".join(heads))
    parts = {
        "At the end": table(ends, heads),
        "Curves": f'<div class="grid">{diagrams(runs)}</div>',
        "Pictures": f'<div class="grid">{"".join(pictures(run, place) for run in runs)}</div>',
        "Flags that are not the defaults": table(flags, heads),
        "Data and machine": table([run.facts for run in runs], heads),
    }
    return "".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<h2>{name}</h2>{part}" for name, part in parts.items()),
        "</body></html>\n",
    ])  # fmt: skip


def write(path: Path) -> None:
    """Write the report of the run in a folder."""
    files.write_text(path / NAME, page([RunData.read(path)], path))
