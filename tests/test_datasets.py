"""Examples of each method's data, held to the field's operations, and the order they come in."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import noise
from minisd.data.concepts import ClassPictures, CustomConcepts, read_classes, read_concepts, read_instances
from minisd.data.crop import View, bucket_shapes, center, cover, nearest_shape
from minisd.data.datasets import Captioned, Conditioned, EditPairs, Example, Prior
from minisd.data.order import Bucketed, Shuffled, Stream, batches
from minisd.data.source import Source, read
from minisd.training.distributed import Processes
from minisd.training.loop import cache_latents

SIZES = [(40, 31), (31, 40), (32, 32), (57, 20), (20, 57), (33, 32)]
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def noisy(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of six sizes under captions, each with a condition of its size."""
    path = tmp_path_factory.mktemp("captioned")
    lines = []
    for i, size in enumerate(SIZES):
        noisy(size, i).save(path / f"{i}.png")
        noisy(size, 100 + i).save(path / f"c{i}.png")
        row = {"file_name": f"{i}.png", "text": f"caption {i}"}
        lines.append(json.dumps(row | {"conditioning_image_file_name": f"c{i}.png"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def source(folder):
    return read(folder, flag="--data")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(dataset, index, seed=0):
    (example,) = dataset.examples(index, seeded(seed))
    return example


def normalized(image):
    """ToTensor and Normalize([0.5], [0.5])."""
    return (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5


def assert_pixels(got, image):
    expected = image if isinstance(image, np.ndarray) else normalized(image)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def field_resize(image, side, resampling):
    """torchvision's Resize(side) of a PIL image."""
    w, h = image.size
    short, long = sorted((w, h))
    other = int(side * long / short)
    return image.resize((side, other) if w <= h else (other, side), resampling)


def field_center_crop(image, side):
    """torchvision's CenterCrop(side)."""
    left, top = int(round((image.width - side) / 2.0)), int(round((image.height - side) / 2.0))
    return image.crop((left, top, left + side, top + side))


# Captioned


@pytest.mark.parametrize("interpolation", FILTERS)
def test_resize_and_centre_crop_equal_the_field_s(source, interpolation):
    for side in (8, 24, 64):  # smaller, and larger than the pictures
        data = Captioned(source, resolution=side, center_crop=True, interpolation=interpolation)
        for i, size in enumerate(SIZES):
            expected = field_center_crop(field_resize(noisy(size, i), side, FILTERS[interpolation]), side)
            example = only(data, i)
            assert example.prompt == f"caption {i}" and example.weight == 1
            assert_pixels(data.pixels(example.view), expected)


def test_a_random_crop_is_some_window_of_the_resized_picture(source):
    data = Captioned(source, resolution=16, random_flip=True)
    whole = field_resize(noisy(SIZES[3], 3), 16, FILTERS["bilinear"])
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
    assert {left for left, _ in seen} == set(range(45 - 16 + 1))  # every place, both ends too
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
    squares = Source("", "--data", source.records[2:3])
    assert len(Captioned(squares, resolution=16).views()) == 1
    assert Captioned(source, resolution=16).views() is None


def test_captions_are_left_out(source):
    for p in (0.0, 0.3, 1.0):
        data = Captioned(source, resolution=8, caption_dropout=p)
        empty = sum(only(data, 1, s).prompt == "" for s in range(400)) / 400
        assert abs(empty - p) < 0.07 and (p not in (0, 1) or empty == p)


def test_one_of_several_captions_is_drawn(source):
    record = replace(source.records[0], texts={"text": ["one", "two"]})
    data = Captioned(Source("", "--data", (record,)), resolution=8)
    assert Counter(only(data, 0, s).prompt for s in range(200)).keys() == {"one", "two"}


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

    buckets = None

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
    data = Conditioned(source, resolution=16, caption_dropout=0.5)
    assert len(data.views()) == 6
    for i, size in enumerate(SIZES):
        view = only(data, i).view
        assert not view.flipped
        pair = [
            field_center_crop(field_resize(noisy(size, s), 16, FILTERS["bilinear"]), 16) for s in (i, 100 + i)
        ]
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
    return read(path, flag="--data")


@pytest.mark.parametrize("center_crop", [False, True])
def test_edits_are_squashed_or_cut_and_flipped_together(edits, center_crop):
    data = EditPairs(edits, resolution=16, center_crop=center_crop, random_flip=True)
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
                image = field_center_crop(field_resize(image, 16, Image.Resampling.BICUBIC), 16)
            else:
                image = image.resize((16, 16))  # Pillow's own default, bicubic
            if example.view.flipped:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert_pixels(got, 2 * (np.asarray(image, dtype=np.float32) / 255) - 1)
    assert seen == {False, True} and len(data.views()) == 12


# Custom Diffusion


def field_augmentation(image, side, top, left, full):
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
            canvas, mask = field_augmentation(image, side, top, left, full)
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
    canvas, mask = field_augmentation(noisy(SIZES[1], 1), 64, 0, 0, 64)
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


def test_concepts_and_their_classes(tmp_path, folder):
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


@pytest.mark.parametrize(
    "content, words",
    [
        ("[{]", "line 1: bad JSON"),
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
    with pytest.raises(ValueError, match="there is no"):
        read_concepts(tmp_path / "x.json")


# Buckets


def test_bucket_shapes_at_512():
    """kohya's for 512 x 512 from 256 to 1024 in steps of 64, written out."""
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256),
            (1024, 256)]  # fmt: skip
    expected = set(wide) | {(h, w) for w, h in wide}
    assert set(bucket_shapes(512)) == expected
    for resolution, step in ((64, 8), (512, 64), (768, 64), (256, 64), (320, 64)):
        for w, h in bucket_shapes(resolution, step):
            assert w % step == 0 and h % step == 0 and w * h <= resolution**2
            assert resolution / 2 <= min(w, h) and max(w, h) <= 2 * resolution
    with pytest.raises(ValueError, match="^--bucket"):
        bucket_shapes(32)


def test_bucket_of_a_picture():
    known = bucket_shapes(512)
    assert nearest_shape((512, 512), known) == (512, 512)
    assert nearest_shape((300, 300), known) == (512, 512)
    assert nearest_shape((704, 320), known) == (704, 320)
    assert nearest_shape((64, 64), [(32, 32), (64, 64)]) == (64, 64)  # its own size, not only its shape
    for size in ((1000, 400), (333, 777), (4000, 3000)):
        best = min(abs(size[0] / size[1] - w / h) for w, h in known)
        w, h = nearest_shape(size, known)
        assert math.isclose(abs(size[0] / size[1] - w / h), best)


def test_bucketed_pictures_are_covered_and_centred(source):
    data = Captioned(source, resolution=32, bucket=True, step=8)
    assert len(set(data.buckets)) >= 3 and "buckets: " in data.summary()
    for i, size in enumerate(SIZES):
        view, (bw, bh) = only(data, i).view, data.buckets[i]
        scale = max(bw / size[0], bh / size[1])
        w, h = view.size
        assert abs(w - size[0] * scale) < 1 and abs(h - size[1] * scale) < 1 and (w == bw or h == bh)
        left, top = round((w - bw) / 2), round((h - bh) / 2)
        resized = noisy(size, i).resize((w, h), FILTERS["bilinear"])
        assert_pixels(data.pixels(view), resized.crop((left, top, left + bw, top + bh)))
    assert data.views() is not None


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_cycle_of_rounds_shows_every_place_as_often(size):
    owners = ["a"] * 7 + ["b"] * 2 + ["c"]
    order = Bucketed(owners, seed=5, size=size)
    n, orders_of_a = len(owners), []
    for cycle in (0, 1):
        start = cycle * n * size
        shown = [order[k] for k in range(start, start + n * size)]
        assert Counter(shown) == {i: size for i in range(n)}
        for r in range(n):
            assert len({owners[i] for i in shown[r * size : (r + 1) * size]}) == 1
        # Within a bucket nothing comes again before everything was there.
        of_a = [i for i in shown if owners[i] == "a"]
        turns = [tuple(of_a[t : t + 7]) for t in range(0, len(of_a), 7)]
        assert all(len(set(turn)) == 7 for turn in turns)
        orders_of_a += turns
    assert len(set(orders_of_a)) == 2 * size  # and each time in another order
    # In any order, and from the start or not.
    again = Bucketed(owners, seed=5, size=size)
    far = [k for k in (29, 3, 17, 0, 29)]
    assert [again[k] for k in far] == [order[k] for k in far]
    other = Bucketed(owners, seed=6, size=size)
    assert [other[k] for k in range(n * size)] != [order[k] for k in range(n * size)]


def test_one_bucket_in_rounds_of_one_is_a_shuffle():
    order, plain = Bucketed(["a"] * 9, seed=0, size=1), Shuffled(9, seed=0)
    for epoch in range(3):
        numbers = range(epoch * 9, epoch * 9 + 9)
        assert sorted(order[k] for k in numbers) == sorted(plain[k] for k in numbers) == list(range(9))


@dataclass
class Seen:
    """What a run was shown, so that two can be compared."""

    prompts: list
    shapes: list


def run(data, **kwargs):
    out = [b for b in batches(Stream(data, 3), **kwargs)]
    return Seen([b["prompt"] for b in out], [tuple(b["pixels"].shape) for b in out])


@pytest.fixture(scope="module")
def bucketed(source):
    return Captioned(source, resolution=32, bucket=True, step=8, random_flip=True)


def test_batches_hold_one_bucket(bucketed):
    seen = run(bucketed, first=0, count=12, batch_size=3)
    assert len(set(seen.shapes)) > 2  # collate would have failed on a mixture


@pytest.mark.parametrize("workers", [0, 2])
def test_buckets_go_on_where_they_stopped(bucketed, workers):
    whole = run(bucketed, first=0, count=8, batch_size=4, workers=workers)
    rest = run(bucketed, first=20, count=3, batch_size=4)
    assert whole.prompts[5:] == rest.prompts
    with pytest.raises(ValueError, match="^--bucket: .*--train_batch_size"):
        run(bucketed, first=20, count=1, batch_size=3)


def test_two_processes_share_a_round_of_one_bucket(bucketed):
    one = run(bucketed, first=0, count=6, batch_size=4)
    two = [run(bucketed, first=0, count=6, batch_size=2, rank=r, world=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*(t.prompts for t in two), strict=True)] == one.prompts
    for a, b in zip(*(t.shapes for t in two), strict=True):
        assert a == b


def test_each_process_encodes_its_share(bucketed):
    whole, shares = Stream(bucketed, 0), []
    for rank in range(2):
        stream = Stream(bucketed, 0)
        process = SimpleNamespace(rank=rank, world=2, first=False, gather=lambda own: [own])
        cache_latents(stream, lambda pixels: (pixels.mean((2, 3)), pixels.std((2, 3))), 4, process)
        shares.append(set(stream.moments))
    assert all(shares) and not shares[0] & shares[1] and shares[0] | shares[1] == set(bucketed.views())
    both = SimpleNamespace(rank=0, world=2, first=False, gather=lambda own: [own, {"theirs": own}])
    cache_latents(whole, lambda pixels: (pixels.mean((2, 3)), pixels.std((2, 3))), 4, both)
    assert set(whole.moments) == shares[0] | {"theirs"}


def test_views_of_one_shape_are_encoded_together(bucketed):
    stream = Stream(bucketed, 0)
    parts = stream.views(4)
    owners = Counter(bucketed.buckets).values()  # each picture has two views
    assert len(parts) == sum(math.ceil(2 * n / 4) for n in owners)
    assert sum(map(len, parts)) == 12 and max(map(len, parts)) <= 4
    cache_latents(stream, lambda pixels: (pixels.mean((2, 3)), pixels.std((2, 3))), 4, Processes())
    assert set(stream.moments) == set(bucketed.views())
    for k in range(20):
        (sample,) = stream[k]
        assert "pixels" not in sample
        (example,) = bucketed.examples(stream.order[k], noise.generator(0, "augment", k))
        pixels = bucketed.pixels(example.view)
        torch.testing.assert_close(sample["mean"], pixels.mean((1, 2)))
