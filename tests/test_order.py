"""The order that samples come in, with and without buckets, and how it is cut into batches."""

import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from minisd import noise
from minisd.data.crop import bucket_shapes, nearest_shape
from minisd.data.datasets import Captioned, ConceptPictures
from minisd.data.order import Bucketed, Shuffled, Stream, batches
from minisd.data.source import read
from minisd.training.distributed import Processes
from minisd.training.latents import cache_latents
from tests.data_helpers import FILTERS, SIZES, assert_pixels, make_noise, noisy, only


def concept(folder):
    source = read(folder, flag="--data", subfolders="none")
    return ConceptPictures(
        source, "<cat>", style=False, resolution=16, center_crop=False, flip_p=0.5, repeats=3
    )


def numbers(stream, **kwargs):
    return [b["number"] for b in batches(stream, **kwargs)]


def test_stream_is_a_function_of_the_seed_and_the_number(cat):
    stream, again, other = (Stream(concept(cat), seed) for seed in (1, 1, 2))
    assert len(stream.dataset) == 15
    first = [stream[k][0] for k in range(40)]
    for k in (33, 2, 17):  # in any order
        assert torch.equal(again[k][0]["pixels"], first[k]["pixels"])
        assert again[k][0]["prompt"] == first[k]["prompt"]
    assert [other[k][0]["prompt"] for k in range(40)] != [s["prompt"] for s in first]
    # Every epoch shows each picture as often as the others, in an order of its own.
    orders = [
        [stream.dataset.examples(i, torch.Generator())[0].view.record for i in stream_order(stream, e)]
        for e in (0, 1)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def stream_order(stream, epoch):
    return stream.order.epoch(epoch).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_they_stopped(cat, workers):
    stream = Stream(concept(cat), 0)
    whole = list(batches(stream, first=0, count=6, batch_size=4, workers=workers))
    rest = list(batches(stream, first=12, count=3, batch_size=4))
    for a, b in zip(whole[3:], rest, strict=True):
        assert a["prompt"] == b["prompt"] and torch.equal(a["pixels"], b["pixels"])


def test_two_processes_share_a_batch(cat):
    stream = Stream(concept(cat), 0)
    one = numbers(stream, first=0, count=3, batch_size=4)
    two = [numbers(stream, first=0, count=3, batch_size=2, rank=r, world=2) for r in (0, 1)]
    assert [interleaved(*pair) for pair in zip(*two, strict=True)] == one


def interleaved(a, b):
    return [number for pair in zip(a, b, strict=True) for number in pair]


# Buckets


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read(make_noise(tmp_path_factory.mktemp("noise")), flag="--data")


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


def test_memory_does_not_grow_with_a_round():
    order = Bucketed([0, 1, 1, 0, 1], seed=5, size=10**9)  # a list of the epoch's indices would take 20 GB
    assert [order[k] for k in range(4 * 10**9, 4 * 10**9 + 9)] == [0, 3, 3, 0, 0, 3, 3, 0, 0]


def test_one_bucket_in_rounds_of_one_is_a_shuffle():
    order, plain = Bucketed(["a"] * 9, seed=0, size=1), Shuffled(9, 0, "order")
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
    assert [interleaved(*pair) for pair in zip(*(t.prompts for t in two), strict=True)] == one.prompts
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
