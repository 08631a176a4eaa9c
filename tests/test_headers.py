"""The start of a run reads headers alone, and what is wrong behind them is said when it is met."""

import itertools
import os
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from minisd.data import headers, images, quick
from minisd.data.source import read
from tests.data_helpers import noisy, picture
from tests.method_helpers import options, train


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of six images that is large data, with a cache of its own."""
    monkeypatch.setattr(headers, "FEW", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(6):
        picture(tmp_path / "data" / f"{i}.png", size=(40 + i, 32))
        (tmp_path / "data" / f"{i}.txt").write_text(f"number {i}")
    return tmp_path / "data"


def cut(path):
    """Damage the image behind its header."""
    noisy((64, 64), 0).save(path)
    path.write_bytes(path.read_bytes()[:6000])


def sizes(source):
    return source.records.sizes["image"]


@pytest.fixture
def opened(monkeypatch):
    """The images that are opened for their size, and whether they are decoded."""
    seen, whole = [], images.read_size

    def spy(path, **how):
        seen.append((os.path.basename(str(path)), how["whole"]))
        return whole(path, **how)

    monkeypatch.setattr(images, "read_size", spy)
    return seen


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_a_header_has_the_size_that_decoding_gives(tmp_path, form):
    path = tmp_path / f"a.{form}"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        noisy((12, 7), 0).save(path, exif=exif) if form not in ("gif", "bmp") else noisy((12, 7), 0).save(
            path
        )
        shown = images.open_image(path).size
        assert images.read_size(str(path), whole=False, max_pixels=None) == shown
        assert images.read_size(str(path), whole=True, max_pixels=None) == shown
        assert shown == ((7, 12) if orientation > 4 and form not in ("gif", "bmp") else (12, 7))


def test_plain_headers_are_read_as_pillow_does(tmp_path):
    path = tmp_path / "image"

    def both():
        """The sizes by the first bytes, if they say it, and by Pillow."""
        with Image.open(path) as image:
            return quick.size(str(path), 1 << 30), image.size

    for mode, how in itertools.product(("L", "RGB", "CMYK"), ({}, {"progressive": True}, {"comment": b"a"})):
        noisy((70, 33), 0).convert(mode).save(path, "JPEG", **how)
        assert both() == ((70, 33), (70, 33)), (mode, how)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        noisy((70, 33), 0).convert("L").convert(mode).save(path, "PNG", dpi=(72, 72))
        assert both() == ((70, 33), (70, 33)), mode
    # What may turn an image is left to Pillow: EXIF, XMP, and texts.
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", "<x/>")
    exif = Image.Exif()
    exif[0x0112] = 6
    turning = [("JPEG", {"exif": exif}), ("JPEG", {"xmp": b"<x/>"}), ("PNG", {"exif": exif})]
    for form, how in [
        *turning,
        ("PNG", {"pnginfo": texts}),
        ("WEBP", {}),
        ("JPEG", {"icc_profile": b"1" * 20000}),
    ]:
        noisy((70, 33), 0).save(path, form, **how)
        assert both() == (None, (70, 33)), (form, how)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_damaged_header_is_left_to_pillow(tmp_path, form):
    path = tmp_path / "image"
    noisy((70, 33), 0).save(path, form)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for end in range(200):
        path.write_bytes(whole[:end])
        assert quick.size(str(path), 1 << 30) is None or form == "PNG"
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(0, 60)] = random.integers(0, 256)
        path.write_bytes(damaged)
        found = quick.size(str(path), 1 << 30)
        with suppress(OSError, SyntaxError), Image.open(path) as image:  # such as for a damaged table
            assert found in (None, image.size)
    with pytest.raises(ValueError, match="is not a file"):
        quick.size(str(tmp_path), 1 << 30)


def test_sizes_are_remembered_until_a_file_changes(many, opened):
    expected = [(40 + i, 32) for i in range(6)]
    assert sizes(read(many, flag="--data")) == expected
    assert sorted(opened) == [(f"{i}.png", False) for i in range(6)]
    opened.clear()
    assert sizes(read(many, flag="--data")) == expected and not opened
    picture(many / "2.png", size=(9, 9))
    assert sizes(read(many, flag="--data"))[2] == (9, 9) and opened == [("2.png", False)]
    # That a header was read does not say that the image can be decoded.
    opened.clear()
    read(many, flag="--data", skip_bad_images=True)
    assert sorted(opened) == [(f"{i}.png", True) for i in range(6)]
    opened.clear()
    read(many, flag="--data", skip_bad_images=True)
    assert not opened
    with pytest.raises(ValueError, match=r"0\.png has more than 1,000 pixels; --max_pixels"):
        read(many, flag="--data", max_pixels=1000)


def test_a_damaged_memory_is_not_used(many, opened, tmp_path):
    first = sizes(read(many, flag="--data"))
    (memory,) = (tmp_path / "cache" / "minisd" / "sizes").iterdir()
    content = memory.read_bytes()
    for damaged in (b"", content[:-3], content[:50] + bytes([content[50] ^ 7]) + content[51:], content * 2):
        memory.write_bytes(damaged)
        opened.clear()
        assert sizes(read(many, flag="--data")) == first and len(opened) == 6
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder can be made here")
    assert sizes(read(many, flag="--data")) == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_read_what_threads_do(many, monkeypatch, tmp_path):
    (many / "3.png").write_text("not a picture")
    monkeypatch.setattr(headers, "PROCESSES_FROM", 2)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="^--data: .*3.png is not a picture; --skip_bad_images"):
        read(many, flag="--data")
    data = read(many, flag="--data", skip_bad_images=True)
    assert sizes(data) == [(40 + i, 32) for i in (0, 1, 2, 4, 5)]
    assert len(data.bad) == 1 and Image.MAX_IMAGE_PIXELS == limit


def test_an_image_that_has_changed_since_the_start(many):
    data = read(many, flag="--data")
    picture(many / "0.png", size=(10, 11))
    with pytest.raises(ValueError, match="^--data: .*0.png was 40x32 at the start, and is 10x11"):
        data.open(0, "image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_run_in_one_line_and_it_goes_on_once_repaired(many, model, tmp_path, workers):
    flags = ["--model", model, "--data", many, "--resolution", 32, "--checkpointing_steps", 1]
    flags += ["--train_batch_size", 1, "--max_train_steps", 6, "--num_validation_images", 1]
    flags += ["--resume_from_checkpoint", "latest", "--dataloader_num_workers", workers]
    whole, out = tmp_path / "whole", tmp_path / "out"
    picture(many / "1.png", size=(64, 64))
    assert train("text_to_image", options("text_to_image", *flags, "--output_dir", whole)) == 0
    good = (many / "1.png").read_bytes()
    cut(many / "1.png")
    with pytest.raises(ValueError) as e:
        train("text_to_image", options("text_to_image", *flags, "--output_dir", out))
    line = str(e.value)
    assert re.match("--data: .*1.png cannot be decoded: .*--skip_bad_images", line) and "\n" not in line
    (many / "1.png").write_bytes(good)
    assert train("text_to_image", options("text_to_image", *flags, "--output_dir", out)) == 0
    for name in ("log.jsonl", "checkpoint-6/trained.safetensors", "checkpoint-6/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_report_on_the_data(many, model, tmp_path, capsys):
    flags = [
        "--model",
        model,
        "--data",
        many,
        "--resolution",
        32,
        "--output_dir",
        tmp_path / "out",
        "--check_data",
    ]
    (many / "5.txt").write_text("word " * 90)
    shutil.copy(many / "2.png", many / "3.png")
    assert train("text_to_image", options("text_to_image", *flags, "--bucket")) == 0
    out = capsys.readouterr().out
    assert "6 pictures" in out and "buckets: " in out and "without a caption: 0" in out
    assert "which are cut off: 1 (5.png)" in out and "2.png = " in out and "the same content: 1" in out
    assert not (tmp_path / "out").exists()
    cut(many / "4.png")
    (many / "0.txt").unlink()
    with pytest.raises(ValueError, match="^--check_data: problems in .*: 2$"):
        train("text_to_image", options("text_to_image", *flags))
    out = capsys.readouterr().out
    assert "without a caption: 1 (0.png)" in out and re.search("wrong: .*4.png cannot be decoded", out)
    assert "wrong: --caption_column text: 0.png" in out
    with pytest.raises(
        ValueError, match="4.png cannot be decoded"
    ):  # also if its header is remembered as good
        read(many, flag="--data").open(4, "image")


def test_the_report_of_every_method(many, model, tmp_path, capsys):
    for path in many.glob("*.txt"):
        path.unlink()
    for method in ("textual_inversion", "autoencoder", "unconditional"):
        flags = ["--data", many, "--resolution", 32, "--output_dir", tmp_path / "out", "--check_data"]
        flags += ["--model", model] if method != "unconditional" else []
        flags += ["--initializer_token", "cat"] if method == "textual_inversion" else []
        assert train(method, options(method, *flags)) == 0
        assert "6 pictures" in capsys.readouterr().out
    assert np.all([p.name == "data" or p.name == "cache" for p in tmp_path.iterdir()])
