"""Custom Diffusion's pictures: concepts at random scales, their masks, and their classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.data.concepts import ClassPictures, CustomConcepts, read_classes, read_concepts, read_instances
from minisd.data.datasets import Prior
from minisd.data.order import Stream, batches
from minisd.data.source import read
from tests.data_helpers import SIZES, assert_pixels, make_noise, noisy, only


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read(make_noise(tmp_path_factory.mktemp("noise")), flag="--data")


def reference_augmentation(image, side, top, left, full):
    """Custom Diffusion's picture (h, w, 3) and mask (h, w), pixel by pixel as its description has it."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
    small = full // 8
    canvas, mask = np.zeros((full, full, 3), dtype=np.float32), np.zeros((small, small), dtype=np.float32)
    for y in range(full):
        for x in range(full):
            if side > full:
                canvas[y, x] = pixels[top + y, left + x]
            elif top <= y < top + side and left <= x < left + side:
                canvas[y, x] = pixels[y - top, x - left]
    for y in range(small):
        for x in range(small):
            inside = top // 8 + 1 <= y < (top + side) // 8 - 1 and left // 8 + 1 <= x < (left + side) // 8 - 1
            mask[y, x] = side > full or inside
    return canvas, mask


def test_custom_concepts_equal_the_description(source):
    full = 96
    data = CustomConcepts(source, resolution=full, hflip=True)
    assert data.views() is None and len(data) == 6
    sides, flips, smaller = [], 0, 0
    for seed in range(600):
        example = only(data, seed % 6, seed)
        view, prompt = example.view, example.prompt
        side, number = view.size[0], view.record
        assert view.size == (side, side)
        sides.append(side)
        flips += view.flipped
        prefix = prompt.removesuffix(f"caption {number}")
        if side < 0.6 * full:
            assert prefix in ("a far away ", "very small ")
        elif side > full:
            assert prefix in ("zoomed in ", "close up ")
        else:
            assert prefix == ""
        left, top = view.box[:2]
        if side <= full:
            smaller += 1
            left, top = -left, -top
        assert 0 <= left <= abs(full - side) and 0 <= top <= abs(full - side)
        if seed < 24:
            image = noisy(SIZES[number], number)
            if view.flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            canvas, mask = reference_augmentation(image, side, top, left, full)
            assert_pixels(data.pixels(view), canvas)
            assert np.array_equal(data.extras(view)["mask"][0].numpy(), mask)
    assert min(sides) == full // 3 and max(sides) == int(1.4 * full) - 1
    assert not {s for s in sides if full < s < int(1.2 * full)}
    assert abs(smaller / 600 - 0.66) < 0.06 and abs(flips / 600 - 0.5) < 0.06


def test_custom_concepts_without_augmentation(source):
    data = CustomConcepts(source, resolution=64, augment=False)
    assert len(data.views()) == 6 and {only(data, i, s).view for i in range(6) for s in range(5)} == set(
        data.views()
    )
    example = only(data, 1)
    assert example.prompt == "caption 1"
    canvas, mask = reference_augmentation(noisy(SIZES[1], 1), 64, 0, 0, 64)
    assert_pixels(data.pixels(example.view), canvas)
    assert np.array_equal(data.extras(example.view)["mask"][0].numpy(), mask) and mask.sum() == 36


@pytest.mark.parametrize("full, factor", [(16, 8), (32, 8), (64, 8), (32, 4)])
def test_no_mask_is_empty(source, full, factor):
    """At the sizes of tiny models too, where one pixel less on each side can leave none: a mean over it is
    divided by it."""
    data = CustomConcepts(source, resolution=full, factor=factor)
    for seed in range(300):
        mask = data.extras(only(data, 0, seed).view)["mask"]
        assert mask.shape == (1, full // factor, full // factor) and mask.sum() > 0


def test_class_pictures_count_whole(source):
    data = ClassPictures(source, resolution=32, prompt="cat", caption_column=None)
    example = only(data, 0)
    assert example.prompt == "cat" and torch.equal(data.extras(example.view)["mask"], torch.ones(1, 4, 4))


def test_concepts_and_their_classes(tmp_path):
    dirs = {}
    for name in ("cat", "dog", "cats", "dogs"):
        dirs[name] = tmp_path / name
        (dirs[name] / "images").mkdir(parents=True)
        target = dirs[name] / "images" if name == "dogs" else dirs[name]
        for i in range(2):
            noisy((16, 16), i).save(target / f"{i}.png")
    (dirs["dogs"] / "images.txt").write_text("./elsewhere/dogs/images/0.png\n./elsewhere/dogs/images/1.png\n")
    (dirs["dogs"] / "caption.txt").write_text("a dog runs\na dog sleeps\n")
    entries = [
        {
            "instance_prompt": f"a <new{i}> {n}",
            "class_prompt": n,
            "instance_data_dir": str(dirs[n]),
            "class_data_dir": str(dirs[f"{n}s"]),
        }
        for i, n in enumerate(("cat", "dog"))
    ]
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    concepts = read_concepts(path)
    instances = read_instances(concepts, flag="--concepts_list")
    assert [r.texts["text"] for r in instances.records] == ["a <new0> cat"] * 2 + ["a <new1> dog"] * 2
    classes = read_classes(concepts, flag="--concepts_list")
    assert [r.texts["text"] for r in classes.records] == ["cat", "cat", "a dog runs", "a dog sleeps"]
    data = Prior(CustomConcepts(instances, resolution=32), ClassPictures(classes, resolution=32), 1.0)
    batch = next(batches(Stream(data, 0), first=0, count=1, batch_size=4))
    assert batch["pixels"].shape == (8, 3, 32, 32) and batch["mask"].shape == (8, 1, 4, 4)
    assert batch["mask"][4:].all()
    (dirs["dogs"] / "caption.txt").write_text("a dog runs\n")
    with pytest.raises(ValueError, match="^--concepts_list: .*images.txt has 2 lines.*caption.txt has 1"):
        read_classes(concepts, flag="--concepts_list")
    (dirs["dogs"] / "caption.txt").write_text("a dog runs\nx\n")
    (dirs["dogs"] / "images" / "1.png").unlink()
    with pytest.raises(ValueError, match="images.txt, line 2: there is no"):
        read_classes(concepts, flag="--concepts_list")
    (dirs["dogs"] / "images.txt").write_text(f"./dogs/images/0.png\n{dirs['cat'] / '1.png'}\n")
    with pytest.raises(ValueError, match="images.txt, line 2: .*1.png is outside .*--allow_outside"):
        read_classes(concepts, flag="--concepts_list")
    assert len(read_classes(concepts, flag="--concepts_list", allow_outside=True)) == 4


@pytest.mark.parametrize(
    "content, words",
    [
        ("[{]", "bad JSON"),
        ("{}", "not a list"),
        ("[]", "not a list"),
        ('[{"instance_prompt": "x"}]', "concept 1 has no instance_data_dir"),
        ('[{"instance_prompt": "x", "instance_data_dir": "y", "z": 1}]', "unknown z"),
        ('[{"instance_prompt": "x", "instance_data_dir": 3}]', "is a text"),
    ],
)
def test_broken_concepts(tmp_path, content, words):
    path = tmp_path / "concepts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^--concepts_list: .*concepts.json.*{words}"):
        read_concepts(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_concepts(tmp_path / "x.json")
