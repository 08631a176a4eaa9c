"""Folders of pairs for ControlNet and InstructPix2Pix, and the helpers that their tests share."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from minisd import cli, registry
from minisd.data.order import Stream, collate
from minisd.training import loop
from minisd.training.run_folder import Run


def make_pairs(folder: Path, count: int = 4) -> Path:
    """`count` lines of {"source", "target", "prompt"}: an outline, and the filled shape."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        box, colour = (8 + i, 8, 40, 30 + 3 * i), (255, 60 * i, 90)
        for kind in ("source", "target"):
            image = Image.new("RGB", (48, 40), "black" if kind == "source" else (40 * i, 200, 128))
            fill = {"outline": "white"} if kind == "source" else {"fill": colour}
            ImageDraw.Draw(image).ellipse(box, **fill)
            image.save(folder / f"{kind}{i}.png")
        rows.append({"source": f"source{i}.png", "target": f"target{i}.png", "prompt": f"shape {i}"})
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options(method: str, *flags) -> object:
    """The options of a short run without trackers."""
    argv = ["--method", method, "--train_batch_size", "2", "--report_to", "none", "--max_train_steps", "2"]
    return cli.parse_train([*argv, *map(str, flags)])[1]


def built(method: str, o, count: int = 4):
    """A method ready to compute, its trained parameters, and a batch."""
    m = registry.load("methods", method).Method(o)
    trained = m.build()
    stream = Stream(m.dataset(), o.seed)
    return m, trained, collate([stream[k] for k in range(count)])


def train(method: str, o) -> int:
    return loop.train(registry.load("methods", method).Method(o), Run(method, o))


def shake(module: torch.nn.Module, size: float = 0.05) -> None:
    """Random values everywhere: no zero convolutions, no zero biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))


def psnr(a, b) -> float:
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def assert_exactly_these_train(m, trained: dict, batch: dict) -> None:
    """Gradients reach the parameters that the method declares and no others, and all of these change."""
    everything = {f"{part}.{n}": p for part, module in m.parts.items() for n, p in module.named_parameters()}
    assert trained.keys() <= everything.keys()
    before = {n: p.detach().clone() for n, p in everything.items()}
    m.loss(batch).backward()
    assert {n for n, p in everything.items() if p.grad is not None} == trained.keys()
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    assert {n for n, p in everything.items() if not torch.equal(p, before[n])} == trained.keys()


def assert_gradients(trained: dict, theirs: torch.nn.Module, prefix: str, rename=lambda name: name) -> None:
    """Each gradient agrees within 1e-4 of its largest value, or of 1e-4 of the largest of all gradients."""
    floor = 1e-4 * max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        error = (trained[prefix + rename(name)].grad - p.grad).abs().max() / max(p.grad.abs().max(), floor)
        assert error <= 1e-4, f"{name} is off by {error:.1e}"
