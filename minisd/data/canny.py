"""The edges of an image (Canny 1986), as in the training data of the published ControlNets for edges."""

import numpy as np
from PIL import Image

TANGENT = np.tan(np.pi / 8)  # of 22.5 degrees, where diagonal directions begin


def canny(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """White lines, one pixel thin, on black: where the gradient is above `high`, and connected pixels where
    it is above `low`. The image is not blurred first, and the gradient's size is |dx| + |dy|, as in the
    program that made the data of those ControlNets."""
    dx, dy = gradient(np.asarray(image.convert("RGB")))  # (h, w)
    size = abs(dx) + abs(dy)

    # A line is where the gradient is larger than at the two neighbours in its direction.
    height, width = size.shape
    around = np.pad(size, 1)

    def shifted(y: int, x: int) -> np.ndarray:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    flat, steep = abs(dy) < TANGENT * abs(dx), abs(dx) < TANGENT * abs(dy)
    falling = (dx < 0) == (dy < 0)  # with y downwards
    before, after = (
        np.select([flat, steep, falling], [shifted(0, s), shifted(s, 0), shifted(s, s)], shifted(s, -s))
        for s in (-1, 1)
    )
    thin = (size > before) & ((size > after) | ((size == after) & (flat | steep))) & (size > low)
    lines = follow(thin & (size > high), thin)
    return Image.fromarray(255 * lines.astype(np.uint8)).convert("RGB")


def gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's dx and dy, each (h, w), of pixels (h, w, 3), in the channel where |dx| + |dy| is largest."""
    p = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]  # (h, w, 3)
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    most = (abs(dx) + abs(dy)).argmax(axis=2)[..., None]  # (h, w, 1)
    return np.take_along_axis(dx, most, axis=2)[..., 0], np.take_along_axis(dy, most, axis=2)[..., 0]


def follow(seeds: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """The parts of `paths` (h, w) that are connected to `seeds`, diagonally too."""
    paths, reached = np.pad(paths, 1), np.pad(seeds, 1)
    width = paths.shape[1]
    around = [y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    front = np.flatnonzero(reached)
    while len(front):
        near = np.unique(np.add.outer(around, front))
        front = near[paths.flat[near] & ~reached.flat[near]]
        reached.flat[front] = True
    return reached[1:-1, 1:-1]
