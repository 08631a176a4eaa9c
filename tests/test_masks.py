"""--masked_loss: what a mask hides does not count, wherever its picture is resized, cropped or flipped."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from minisd import files, noise
from minisd.data import datasets, index, source
from minisd.methods._base import Method
from tests.method_helpers import train


def masked(folder, picture="left", sizes=((48, 40), (40, 48))):
    """Pictures and masks of one kind: the left half white, or all of it."""
    (folder / "masks").mkdir(parents=True)
    rows = []
    for i, (w, h) in enumerate(sizes):
        image = Image.new("L", (w, h), 255 if picture == "all" else 0)
        ImageDraw.Draw(image).rectangle((0, 0, w // 2 - 1, h), fill=255)
        image.save(folder / "masks" / f"{i}.png")
        image = image if picture == "left" else Image.linear_gradient("L").resize((w, h))
        image = image.convert("RGB")
        if picture == "half":  # transparent where the mask is black
            image.putalpha(Image.open(folder / "masks" / f"{i}.png"))
        image.save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a cat", "mask_file_name": f"masks/{i}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("how", [{}, {"bucket": True, "step": 8}, {"squash": True}, {"center_crop": True}])
def test_a_mask_goes_where_its_picture_goes(tmp_path, how):
    """Of pictures that are their own masks."""
    found = source.read(masked(tmp_path / "data"), flag="--data")
    data = datasets.Captioned(found, resolution=24, random_flip=True, masked=True, **how)
    assert len(data) == 2
    for number in range(8):
        view = data.examples(number % 2, noise.generator(number))[0].view
        mask = data.extras(view)["mask"]
        assert mask.shape == (1, *view.shape[::-1]) and 0 < mask.mean() < 1
        assert torch.equal(mask[0], data.pixels(view)[1] / 2 + 0.5)


def cutouts(folder):
    """Black pictures, opaque in their left half alone, in three modes, and one without an alpha channel."""
    folder.mkdir()
    alpha = Image.new("L", (48, 40))
    ImageDraw.Draw(alpha).rectangle((0, 0, 23, 40), fill=255)
    rgba, grey = Image.new("RGBA", alpha.size, "black"), Image.new("LA", alpha.size)
    palette = ImageOps.invert(alpha).point(lambda v: v > 0).convert("P")  # entry 1 is transparent
    palette.putpalette([0, 0, 0, 0, 0, 0])
    for name, image in (("a", rgba), ("b", grey)):
        image.putalpha(alpha)
        image.save(folder / f"{name}.png")
    palette.save(folder / "c.png", transparency=1)
    Image.new("RGB", alpha.size, "black").save(folder / "d.png")
    for name in "abcd":
        (folder / f"{name}.txt").write_text("a cat")
    return folder


@pytest.mark.parametrize("kind", ["folder", "table", "index"])
def test_pictures_that_mask_themselves(tmp_path, kind):
    """What is transparent is white and does not count; one without an alpha channel counts as a whole."""
    folder = cutouts(tmp_path / "data")
    if kind == "table":
        rows = [json.dumps({"file_name": f"{n}.png", "text": "x"}) for n in "abcd"]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    elif kind == "index":
        index.make(str(folder), tmp_path / "index")
        folder = tmp_path / "index"
    found = source.read(folder, flag="--data")
    data = datasets.Captioned(found, resolution=24, random_flip=True, alpha=True)
    flips = set()
    for number in range(32):
        view = data.examples(number % 4, noise.generator(number))[0].view
        mask, pixels = data.extras(view)["mask"], data.pixels(view)
        assert mask.shape == (1, *view.shape[::-1])
        if found.records.names[view.record].endswith("d.png"):
            assert mask.all() and not (pixels + 1).any()
        else:
            assert 0 < mask.mean() < 1
            torch.testing.assert_close(mask[0], 0.5 - pixels[1] / 2, atol=1.01 / 255, rtol=0)
            flips.add(bool(mask[0, :, 0].mean() < mask[0, :, -1].mean()))
    assert flips == {False, True}


def test_masks_come_before_the_alpha_channel(tmp_path):
    """And are black where they are transparent themselves."""
    folder = masked(tmp_path / "data", sizes=[(48, 48)])
    for name in ("0.png", "masks/0.png"):
        Image.open(folder / name).convert("RGBA").save(folder / name)
    image = Image.new("RGBA", (48, 48), "white")
    image.paste((255, 255, 255, 0), (0, 0, 48, 24))
    image.save(folder / "masks" / "0.png")
    found = source.read(folder, flag="--data")
    for flags, mean in (
        ({"masked": True}, 0.5),
        ({"masked": True, "alpha": True}, 0.5),
        ({"alpha": True}, 1),
    ):
        data = datasets.Captioned(found, resolution=48, **flags)
        assert data.extras(data.views()[0])["mask"].mean() == mean


def test_what_the_mask_hides_has_no_gradient():
    """The mean is of what counts, so that its scale stays; a grey counts as much as it is white."""
    pred = torch.randn(3, 4, 4, 4, requires_grad=True)
    mask = torch.ones(3, 1, 32, 32)
    mask[0, :, :, 16:] = 0
    mask[1], mask[2] = 0.5, 0
    errors = Method.errors(
        SimpleNamespace(mean=lambda *a: Method.mean(None, *a)), pred, torch.zeros(()), {"mask": mask}
    )
    squares = pred.detach().square()
    wanted = squares[0, :, :, :2].mean(), squares[1].mean(), torch.zeros(())
    torch.testing.assert_close(errors, torch.stack(wanted))
    errors.sum().backward()
    assert not pred.grad[0, :, :, 2:].any() and pred.grad[0, :, :, :2].all() and not pred.grad[2].any()


def test_training_with_masks(tmp_path, short_run):
    """White masks change nothing, and half white ones the result, which alpha channels do as well."""
    trained, on_disk = [], ["--latents_dir", tmp_path / "latents"]
    for kind, flags in (
        ("all", []), ("all", ["--masked_loss"]), ("half", ["--masked_loss"]), ("half", ["--alpha_mask"]),
        ("half", ["--alpha_mask", *on_disk]), ("half", []),
    ):  # fmt: skip
        folder = masked(tmp_path / f"data{len(trained)}", kind)
        out = tmp_path / f"out{len(trained)}"
        flags += [
            "--center_crop",
            "--max_train_steps",
            2,
            "--train_batch_size",
            2,
            "--caption_column",
            "text",
        ]
        o = short_run("lora", *flags, data=folder, output_dir=out)
        assert train("lora", o) == 0
        trained.append(files.read(out / "pytorch_lora_weights.safetensors"))
    white, same, half, alpha, stored, whole = trained
    for one, other in ((white, same), (half, alpha), (alpha, stored)):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(not torch.equal(whole[k], half[k]) for k in whole)


def test_prior_preservation_with_masks(tmp_path):
    instances, classes = (source.read(masked(tmp_path / n, sizes=[(48, 48)]), flag="--data") for n in "ab")
    views = {"resolution": 32, "center_crop": True}
    data = datasets.Prior(
        datasets.Captioned(instances, masked=True, **views), datasets.Captioned(classes, **views), 1.0
    )
    own, other = (data.extras(e.view)["mask"] for e in data.examples(0, noise.generator(0)))
    assert own.shape == other.shape == (1, 32, 32) and own.mean() == 0.5 and other.all()


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "--masked_loss mask: data has no such column, but image, text"),
        ({"mask_file_name": "none.png"}, "metadata.jsonl, line 1: there is no data/none.png"),
        ({"mask_file_name": ""}, "metadata.jsonl, line 1: no file is named for the column mask"),
        (
            {"mask_file_name": "wide.png"},
            "--masked_loss: an unequal pair in data: .*48x40, .*wide.png is 48x20",
        ),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, monkeypatch, row, message):
    monkeypatch.chdir(tmp_path)
    masked(tmp_path / "data", sizes=[(48, 40)])
    (tmp_path / "data" / "masks" / "0.png").unlink()
    if row.get("mask_file_name") == "wide.png":
        Image.new("L", (48, 20)).save("data/wide.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "0.png", "text": "a cat"} | row)
    )
    with pytest.raises(ValueError, match=message):
        datasets.Captioned(source.read(tmp_path.__class__("data"), flag="--data"), resolution=32, masked=True)


def test_no_picture_masks_itself(tmp_path):
    found = source.read(masked(tmp_path / "data"), flag="--data")
    with pytest.raises(ValueError, match="--alpha_mask: no image in .*data has an alpha channel"):
        datasets.Captioned(found, resolution=32, alpha=True)
