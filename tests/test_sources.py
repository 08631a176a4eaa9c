"""Folders of pictures with each kind of metadata, and what can be wrong with them."""

import json
import sys

import pytest
import torch
from PIL import Image

from minisd.data import source
from minisd.data.datasets import Captioned
from tests.data_helpers import captions, edit_pairs, picture


def read(folder, **kwargs):
    return source.read(folder, flag="--data", **kwargs)


def fails(folder, *words, **kwargs):
    """Reading is refused in one line that names the flag and has these words in it."""
    with pytest.raises(ValueError) as e:
        read(folder, **kwargs)
    message = str(e.value)
    assert message.startswith("--data: ") and "\n" not in message
    for word in words:
        assert word in message, message


# Formats


def test_csv(two):
    text = '\ufefffile_name,text\r\nb.png,"one, two"\r\n\r\na.png,"of two\nlines"\r\n'
    (two / "metadata.csv").write_bytes(text.encode())
    assert captions(read(two)) == {"b.png": "one, two", "a.png": "of two\nlines"}


def test_jsonl_with_several_captions_and_columns(two):
    rows = [{"file_name": f"{n}.png", "additional_feature": [n, n * 2], "n": 1} for n in "ab"]
    (two / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = read(two)
    assert data.columns == ["image", "additional_feature", "n"]
    drawn = {data.caption(0, "additional_feature", torch.Generator().manual_seed(i)) for i in range(20)}
    assert drawn == {"a", "aa"}


def test_parquet_metadata(two):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"file_name": ["b.png", "a.png"], "text": ["B", "A"]}),
                                two / "metadata.parquet")  # fmt: skip
    assert captions(read(two)) == {"b.png": "B", "a.png": "A"}
    (two / "metadata.parquet").write_bytes(b"PAR1")
    fails(two, "metadata.parquet")


