"""Examples of each method's data, held to torchvision's operations."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.data.crop import View, center, cover
from minisd.data.datasets import Captioned, Conditioned, Example, Prior
from minisd.data.order import Stream, batches
from minisd.data.records import Records
from minisd.data.source import Source, read
from tests.data_helpers import (
    FILTERS,
    SIZES,
    assert_pixels,
    edit_pairs,
    make_noise,
    noisy,
    only,
    seeded,
    torchvision_resize,
    torchvision_square,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_noise(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def source(folder):
    return read(folder, flag="--data")


# Captioned


@pytest.mark.parametrize("interpolation", FILTERS)
def test_resize_and_centre_crop_equal_torchvision_s(source, interpolation):
    for side in (8, 24, 64):  # smaller, and larger than the pictures
        data = Captioned(source, resolution=side, center_crop=True, interpolation=interpolation)
        for i, size in enumerate(SIZES):
            expected = torchvision_square(noisy(size, i), side, FILTERS[interpolation])
            example = only(data, i)
            assert example.prompt == f"caption {i}" and example.weight == 1
            assert_pixels(data.pixels(example.view), expected)


def test_a_random_crop_is_some_window_of_the_resized_picture(source):
    data = Captioned(source, resolution=16, random_flip=True)
    whole = torchvision_resize(noisy(SIZES[3], 3), 16, FILTERS["bilinear"])
    assert whole.size == (45, 16) and data.views() is None
    seen = set()
    for seed in range(300):
        view = only(data, 3, seed).view
        left, top, right, bottom = view.box
        assert top == 0 and bottom == 16 and right == left + 16
        cut = whole.crop((left, 0, left + 16, 16))
        if seed < 8:
            flipped = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert_pixels(data.pixels(view), flipped if view.flipped else cut)
        seen.add((left, view.flipped))
    assert {left for left, _ in seen} == set(range(45 - 16 + 1))  # every position, both ends too
    assert {flipped for _, flipped in seen} == {False, True}


def test_random_crops_go_over_the_height_too(source):
    data = Captioned(source, resolution=16)
    assert {only(data, 4, s).view.box[1] for s in range(300)} == set(range(45 - 16 + 1))


def test_everything_random_comes_from_the_generator(source):
    data = Captioned(source, resolution=16, random_flip=True, caption_dropout=0.5)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = [only(data, i, s) for i in range(6) for s in range(5)]
    again = [only(data, i, s) for i in range(6) for s in range(5)]
    assert first == again and len(set(first)) > 20
    assert torch.equal(before, torch.random.get_rng_state())
    for example in first[:6]:
        assert hash(example.view) is not None
        assert torch.equal(data.pixels(example.view), data.pixels(example.view))


def test_views_are_all_there_can_be(source):
    data = Captioned(source, resolution=16, center_crop=True, random_flip=True)
    views = data.views()
    drawn = {only(data, i, s).view for i in range(6) for s in range(20)}
    assert set(views) == drawn and len(views) == len(set(views)) == 12
    # Where nothing is left over there is nothing to draw.
    squares = Source("", source.records.take([2]))
    assert len(Captioned(squares, resolution=16).views()) == 1
    assert Captioned(source, resolution=16).views() is None


def test_captions_are_left_out(source):
    for p in (0.0, 0.3, 1.0):
        data = Captioned(source, resolution=8, caption_dropout=p)
        empty = sum(only(data, 1, s).prompt == "" for s in range(400)) / 400
        assert abs(empty - p) < 0.07 and (p not in (0, 1) or empty == p)


def test_one_of_several_captions_is_drawn(source):
    record = replace(source.records[0], texts={"text": ["one", "two"]})
    data = Captioned(Source("", Records([record])), resolution=8)
    assert Counter(only(data, 0, s).prompt for s in range(200)).keys() == {"one", "two"}


def test_captions_are_shuffled(source):
    """By the sample's generator alone, and not the first parts; crops and flips may be others."""
    tags = source.with_prompt("x").records.with_texts(text=["a cat,  red, blue,green"] * len(source))
    tagged = replace(source, records=tags)
    data = Captioned(tagged, resolution=8, shuffle_after=1)
    drawn = [only(data, 0, seed).prompt for seed in range(40)]
    assert all(prompt.startswith("a cat, ") for prompt in drawn) and len({*drawn}) == 6
    assert {", ".join(sorted(prompt.split(", "))) for prompt in drawn} == {"a cat, blue, green, red"}
    assert drawn == [only(data, 0, seed).prompt for seed in range(40)]
    assert only(Captioned(tagged, resolution=8), 0).prompt == "a cat,  red, blue,green"
    for first in (3, 7):
        with pytest.raises(
            ValueError, match=f"--shuffle_caption: no caption has two parts, .* after {first}"
        ):
            Captioned(tagged, resolution=8, shuffle_after=first)


def test_pictures_without_text(source):
    data = Captioned(source, resolution=8, caption_column=None)
    assert {only(data, i).prompt for i in range(6)} == {""}


