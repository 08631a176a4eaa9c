"""Pictures in and out, and the examples of textual inversion."""

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.data import images
from minisd.data.datasets import ConceptPictures
from minisd.data.source import read


def concept(folder, **changes):
    options = {"style": False, "resolution": 16, "center_crop": False, "flip_p": 0.5, "repeats": 3} | changes
    return ConceptPictures(read(folder, flag="--data", subfolders="none"), "<cat>", **options)


def first_pixels(dataset, flipped=False):
    """The pixels of the first picture."""
    return next(dataset.pixels(view) for view in dataset.views() if view.flipped is flipped)


def test_pixels_equal_diffusers_example_script_s(cat):
    """Squashed bicubically to a square, from the centred square if asked."""
    path = sorted(cat.iterdir())[0]
    image = Image.open(path).convert("RGB")
    squashed = np.array(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    got = first_pixels(concept(cat))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), squashed)
    assert np.array_equal(
        first_pixels(concept(cat), flipped=True).permute(1, 2, 0).numpy(), squashed[:, ::-1]
    )
    assert image.size == (48, 40)
    cropped = image.crop((4, 0, 44, 40)).resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(first_pixels(concept(cat, center_crop=True)), images.to_tensor(cropped))


def test_exif_and_transparency(tmp_path):
    red = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.save(tmp_path / "a.png")
    image = images.open_image(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((1, 1)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "b.jpg", exif=exif)
    assert images.open_image(tmp_path / "b.jpg").size == (2, 4)


def test_tensor_round_trip():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(images.to_pil(images.to_tensor(image))), np.asarray(image))


def test_a_folder_lists_what_it_skips(cat, tmp_path):
    for path in cat.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "0.txt").write_text("my {} at home")
    (tmp_path / "sub").mkdir()
    dataset = concept(tmp_path, repeats=1)
    assert len(dataset) == len(dataset.source) == 5
    assert dataset.source.skipped == ("notes.pdf: not a picture",)
    assert dataset.examples(0, torch.Generator())[0].prompt == "my <cat> at home"
    assert "<cat>" in dataset.examples(1, torch.Generator())[0].prompt


def test_a_caption_without_the_token_is_an_error(cat, tmp_path):
    (tmp_path / "0.png").write_bytes(sorted(cat.iterdir())[0].read_bytes())
    (tmp_path / "0.txt").write_text("a dog")
    with pytest.raises(ValueError, match="0.png.*a dog"):
        concept(tmp_path)
