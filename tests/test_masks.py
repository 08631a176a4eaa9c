"""--masked_loss: what a mask hides does not count, wherever its picture is resized, cropped or flipped."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from minisd import files, noise
from minisd.data import datasets, source
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
        image.convert("RGB").save(folder / f"{i}.png")
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
    """White masks change nothing, and half white ones the result; a picture of a class counts as a whole."""
    trained = []
    for kind, flags in (("all", []), ("all", ["--masked_loss"]), ("half", ["--masked_loss"])):
        folder = masked(tmp_path / f"{kind}{len(flags)}", kind)
        out = tmp_path / f"out{len(trained)}"
        flags += ["--max_train_steps", 2, "--train_batch_size", 2, "--caption_column", "text"]
        o = short_run("lora", *flags, data=folder, output_dir=out)
        assert train("lora", o) == 0
        trained.append(files.read(out / "pytorch_lora_weights.safetensors"))
    white, same, half = trained
    assert all(torch.equal(white[k], same[k]) for k in white)
    assert any(not torch.equal(white[k], half[k]) for k in white)


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
