"""The judge: what it measures by, that textual inversion passes, and that what learns nothing does not."""

import functools
import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from minisd.data import images
from minisd.options import TINY
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank, clock, judge, measures, trial, unseen
from minisd.tiny.concepts import UNSEEN
from minisd.tiny.pictures import GROUNDS, WHITE, main_hue, on, posed, recoloured, silhouette, turned

BANK = bank.read()
NAMES = bank.names()


def drawn(style: str, names=NAMES) -> list[Image.Image]:
    return [on(BANK[name, style]) for name in names]


def noise(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    return [images.to_pil(torch.randn(3, 64, 64, generator=generator)) for _ in range(count)]


def test_rank_counts_what_is_nearer():
    cat, others = on(BANK["cat", "3d"]), drawn("3d", [name for name in NAMES if name != "cat"])
    assert measures.rank([cat], cat, others) == 0
    assert measures.rank([on(BANK["cat", "flat"])], cat, others) <= 2
    assert measures.rank(noise(5), cat, others) > 20
    assert measures.rank(others[:3], others[1], [others[0], others[2]]) == 1  # of ranks 1 or 2, 0, 1 or 2


def test_outlines_are_silhouettes_on_any_ground():
    for ground in (*GROUNDS.values(), (255, 255, 255)):
        for name in ("camel", "police-car"):
            own, other = (images.to_tensor(silhouette(BANK[n, "3d"]))[0] > 0 for n in (name, "t-shirt"))
            seen = measures.outline(on(BANK[name, "3d"], ground))
            assert measures.overlap(seen, own) > 0.85 > 0.7 > measures.overlap(seen, other)


def test_frechet_distance_is_of_sets():
    threes, flats = drawn("3d"), drawn("flat")
    assert measures.frechet(threes, threes) == pytest.approx(0, abs=1e-6)
    assert measures.frechet(threes[::2], threes[1::2]) < 2 < 10 < measures.frechet(threes, noise(100))
    assert measures.frechet(threes, flats) == pytest.approx(measures.frechet(flats, threes), rel=1e-6)
    # Of Gaussians around different means with one covariance, it is the means' squared distance.
    dark = [Image.eval(image, lambda v: v // 2) for image in threes]
    darker = [Image.eval(image, lambda v: v // 2 + 51) for image in threes]
    assert measures.frechet(dark, darker) == pytest.approx(192 * 0.2**2, rel=1e-3)


def test_styles_are_told_apart():
    styles = measures.Styles({style: drawn(style, NAMES[::2]) for style in bank.STYLES})
    for style in bank.STYLES:
        assert styles.share(drawn(style, NAMES[1::2]), style) > 0.85
        other = drawn("3d" if style != "3d" else "flat", NAMES[1::2])
        assert styles.score(drawn(style), style).mean() > 0.6 > 0.3 > styles.score(other, style).mean()


def test_shuffled_rows_have_another_s_picture(tmp_path):
    rows = [{"": Image.new("RGB", (8, 8), (i, 0, 0)), "text": str(i)} for i in range(6)]
    for shuffled in (False, True):
        t = trial.Trial("lora", TINY, tmp_path / str(shuffled), [], shuffled)
        folder = t.write("rows", rows)
        shown = [images.open_image(folder / f"{i:05}.png").getpixel((0, 0))[0] for i in range(6)]
        assert shown == ([2, 3, 4, 5, 0, 1] if shuffled else list(range(6)))


# Things of three kinds: drawn for the judge, held out from training, known.
TILES = {name: concept.tile() for name, concept in UNSEEN.items()}
TILES |= {name: BANK[name, "3d"] for name in ("bat", "otter", "ambulance", "camel")}


def others(name: str) -> list[Image.Image]:
    known = UNSEEN[name].bank if name in UNSEEN else name
    return [BANK[n, "3d"] for n in NAMES if n != known]


@functools.cache
def model() -> StableDiffusion:
    return StableDiffusion.load(TINY)


def re_encoded(drawn: list[Image.Image]) -> list[Image.Image]:
    mean, _ = model().encode_images(torch.stack([images.to_tensor(image) for image in drawn]))
    return [images.to_pil(pixels) for pixels in model().decode(mean)]


def patches(tile: Image.Image) -> list[Image.Image]:
    """What has a thing's colours without its shape: the thing blurred, and an ellipse of its mean colour."""
    blurred = tile.convert("RGBa").filter(ImageFilter.GaussianBlur(6)).convert("RGBA")
    mean = tile.convert("RGBa").resize((1, 1), Image.Resampling.BOX).convert("RGBA").getpixel((0, 0))
    ellipse = Image.new("RGBA", tile.size)
    ImageDraw.Draw(ellipse).ellipse(tile.getbbox(), fill=(*mean[:3], 255))
    return [blurred, ellipse]


def most_alike(tile: Image.Image, tiles: list[Image.Image], count: int = 12) -> list[Image.Image]:
    """Those of `tiles` whose shape is nearest to the thing's, in its hue."""
    alike = measures.alike(*(measures.shapes([on(t) for t in some]) for some in ([tile], tiles)))[0]
    return [recoloured(tiles[i], main_hue(tile)[0]) for i in alike.topk(count).indices]


@pytest.mark.parametrize("name", TILES)
def test_a_thing_is_recognised_and_nothing_else(name):
    tile = TILES[name]
    for ground, another in ((WHITE, GROUNDS["pink"]), (GROUNDS["blue"], WHITE)):
        lineup = measures.Lineup(tile, others(name), ground)
        changes = {"shift": (2, -1)}, {"scale": 0.95}, {"angle": 4}
        true = [on(posed(tile, **change), ground) for change in changes]
        true += re_encoded([on(tile, ground), on(posed(tile, shift=(1, 1)), ground)])
        assert lineup.recognised(true).all()
        wrong = [*patches(tile), turned(tile, 90), turned(tile, 180), *most_alike(tile, others(name))]
        assert not lineup.recognised([*(on(thing, ground) for thing in wrong), on(tile, another)]).any()


def test_a_row_is_trained_once(tmp_path, monkeypatch):
    """And again when a flag is another."""
    trained = []

    def train(t, concept):
        trained.append(t.flags)
        return t.load(), "cat"

    monkeypatch.setitem(unseen.TRAINERS, "lora", train)
    monkeypatch.setitem(trial.defaults()["sample"], "steps", 1)
    rows = [unseen.run("lora", "teapot", 1, TINY, tmp_path, flags) for flags in ([], [], ["--rank", "2"])]
    assert trained == [["--seed", "1"], ["--rank", "2", "--seed", "1"]]
    assert rows[0] == rows[1] and not unseen.learned(rows[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora-teapot-1.json", "lora-teapot-1.png"]


@pytest.mark.slow
def test_textual_inversion_learns_its_concept(tmp_path):
    measured = judge.judge("textual_inversion", TINY, tmp_path, [])
    assert len(measured) == 9 and all(m.passed for m in measured), measured
    assert Image.open(tmp_path / "textual_inversion.png").height > 7 * 128


@pytest.mark.slow
def test_what_does_not_learn_does_not_pass(tmp_path, monkeypatch, capsys):
    """By the command, whose status says so."""
    flags = ["--learning_rate", "1e-12", "--max_train_steps", "5", "--lr_warmup_steps", "0"]
    monkeypatch.setattr(sys, "argv", ["judge", "textual_inversion", "--out", str(tmp_path), "--", *flags])
    assert judge.main() == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_unknown_method_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["judge", "lore"])
    with pytest.raises(ValueError, match="no method lore; there are textual_inversion, "):
        judge.main()


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in judge.TRIALS if m != "textual_inversion"])
class TestEveryMethod:
    def test_passes(self, method, tmp_path):
        measured = judge.judge(method, TINY, tmp_path, [])
        assert measured and all(m.passed for m in measured), measured

    def test_fails_without_a_learning_rate(self, method, tmp_path):
        if method == "edit":  # it has none
            return
        measured = judge.judge(method, TINY, tmp_path, ["--learning_rate", "1e-12", "--max_train_steps", "5"])
        assert not all(m.passed for m in measured), measured


@pytest.mark.slow
@pytest.mark.parametrize("method", ["text_to_image", "controlnet", "instruct_pix2pix"])
def test_fails_on_another_s_captions(method, tmp_path):
    measured = judge.judge(method, TINY, tmp_path, [], shuffled=True)
    assert not all(m.passed for m in measured), measured


def test_quality_is_the_way_to_what_is_needed():
    """Of what training has to move; what must stay counts where it has not stayed."""
    half = trial.Measure("rank", 10, 5, 6, 2)
    beyond = trial.Measure("share", 0, 0, 1, 0.5, more=True)
    worse = trial.Measure("distance", 4, 4, 5, 2)
    stays = trial.Measure("others", 1, 0, 1, 0.75, more=True)
    assert clock.quality([half]) == 0.5 and clock.quality([beyond]) == 1 and clock.quality([worse]) == 0
    assert clock.quality([half, beyond, worse, stays]) == 0.625
    lost = trial.Measure("others", 1, 0, 0.375, 0.75, more=True)
    assert clock.quality([beyond, lost]) == pytest.approx(0.75)


def test_the_clock(tmp_path, monkeypatch, capsys):
    """A line for each length, a table, and a picture in which both kinds are."""

    class Fast(trial.Trial):
        def train(self, **flags):
            self.training += flags["max_train_steps"] / self.speed
            return tmp_path

    def trained(t):
        t.train_model()
        t.measure("rank", 10, 5, 10 - t.updates / 10, 2)

    kinds = {"a": type("A", (Fast,), {"speed": 10}), "b": type("B", (Fast,), {"speed": 5})}
    found = clock.measure({"lora": trained}, ["lora"], kinds, TINY, tmp_path, [])
    whole = trial.defaults()["lora"]["max_train_steps"]
    assert [row["updates"] for row in found["lora"]["a"]] == [round(part * whole) for part in clock.PARTS]
    assert [row["seconds"] * 10 for row in found["lora"]["a"]] == [
        row["seconds"] * 5 for row in found["lora"]["b"]
    ]
    assert f"lora, b: time to quality: {whole / 2 / 5:.0f} s" in capsys.readouterr().out
    colours = {c for _, c in Image.open(tmp_path / "clock.png").convert("RGB").getcolors(10**6)}
    assert {*clock.COLOURS[:2]} <= colours and clock.COLOURS[2] not in colours
