"""sample.py --heatmap: where words act, beside each image."""

import importlib

import minisd
from minisd.data import images
from minisd.options import TINY
from minisd.sampling.heat import overlay
from tests.conftest import ROOT

PROMPT = "3d emoji of a red apple on a blue background"


def test_the_maps_are_those_of_the_paper(command, tmp_path, monkeypatch):
    """As docs/research/heat_maps.py computes them; images are those without maps."""
    flags = ["--prompt", PROMPT, "a blue (apple:1.2)", "--steps", 2, "--seed", 4]
    for name, more in (("a", ["--heatmap", "apple", "blue"]), ("b", [])):
        assert command("sample.py", *flags, *more, "--output", tmp_path / name)[0] == 0
    names = [f"0000{i}-seed-{4 + i}" for i in range(2)]
    for name in names:
        assert (tmp_path / "a" / f"{name}.png").read_bytes() == (tmp_path / "b" / f"{name}.png").read_bytes()
    assert len([*(tmp_path / "a").iterdir()]) == 5 and len([*(tmp_path / "b").iterdir()]) == 3

    monkeypatch.syspath_prepend(ROOT / "docs" / "research")
    heat_maps = importlib.import_module("heat_maps").heat_maps
    sd = minisd.load(TINY, device="cpu")
    image, maps = heat_maps(sd, PROMPT, ["apple", "blue"], steps=2, seed=4, guidance_scale=3.0)
    expected = images.grid([image, *(overlay(image, heat) for heat in maps)], columns=3)
    first, second = (images.open_image(tmp_path / "a" / f"{name}-heat.png") for name in names)
    assert first.tobytes() == expected.tobytes() and second.tobytes() != first.tobytes()


def test_a_word_that_is_not_there_draws_nothing(command, tmp_path):
    flags = ["--prompt", "a red apple", "--steps", 1, "--output", tmp_path / "x.png"]
    status, _, said = command("sample.py", *flags, "--heatmap", "apple", "pear")
    assert status == 2 and "--heatmap 'pear' is not in the prompt 'a red apple'" in said
    assert not [*tmp_path.iterdir()]
    (tmp_path / "x-heat.png").write_text("mine")
    status, _, said = command("sample.py", *flags, "--heatmap", "apple")
    assert status == 2 and "x-heat.png exists: --overwrite replaces it" in said
    assert command("sample.py", *flags)[0] == 0  # which writes no such file
    assert (tmp_path / "x-heat.png").read_text() == "mine"
