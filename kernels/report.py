"""What the benchmarks write: a table in Markdown, the same rows as JSON, and a picture of the roofline."""

import datetime
import json
import math
import platform
import subprocess
from pathlib import Path

import torch

SMI = "driver_version power.limit clocks.max.sm clocks.max.mem clocks.sm clocks.mem temperature.gpu".split()


def about(**more: object) -> dict[str, object]:
    """Return the machine and the versions; with a GPU its driver, power limit and clocks, as nvidia-smi
    reports them at this moment."""
    found = dict(device="CPU", torch=torch.__version__, python=platform.python_version())
    if torch.cuda.is_available():
        found |= dict(device=torch.cuda.get_device_name(), cuda=torch.version.cuda)
        found["cudnn"] = torch.backends.cudnn.version()
        uuid = f"GPU-{torch.cuda.get_device_properties('cuda').uuid}"
        query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        try:
            values = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
            found |= dict(zip(SMI, values.strip().split(", "), strict=True))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            found["nvidia-smi"] = f"not available ({type(error).__name__})"
    return found | dict(date=datetime.date.today().isoformat()) | more


def reason(error: Exception) -> str:
    """Return a line about whatever a compiler, a launch or an import raises."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def table(columns: dict[str, str], rows: list[dict]) -> list[str]:
    """Return lines of Markdown. A column has a heading and a format of a row. A row that lacks values has its
    "reason" in the first of their columns."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(line(columns, row) for row in rows)]


def line(columns: dict[str, str], row: dict) -> str:
    cells, reason = [], row.get("reason", "-")
    for form in columns.values():
        try:
            cells.append(form.format(**row))
        except (KeyError, TypeError):  # a missing number, or None
            cells.append(reason)
            reason = ""
    return f"| {' | '.join(cells)} |"


def write(out: Path, name: str, facts: dict, columns: dict[str, str], rows: list[dict], **picture) -> None:
    """Write NAME.json and NAME.md to a folder, and the `roofline` as NAME.png if the limits are known."""
    out.mkdir(parents=True, exist_ok=True)
    text = [*(f"{k}: {v}  " for k, v in facts.items()), "", *table(columns, rows), ""]
    (out / f"{name}.json").write_text(json.dumps(dict(about=facts, rows=rows), indent=1), encoding="utf-8")
    (out / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    if picture["reach"]:
        roofline(rows, **picture).save(out / f"{name}.png")


def roofline(rows: list[dict], label: str, reach: dict, size=(1000, 640)):
    """Return a log-log plot of FLOP/s over FLOP/byte: the limits, and below them the rows, in a colour for
    each value of `label`. What has no matrix products is drawn at one FLOP a byte."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    draw, peak, slope = ImageDraw.Draw(image), math.log10(reach["flops"]), math.log10(reach["bytes"])
    marks = []
    for row in (row for row in rows if "ms" in row):
        work = row["flops"] or row["bytes"]
        marks.append((row[label], math.log10(work / row["bytes"]), math.log10(1e3 * work / row["ms"])))
    xs, ys = [x for _, x, _ in marks] + [peak - slope], [y for _, _, y in marks] + [peak]
    (left, right), (low, high) = ((math.floor(min(v)), math.ceil(max(v) + 0.1)) for v in (xs, ys))

    def at(x: float, y: float) -> tuple[float, float]:
        """The place of a power of ten."""
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return 70 + across * (size[0] - 110), size[1] - 50 - up * (size[1] - 70)

    for k in range(left, right + 1):
        draw.line([at(k, low), at(k, high)], "#dddddd")
        draw.text(at(k, low), f"{10.0**k:g}", "black")
    for k in range(low, high + 1):
        draw.line([at(left, k), at(right, k)], "#dddddd")
        draw.text((5, at(left, k)[1] - 6), f"{10.0 ** (k - 12):g}", "black")
    draw.text((70, size[1] - 20), "FLOP/byte", "black")
    draw.text((5, 4), "TFLOP/s", "black")
    start = max(left, low - slope)
    draw.line([at(start, start + slope), at(peak - slope, peak), at(right, peak)], "black", 2)
    kinds = sorted({label for label, *_ in marks})
    colours = {kind: f"hsl({round(360 * i / len(kinds))},80%,40%)" for i, kind in enumerate(kinds)}
    for i, kind in enumerate(kinds):
        draw.text((80, 30 + 14 * i), kind, colours[kind])
    for label, x, y in marks:
        px, py = at(x, y)
        draw.ellipse([px - 4, py - 4, px + 4, py + 4], outline=colours[label], width=2)
    return image