def test_instances_have_one_prompt_or_their_own(source, cat):
    plain = read(cat, flag="--data")
    data = Captioned(plain, prompt="a photo of sks cat", resolution=16)
    assert {only(data, i).prompt for i in range(5)} == {"a photo of sks cat"}
    assert only(Captioned(source, prompt="p", resolution=16), 2).prompt == "caption 2"
    with pytest.raises(ValueError, match="--caption_column"):
        Captioned(plain, resolution=16)


def test_cover_and_center():
    assert cover((40, 31), (16, 16)) == (20, 16) and cover((31, 40), (16, 16)) == (16, 20)
    assert cover((100, 100), (64, 128)) == (128, 128) and cover((200, 100), (64, 32)) == (64, 32)
    for size in SIZES:
        for target in ((16, 16), (24, 8), (8, 24)):
            w, h = cover(size, target)
            assert (w == target[0] and h >= target[1]) or (h == target[1] and w >= target[0])
    assert center((19, 16), (16, 16)) == (2, 0, 18, 16)  # 1.5 to the even


# Prior


class Fixed:
    """Places 0 to n - 1, one view each."""

    buckets = masks = None

    def __init__(self, n, name):
        self.n, self.name = n, name

    def __len__(self):
        return self.n

    def examples(self, index, generator):
        return [Example(view=View(index), prompt=f"{self.name} {index}")]

    def views(self):
        return [View(i) for i in range(self.n)]

    def pixels(self, view):
        return torch.full((3, 2, 2), float(view.record))

    def extras(self, view):
        return {}


def test_prior_weights_make_the_two_means():
    w, b = 0.7, 4
    data = Prior(Fixed(3, "dog"), Fixed(5, "class"), w)
    assert len(data) == 5
    batch = next(batches(Stream(data, 0), first=0, count=1, batch_size=b))
    kinds = [p.split()[0] for p in batch["prompt"]]
    assert kinds == ["dog"] * b + ["class"] * b  # first all instances, as the field has them
    errors = torch.rand(2 * b, generator=seeded())
    loss = (errors * batch["weight"]).mean()
    torch.testing.assert_close(loss, errors[:b].mean() + w * errors[b:].mean())
    shown = Counter(e.prompt for i in range(5) for e in data.examples(i, seeded()))
    assert all(shown[f"class {i}"] == 1 for i in range(5)) and shown["dog 0"] == 2 and shown["dog 2"] == 1


def test_prior_keeps_the_views_of_both_apart():
    data = Prior(Fixed(2, "a"), Fixed(3, "b"), 1.0)
    views = data.views()
    assert len(set(views)) == 5 and View(1, part=0) in views and View(1, part=1) in views
    assert Prior(Fixed(2, "a"), NoViews(3, "b"), 1.0).views() is None


class NoViews(Fixed):
    def views(self):
        return None


# Pairs


def test_conditions_are_cut_like_their_pictures(source):
    data = Conditioned(
        source, resolution=16, center_crop=True, pair_column="conditioning_image", caption_dropout=0.5
    )
    assert len(data.views()) == 6
    for i, size in enumerate(SIZES):
        view = only(data, i).view
        assert not view.flipped
        pair = [torchvision_square(noisy(size, s), 16, FILTERS["bilinear"]) for s in (i, 100 + i)]
        assert_pixels(data.pixels(view), pair[0])
        assert_pixels(data.extras(view)["conditioning"], np.asarray(pair[1], dtype=np.float32) / 255)
    assert {only(data, 0, s).prompt for s in range(20)} == {"", "caption 0"}


@pytest.fixture(scope="module")
def edits(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("edits")
    lines = ["input_image_file_name,edited_image_file_name,edit_prompt"]
    for i in range(len(SIZES)):
        lines.append(f"{folder}/c{i}.png,{folder}/{i}.png,edit {i}")
    (path / "metadata.csv").write_text("\n".join(lines))
    return read(path, flag="--data", allow_outside=True)


@pytest.mark.parametrize("center_crop", [False, True])
def test_edits_are_squashed_or_cut_and_flipped_together(edits, center_crop):
    data = edit_pairs(edits, resolution=16, squash=not center_crop, center_crop=True, random_flip=True)
    seen = set()
    for i, size in enumerate(SIZES):
        example = only(data, i, i)
        assert example.prompt == f"edit {i}"
        seen.add(example.view.flipped)
        for seed, got in (
            (i, data.pixels(example.view)),
            (100 + i, data.extras(example.view)["original"]),
        ):
            image = noisy(size, seed)
            if center_crop:
                image = torchvision_square(image, 16, Image.Resampling.BICUBIC)
            else:
                image = image.resize((16, 16))  # Pillow's own default, bicubic
            if example.view.flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert_pixels(got, 2 * (np.asarray(image, dtype=np.float32) / 255) - 1)
    assert seen == {False, True} and len(data.views()) == 12
