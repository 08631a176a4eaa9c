"""The geometry of resizing, cropping and aspect-ratio buckets."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class View:
    """How a record's image is resized to `size`, cropped to `box` and flipped: all that a cached latent
    depends on. `part` is the number of the dataset in a Prior."""

    record: int
    flipped: bool = False
    size: Size | None = None
    box: Box | None = None
    part: int = 0

    @property
    def shape(self) -> Size | None:
        """Width and height of the crop."""
        return self.box and (self.box[2] - self.box[0], self.box[3] - self.box[1])


def cover(size: Size, target: Size) -> Size:
    """The smallest size with the aspect ratio of `size` that covers `target`. The longer side is rounded
    down, as in torchvision."""
    (w, h), (tw, th) = size, target
    if tw * h >= th * w:  # the width decides
        return tw, max(th, tw * h // w)
    return max(tw, th * w // h), th


def center(size: Size, target: Size) -> Box:
    """The centred box of size `target` in `size`; halves are rounded to even, as in torchvision."""
    left, top = (round((s - t) / 2) for s, t in zip(size, target, strict=True))
    return left, top, left + target[0], top + target[1]


@functools.lru_cache(1 << 16)
def fitted(size: Size, shapes: tuple[Size, ...], squash: bool) -> tuple[Size, Size]:
    """The size that an image is resized to, and that of its crop: the nearest of `shapes`."""
    shape = nearest_shape(size, shapes)
    return shape if squash else cover(size, shape), shape


def bucket_shapes(resolution: int, step: int = 64) -> list[Size]:
    """The shapes of at most resolution^2 pixels with sides that are multiples of `step`, from half to twice
    the resolution: at 512, kohya's from 256 to 1024. ValueError if the resolution is below the step."""
    if resolution < step:
        raise ValueError(f"--bucket needs a --resolution of at least {step}")
    area, low, high = resolution**2, -(-resolution // 2 // step) * step, 2 * resolution
    square = resolution // step * step
    shapes = {(square, square)}
    for width in range(max(low, step), high + 1, step):
        height = min(high // step * step, area // width // step * step)
        if height >= low and height > 0:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes)


def nearest_shape(size: Size, shapes: Sequence[Size]) -> Size:
    """The bucket of an image: that of its own size, or else that with the nearest aspect ratio."""
    return size if size in shapes else min(shapes, key=lambda s: abs(size[0] / size[1] - s[0] / s[1]))
