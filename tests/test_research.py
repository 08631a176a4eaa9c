"""docs/research/: each file is short, uses what is public, and does what its paper says."""

import ast
import importlib
import sys

import numpy as np
import pytest
import torch

import minisd
from minisd.noise import randn
from minisd.options import TINY
from tests.conftest import ROOT

FILES = sorted((ROOT / "docs" / "research").glob("*.py"))


@pytest.fixture(scope="module")
def sd():
    return minisd.load(TINY, device="cpu")


@pytest.fixture
def load(monkeypatch):
    """load("heat_maps"): a file of the folder as a module."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "research")
    yield importlib.import_module
    for path in FILES:
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_public_names_alone(path):
    assert len(path.read_text().splitlines()) <= 120
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(part.startswith("_") for name in names for part in name.split("."))
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__doc__", node.attr


def test_heat_maps(load, sd):
    """The map of the thing is high on the thing, and that of the background's colour is high around it."""
    image, (apple, blue) = load("heat_maps").heat_maps(
        sd, "3d emoji of a red apple on a blue background", ["apple", "blue"], seed=0, steps=15
    )
    pixels = torch.from_numpy(np.asarray(image.resize((32, 32))).astype("float32"))
    ground = (pixels[..., 2] - pixels[..., 0]) > 60  # bluer than red
    assert 0.1 < ground.float().mean() < 0.9
    assert apple[~ground].mean() > 1.2 * apple[ground].mean()
    assert blue[ground].mean() > 1.2 * blue[~ground].mean()
    with pytest.raises(SystemExit, match="lacks 'pear'"):
        load("heat_maps").places(sd, "a red apple", "pear")


def test_prompt_to_prompt(load, sd):
    """The edit has the source's outline, more than the second prompt by itself has, and its own colour."""
    edit, words = load("prompt_to_prompt").edit, ("3d emoji of a red apple", "3d emoji of a green apple")
    common = {"steps": 15, "seed": 0}
    source, edited = edit(sd, *words, cross=0.8, own=0.4, **common)
    unchanged, alone = edit(sd, *words, cross=0, own=0, **common)
    assert source.tobytes() == unchanged.tobytes()

    def outline(image):
        return np.asarray(image).min(axis=2) < 200

    same = [(outline(source) == outline(image)).mean() for image in (edited, alone)]
    assert same[0] > same[1]
    red, green, _ = np.asarray(edited)[outline(edited)].mean(axis=0)
    assert green > red


def test_attend_and_excite(load, sd):
    """The least attended word is attended to more; without strength it is the ordinary image."""
    draw, prompt = load("attend_and_excite").draw, "3d emoji of a cat on a blue background"
    image, before = draw(sd, prompt, ["cat", "blue"], strength=0, steps=20, seed=0)
    (plain,) = sd.generate(prompt, steps=20, seed=0, scheduler="ddim")
    assert image.tobytes() == plain.tobytes()
    _, after = draw(sd, prompt, ["cat", "blue"], strength=300, steps=20, seed=0)
    assert after > 1.05 * before


def test_memorisation(load, sd):
    """What is known well is drawn alike from all seeds; the length is that of predictions with and without
    the prompt along the way, written out."""
    file = load("memorisation")
    known, strange = (
        file.magnitude(sd, prompt, steps=10)[1] for prompt in (file.PROMPTS[0], file.STRANGE[0])
    )
    assert file.alike(known) > 0.9 > 0.75 > file.alike(strange)
    found, (image,) = file.magnitude(sd, "3d emoji of a cat", seeds=1, steps=3)
    way = [x.clone() for x in sd.steps("3d emoji of a cat", steps=3, guidance_scale=3.0, scheduler="ddim")]
    (drawn,) = sd.pictures(way[-1])
    assert image.tobytes() == drawn.tobytes()
    start = randn(way[0].shape[1:], [torch.Generator().manual_seed(0)])
    times = sd.schedule.inference_timesteps(3, "leading", 1).round().int().tolist()
    text, empty = (sd.encode_text([prompt]) for prompt in ("3d emoji of a cat", ""))
    added = []
    with torch.no_grad():
        for x, t in zip([start, *way], times, strict=False):
            added.append((sd.predict(x, t, text) - sd.predict(x, t, empty)).square().mean().sqrt())
    assert found == pytest.approx(sum(added).item() / 3, rel=1e-3)
