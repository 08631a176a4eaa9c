"""Edges: the four steps of Canny's, as published ControlNets were shown them."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minisd.data.canny import canny, gradient
from tests.picture_helpers import photo


def plain_canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """The four steps, one pixel after another."""
    height, width, _ = pixels.shape
    value = lambda y, x: pixels[min(max(y, 0), height - 1), min(max(x, 0), width - 1)].astype(int)  # noqa: E731
    kernel = {-1: 1, 0: 2, 1: 1}
    slopes, size = {}, {}
    for y in range(height):
        for x in range(width):
            dx = sum(k * (value(y + i, x + 1) - value(y + i, x - 1)) for i, k in kernel.items())
            dy = sum(k * (value(y + 1, x + i) - value(y - 1, x + i)) for i, k in kernel.items())
            most = int((abs(dx) + abs(dy)).argmax())
            slopes[y, x], size[y, x] = (dx[most], dy[most]), abs(dx[most]) + abs(dy[most])
    lines = set()
    for (y, x), (dx, dy) in slopes.items():
        angle = np.degrees(np.arctan2(dy, dx)) % 180
        if angle < 22.5 or angle > 157.5:
            step, ties = (0, 1), True
        elif 67.5 < angle < 112.5:
            step, ties = (1, 0), True
        else:
            step, ties = (1, 1) if angle < 90 else (1, -1), False
        before, after = (size.get((y + s * step[0], x + s * step[1]), 0) for s in (-1, 1))
        own = size[y, x]
        if own > low and own > before and (own >= after if ties else own > after):
            lines.add((y, x))
    found, front = set(), [p for p in lines if size[p] > high]
    while front:
        y, x = front.pop()
        if (y, x) in lines and (y, x) not in found:
            found.add((y, x))
            front += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    edges = np.zeros((height, width), dtype=np.uint8)
    for p in found:
        edges[p] = 255
    return edges


@pytest.mark.parametrize("size, low, high", [((40, 32), 100, 200), ((33, 21), 20, 300), ((9, 1), 50, 60)])
def test_canny_is_its_four_steps(size, low, high):
    noise = np.random.default_rng(0).integers(-40, 40, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(photo(1, size)) + noise, 0, 255).astype(np.uint8)
    found = np.asarray(canny(Image.fromarray(pixels), low, high))
    assert found.shape == pixels.shape and (found == found[..., :1]).all()
    expected = plain_canny(pixels, low, high)
    assert 0 < (expected > 0).mean() < 0.5 and np.array_equal(found[..., 0], expected)


def test_canny_as_published_programs_draw_it():
    """All the edges that OpenCV 5.0.0's Canny(image, 100, 200) finds here, by number and place."""
    y, x = np.mgrid[:48, :64]
    wave = 128 + 100 * np.sin(x * y / 90) + 20 * np.cos(x / 3)
    pixels = np.stack([wave, 255 - wave / 2, (x * 3 + y * 7) % 200], axis=2).clip(0, 255).astype(np.uint8)
    found = np.asarray(canny(Image.fromarray(pixels)))[..., 0] > 0
    places = np.flatnonzero(found)
    assert (len(places), int(places.sum())) == (615, 1034137)


def test_edges_are_thin_and_in_place():
    image = Image.new("RGB", (32, 32), "black")
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill="white")
    found = np.asarray(canny(image))[..., 0] > 0
    assert (found.sum(axis=0)[10:22] == 2).all() and (found.sum(axis=1)[10:22] == 2).all()
    assert not found[:6].any() and not found[12:20, 12:20].any()
    assert not np.asarray(canny(Image.new("RGB", (32, 32), "red"))).any()
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (8, 1)))
    assert not np.asarray(canny(ramp)).any() and gradient(np.asarray(ramp.convert("RGB")))[0].max() == 8
