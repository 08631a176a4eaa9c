"""The tiny model's data, its first weights, and what it is measured by."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minisd import cli, registry
from minisd.data.source import read as read_source
from minisd.formats import config_json
from minisd.options import TINY
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank, data, init, metrics, pictures
from tests.method_helpers import REWARD

NAMES = {
    "1f408": "cat",
    "1f42a": "camel",
    "1f34e": "red-apple",
    "1f987": "bat",
    "1f981": "lion",
    "2b50": "star",
}
WORLD = {
    "concepts": {"animal": "cat camel bat lion", "fruit": "red-apple"},
    "core": "cat red-apple",
    "held_out": {
        "concepts": "bat",
        "style": [["lion", "flat"]],
        "hue": [["cat", "green"], ["red-apple", "blue"]],
    },
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Made-up packages in the layout of the real ones: a shape of its own for every name and style."""
    root = tmp_path_factory.mktemp("packages")
    places = {"fluent-emoji-3d/assets": (256, ".webp"), "fluent-emoji-flat/assets": (32, ".png")}
    places["noto/img/google/64"] = (64, ".png")
    for place, (side, suffix) in places.items():
        (root / place).mkdir(parents=True)
        for i, code in enumerate(NAMES):
            image = Image.new("RGBA", (side, side))
            box = (side // 8, side // 8, side * 3 // 4, side * (4 + i % 4) // 8)
            ImageDraw.Draw(image).ellipse(box, fill=(200, 30 * i, 60, 255))
            image.save(root / place / f"{code}{'-fe0f' if i == 0 else ''}{suffix}")
    (root / "names").mkdir()
    (root / "names" / "chars.json").write_text(json.dumps(NAMES))
    rows = [{"unified": code.upper(), "category": "Objects", "subcategory": "sky"} for code in NAMES]
    (root / "noto" / "emoji.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def built(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "world", lambda: WORLD)
    data.build(tmp_path / "data", packages, "small")
    return tmp_path / "data"


def captions(folder) -> list[str]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    return [t for text in texts for t in ([text] if isinstance(text, str) else text)]


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_bytes_again(built, packages):
    data.build(built.parent / "again", packages, "small")
    assert files(built) == files(built.parent / "again")
    with pytest.raises(ValueError, match="is not empty"):
        data.build(built, packages, "small")


def test_nothing_trains_on_what_is_held_out(built):
    texts = captions(built / "train")
    assert any("camel" in t for t in texts) and any("red apple" in t for t in texts)
    assert not any("bat" in t.split() for t in texts + captions(built / "noto") + captions(built / "control"))
    assert not any("lion" in t and t.startswith("flat") for t in texts)
    assert any("lion" in t and t.startswith("3d") for t in texts)
    assert not any("green cat" in t or "blue apple" in t for t in texts)
    assert set(captions(built / "held_out/hues")) == {
        f"{style} emoji of {thing}" for style in data.STYLES for thing in ("a green cat", "a blue apple")
    }
    assert captions(built / "held_out/styles") == ["flat emoji of a lion"]
    assert captions(built / "held_out/concepts/bat")[1] == "3d emoji of a {} on a red background"
    seen = [json.loads(line) for line in (built / "bank/metadata.jsonl").read_text().splitlines()]
    assert {(r["name"], r["style"]) for r in seen if r["seen"]} == {
        (name, style) for name in ("cat", "camel", "lion", "red apple") for style in data.STYLES
    } - {("lion", "flat")}


def test_the_folders_are_what_train_reads(built):
    columns = {
        "train": ["image", "text"],
        "noto": ["image", "text"],
        "control": ["image", "conditioning_image", "text"],
        "edits": ["input_image", "edited_image", "edit_prompt"],
        "held_out/concepts/bat": ["image", "text"],
    }
    for folder, expected in columns.items():
        source = read_source(built / folder, flag="--data")
        assert source.columns == expected and not source.skipped
        assert {size for r in source.records for size in r.sizes.values()} == {(64, 64)}
    assert "MIT" in (built / "NOTICE.md").read_text()


def test_the_bank_in_one_file_is_the_bank(built):
    tiles = bank.read(built / "bank.webp")
    rows = [json.loads(line) for line in (built / "bank/metadata.jsonl").read_text().splitlines()]
    assert len(tiles) == len(rows) == 15
    for row in rows:
        exact = pictures.on(Image.open(built / "bank" / row["file_name"]).convert("RGBA"))
        tile = pictures.on(tiles[row["name"].replace(" ", "-"), row["style"]])
        assert np.abs(np.asarray(exact, float) - np.asarray(tile, float)).mean() < 3


def test_the_bank_in_the_box_is_whole():
    assert set(bank.read()) == {(name, style) for name in bank.names() for style in bank.STYLES}
    assert all(image.getchannel("A").getextrema()[1] > 200 for image in bank.read().values())


def test_other_worlds(packages, built):
    data.build(built.parent / "core", packages, "core")
    texts = captions(built.parent / "core/train")
    assert any("apple" in t for t in texts) and not any("camel" in t or "bat" in t for t in texts)
    assert (built.parent / "core/held_out/concepts/bat").is_dir()
    data.build(built.parent / "wide", packages, "wide")
    assert any("star" in t for t in captions(built.parent / "wide/train"))
    assert not any("star" in t for t in captions(built / "train"))


def test_hues_are_turned_and_named():
    image = Image.new("RGBA", (64, 64), (200, 40, 40, 255))
    assert "red" not in pictures.hues_of(image) and "blue" in pictures.hues_of(image)
    hue, saturation = pictures.main_hue(pictures.recoloured(image, pictures.HUES["blue"]))
    assert hue == pytest.approx(pictures.HUES["blue"], abs=3) and saturation > 0.5
    gray = Image.new("RGBA", (64, 64), (120, 120, 120, 255))
    assert pictures.main_hue(pictures.recoloured(gray, 110))[0] == pytest.approx(110, abs=3)


def test_nothing_bleeds_into_what_is_transparent():
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((64, 64, 191, 191), fill=(255, 0, 0, 255))
    drawn = np.asarray(pictures.resized(image))
    assert drawn.shape == (64, 64, 4) and (drawn[drawn[..., 3] > 8][:, 0] > 240).all()
    assert pictures.on(pictures.resized(image)).getpixel((32, 32)) == (255, 0, 0)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("cat face", "a cat face"),
        ("orange fox", "an orange fox"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("bread", "bread"),
        ("cherries tilted to the left", "cherries tilted to the left"),
    ],
)
def test_articles(words, expected):
    assert data.article(words) == expected


def test_without_npm_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed.*--packages"):
        data.fetch(tmp_path)


def test_what_is_drawn_is_found_in_the_bank(built):
    things = metrics.Things.load(built)
    numbers = [things.find("cat", "3d"), things.find("lion", "flat"), things.find("camel", "noto")]
    drawn = [pictures.on(things.pictures[n]) for n in numbers]
    distances = things.distances(drawn)
    assert distances.shape == (3, len(things.rows))
    assert [distances[i, n].item() for i, n in enumerate(numbers)] == pytest.approx([0] * 3, abs=1e-3)
    assert things.ranks(distances, numbers) == [0, 0, 0]
    # The rank counts nearer things of the same style alone.
    far = things.find("camel", "3d")
    row = distances[0]
    nearer = [i for i, r in enumerate(things.rows) if r["style"] == "3d" and row[i] < row[far]]
    assert things.ranks(distances[:1], [far]) == [len(nearer)] and nearer
    with pytest.raises(ValueError, match="no 3d picture of 'dodo'"):
        things.find("dodo", "3d")


@pytest.mark.parametrize("ground", [*pictures.GROUNDS, "white"])
def test_the_ground_of_a_picture_is_named(built, ground):
    thing = metrics.Things.load(built).pictures[0]
    assert (
        metrics.ground_name(pictures.on(thing, {"white": pictures.WHITE, **pictures.GROUNDS}[ground]))
        == ground
    )


def test_a_start_that_has_learned_nothing(built, tmp_path, monkeypatch):
    """The same bytes again, and a tokenizer that takes the words of the data apart and puts them together."""
    monkeypatch.setattr(init, "VOCABULARY", 540)  # as few words as these allow
    monkeypatch.setattr(init.config_json, "read", lambda folder, part: small(read(folder, part)))
    for name in ("start", "again"):
        init.write(tmp_path / name, built)
    assert files(tmp_path / "start") == files(tmp_path / "again")
    sd = StableDiffusion.load(tmp_path / "start")
    ids = sd.tokenizer.encode("3d emoji of a cat")
    assert len(ids) < len("3demojiofacat")
    assert (
        "".join(map(sd.tokenizer.bpe.id_to_token, ids)).replace("</w>", " ").split()
        == "3 d emoji of a cat".split()
    )
    assert sd.text_encoder.text_model.embeddings.token_embedding.weight.std() == pytest.approx(0.02, rel=0.1)


read = config_json.read


def small(config):
    """With the vocabulary that these few words allow."""
    return replace(config, vocab_size=540) if hasattr(config, "vocab_size") else config


def test_every_default_is_a_flag():
    """And one that the method takes; of the methods with a model, each has some."""
    defaults = json.loads((TINY / "defaults.json").read_text())
    sample = {f.name for f in fields(cli.Sample)}
    assert defaults.pop("sample").keys() <= sample
    general = defaults.pop("methods")  # of a method that has none of its own, as far as it has them
    flags = {m: {f.name for f in fields(cli.options_of(m))} for m in registry.names("methods")}
    assert defaults.keys() == {m for m in flags if "model" in flags[m]}
    assert general.keys() <= set().union(*flags.values())
    needs = {
        "data": Path("d"),
        "instance_prompt": "a sks cat",
        "erase": ["a cat"],
        "reward": REWARD,
        "prompt": ["a"],
    }
    needs |= {f"{name}_prompt": f"a {name} cat" for name in ("target", "positive", "negative")}
    for method, values in defaults.items():
        assert values.keys() <= flags[method], method
        cli.options_of(method)(**{k: v for k, v in needs.items() if k in flags[method]}, **values)


def test_a_model_that_draws_the_truth_is_told_from_one_that_does_not_listen(built, monkeypatch):
    things = metrics.Things.load(built)

    def truth(sd, prompts, seed):
        drawn = []
        for prompt in prompts:
            style = prompt.split()[0]
            row = next(r for r in things.rows if r["style"] == style and data.uncoloured(r["name"]) in prompt)
            picture = things.pictures[things.find(row["name"], style)]
            words = prompt.split(" on ")[0].split()
            hue = next((w for w in words if w in pictures.HUES and w not in row["name"]), None)
            picture = pictures.recoloured(picture, pictures.HUES[hue]) if hue else picture
            ground = next((g for g in pictures.GROUNDS if f"{g} background" in prompt), None)
            drawn.append(pictures.on(picture, pictures.GROUNDS.get(ground, pictures.WHITE)))
        return drawn

    monkeypatch.setattr(metrics, "draw", truth)
    figures, rows = metrics.evaluate(None, things, [])
    assert all(figures["seen"][k] == 1 for k in ("top1", "top5", "style"))
    assert figures["right hue, held out"] == figures["right ground (chance is 1 in 9)"] == 1
    assert all(0 < len(row) <= 8 for _, row in rows)
    same = truth(None, ["3d emoji of a camel"], 0)
    monkeypatch.setattr(metrics, "draw", lambda sd, prompts, seed: same * len(prompts))
    figures, _ = metrics.evaluate(None, things, [])
    assert figures["seen"]["top1"] < 0.3 and figures["right hue, held out"] < 1
    assert figures["right ground (chance is 1 in 9)"] == 0


def test_the_cat_has_a_hue_without_a_name(built):
    assert min(abs(hue - data.TURQUOISE) for hue in pictures.HUES.values()) > 40
    folder = read_source(built / "cat", flag="--data")
    assert len(folder) == 5 and all("{}" in r.texts["text"] for r in folder.records)
    drawn = Image.open(built / "cat/1.png").convert("RGBA")
    assert pictures.main_hue(drawn)[0] == pytest.approx(data.TURQUOISE, abs=5)
    assert [metrics.ground_name(Image.open(built / f"cat/{i}.png")) for i in range(1, 6)] == [
        "white", "red", "yellow", "purple", "gray"
    ]  # fmt: skip