def test_parquet_metadata_without_pyarrow(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (two / "metadata.parquet").write_bytes(b"PAR1")
    fails(two, "metadata.parquet", "pip install 'minisd[datasets]'")


def test_sidecars(two):
    (two / "a.txt").write_text(" with a .txt\n")
    (two / "b.caption").write_text("with a .caption")
    (two / "c.txt").write_text("nobody's")
    data = read(two)
    assert captions(data) == {"a.png": "with a .txt", "b.png": "with a .caption"}
    assert data.skipped == ("c.txt: no picture of that name",)


def test_kohya_s_folders(tmp_path):
    for name in ("3_sks dog/a.png", "3_sks dog/b.png", "1_cat/c.png", "0_off/d.png"):
        picture(tmp_path / name)
    (tmp_path / "3_sks dog" / "a.txt").write_text("own words")
    data = read(tmp_path)
    assert captions(data) == {
        "1_cat/c.png": "cat",
        "3_sks dog/a.png": "own words",
        "3_sks dog/b.png": "sks dog",
    }
    assert data.records.epoch == [0, 1, 1, 1, 2, 2, 2]
    assert len(Captioned(data, resolution=8)) == 7
    assert data.skipped == ("0_off: repeated 0 times",) and "7 in an epoch" in data.summary()


def test_the_nearest_metadata_counts(two):
    picture(two / "deep" / "er" / "c.png")
    picture(two / "own" / "d.png")
    (two / "metadata.csv").write_text("file_name,text\na.png,A\nb.png,B\ndeep/er/c.png,C\n")
    (two / "own" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "D"}')
    assert captions(read(two)) == {"a.png": "A", "b.png": "B", "deep/er/c.png": "C", "own/d.png": "D"}


def test_further_pictures_of_a_row(two):
    (two / "metadata.csv").write_text("file_name,conditioning_image_file_name,text\na.png,b.png,A\n")
    (record,) = read(two).records
    assert {c: p.name for c, p in record.pictures.items()} == {
        "image": "a.png",
        "conditioning_image": "b.png",
    }
    assert record.texts == {"text": "A"}


def test_controlnet_s_lines(tmp_path):
    for name in ("source/0.png", "target/0.png"):
        picture(tmp_path / name)
    row = {"source": "source/0.png", "target": "target/0.png", "prompt": "P"}
    (tmp_path / "prompt.json").write_text(json.dumps(row) + "\n")
    data = read(tmp_path)
    assert data.columns == ["source", "target", "prompt"]
    assert data.column("image", flag="--image_column", of="pictures") == "target"
    assert data.column("conditioning_image", flag="-", of="pictures") == "source"
    assert data.column("text", flag="--caption_column") == "prompt"


def test_somebody_s_prompt_json_is_no_metadata(two):
    (two / "prompt.json").write_text('{"prompt": "x"}')
    assert read(two).skipped == ("prompt.json: not a picture",)


def test_what_is_skipped(two):
    for name in (".DS_Store", "notes.pdf"):
        (two / name).write_text("x")
    picture(two / ".ipynb_checkpoints" / "a.png")
    picture(two / "sub" / "c.png")
    picture(two / "2_dog" / "d.png")
    everything = read(two)
    assert [r.name for r in everything.records] == ["2_dog/d.png", "a.png", "b.png", "sub/c.png"]
    assert everything.hidden == (".DS_Store", ".ipynb_checkpoints")
    assert everything.skipped == ("notes.pdf: not a picture",)
    repeated = read(two, subfolders="repeated")
    assert [r.name for r in repeated.records] == ["2_dog/d.png", "a.png", "b.png"]
    assert "sub: a folder" in repeated.skipped
    none = read(two, subfolders="none")
    assert [r.name for r in none.records] == ["a.png", "b.png"] and "2_dog: a folder" in none.skipped
    text = everything.summary()
    assert "4 pictures" in text and "1 with a caption" in text and "12x10 (4)" in text
    assert "hidden: .DS_Store, .ipynb_checkpoints" in text and "notes.pdf: not a picture" in text


def test_links_to_folders_are_followed_once(two, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "c.png")
    (elsewhere / "self").symlink_to(elsewhere)
    (two / "link").symlink_to(elsewhere)
    (two / "loop").symlink_to(two)
    assert [r.name for r in read(two).records] == ["a.png", "b.png", "link/c.png"]


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i:02}.png")
    drawn = [[r.name for r in read(tmp_path, max_samples=5, seed=s).records] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5 and drawn[0] == sorted(drawn[0])
    assert len(read(tmp_path, max_samples=99)) == 12
    train, held = read(tmp_path).split(0.25, seed=0)
    assert len(train) == 9 and len(held) == 3
    assert {r.name for r in train.records} & {r.name for r in held.records} == set()
    assert [len(part) for part in read(tmp_path).split(5, seed=0)] == [7, 5]
    with pytest.raises(ValueError, match="--validation_split 12 leaves none of 12"):
        read(tmp_path).split(12.0, seed=0)


# What is wrong


def test_a_row_without_its_file(two):
    (two / "metadata.csv").write_text("file_name,text\na.png,A\nx.png,X\n")
    fails(two, "metadata.csv, line 3", "there is no", "x.png")


def test_a_file_without_its_row(two):
    (two / "metadata.csv").write_text("file_name,text\na.png,A\n")
    fails(two, "b.png has no row in", "metadata.csv")


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "metadata.csv",
            'file_name,text\na.png,"A\nB"\nb.png,one, two\n',
            ["line 4", "3 cells", "2 columns"],
        ),
        ("metadata.csv", 'file_name,text\na.png,A\nb.png,"never\nends\n', ["line 3"]),
        ("metadata.csv", "file_name,text,text\na.png,A,A\n", ["line 1", "twice"]),
        ("metadata.csv", "file_name,text\n", ["no rows"]),
        ("metadata.csv", "name,text\na.png,A\n", ["line 2", "no column file_name", "name, text"]),
        ("metadata.csv", "file_name,text\n,A\n", ["line 2", "image"]),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", ["metadata.csv", "UTF-8"]),
        ("metadata.jsonl", '{"file_name": "a.png"}\n\n{"file_name"', ["line 3", "bad JSON"]),
        ("metadata.jsonl", '{"file_name": "a.png"}\n["b.png"]', ["line 2", "object"]),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "A"}\n{"file_name": "b.png"}',
            ["line 2", "line 1"],
        ),
        ("metadata.jsonl", '{"file_name": null}', ["line 1", "image"]),
    ],
)
def test_broken_metadata(two, name, content, words):
    (two / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(two, name, *words)


def test_missing_and_empty_folders(tmp_path):
    fails(tmp_path, "no picture", "empty")
    fails(tmp_path / "x", "there is no")
    (tmp_path / "f.txt").write_text("x")
    fails(tmp_path / "f.txt", "is not a folder")
    fails(tmp_path, "no picture", "1 other")


@pytest.mark.parametrize("content", [b"not a picture", None], ids=["text", "truncated"])
def test_bad_pictures(two, content):
    whole = (two / "a.png").read_bytes()
    (two / "b.png").write_bytes(content or whole[: len(whole) // 2])
    fails(two, "b.png", "--skip_bad_images")
    data = read(two, skip_bad_images=True)
    assert [r.name for r in data.records] == ["a.png"] and "b.png" in data.skipped[0]
    (two / "a.png").write_bytes(b"")
    fails(two, "none of the 2", skip_bad_images=True)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_names_that_lead_out_of_the_folder(two, form):
    secret, inside = two.parent / "secret.png", two / "sub"
    (two / "a.png").rename(secret)
    inside.mkdir()
    (two / "b.png").rename(inside / "b.png")
    for name in ("../../secret.png", str(secret), "../sub/../../secret.png"):
        rows = [{"file_name": name, "text": "A"}, {"file_name": "../sub/b.png", "text": "B"}]
        lines = [f"{row['file_name']},{row['text']}" for row in rows]
        text = {"csv": "\n".join(["file_name,text", *lines]), "jsonl": "\n".join(map(json.dumps, rows))}
        (inside / f"metadata.{form}").write_text(text[form])
        fails(two, f"metadata.{form}, line {2 if form == 'csv' else 1}", "outside", "--allow_outside")
        assert [r.texts["text"] for r in read(two, allow_outside=True).records] == ["A", "B"]
    (two / "link.png").symlink_to(secret)  # as in a folder of the hub's cache
    (inside / f"metadata.{form}").write_text(text[form].replace(name, "../link.png"))
    assert len(read(two).records) == 2


def test_more_pixels_than_allowed(two):
    width, height = Image.open(two / "a.png").size
    fails(two, "a.png has more than 10 pixels", "--max_pixels", "--skip_bad_images", max_pixels=10)
    data = read(two, max_pixels=width * height)
    assert data.open(0, "image").size == (width, height)
    Image.new("1", (9500, 9500)).save(two / "b.png")
    fails(two, "b.png has more than 89,478,485 pixels", "--max_pixels")
    assert read(two, max_pixels=10**8).open(1, "image").size == (9500, 9500)


def test_unknown_columns_are_listed(two):
    (two / "metadata.csv").write_text("file_name,caption,mood\na.png,A,x\nb.png,B,y\n")
    with pytest.raises(ValueError, match=r"^--caption_column text: .* image, caption, mood$"):
        Captioned(read(two), resolution=8)
    with pytest.raises(ValueError, match=r"^--image_column photo: .* image, caption, mood$"):
        Captioned(read(two), resolution=8, caption_column="mood", image_column="photo")
    with pytest.raises(ValueError, match="^--edited_image_column|^--edit_prompt_column"):
        edit_pairs(read(two), resolution=8)


def test_pictures_without_captions(two):
    with pytest.raises(ValueError, match="^--caption_column text: .*metadata.csv.*txt"):
        Captioned(read(two), resolution=8)
    (two / "a.txt").write_text("A")
    with pytest.raises(ValueError, match="^--caption_column text: b.png in .* has none"):
        Captioned(read(two), resolution=8)
    (two / "a.txt").unlink()
    (two / "metadata.jsonl").write_text('{"file_name": "a.png", "n": 1}\n{"file_name": "b.png", "n": []}')
    with pytest.raises(ValueError, match="^--caption_column n: .*a.png is not text or texts: 1"):
        Captioned(read(two), resolution=8, caption_column="n")


def test_unequal_pairs(tmp_path):
    picture(tmp_path / "a.png", size=(12, 10))
    picture(tmp_path / "b.png", size=(10, 12))
    (tmp_path / "metadata.csv").write_text(
        "input_image_file_name,edited_image_file_name,edit_prompt\na.png,b.png,P\n"
    )
    with pytest.raises(ValueError, match="unequal pair.*b.png is 10x12.*a.png is 12x10"):
        edit_pairs(read(tmp_path), resolution=8)
    picture(tmp_path / "b.png", size=(24, 20))  # the same shape twice as large
    edit_pairs(read(tmp_path), resolution=8)
