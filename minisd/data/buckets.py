"""Aspect-ratio buckets: pictures keep their shape, and a batch holds pictures of one shape."""

Size = tuple[int, int]  # width, height


def sizes(resolution: int, step: int = 64) -> list[Size]:
    """The shapes of about resolution^2 pixels, sides multiples of `step` and between half and twice
    `resolution`: at 512, kohya's from 256 to 1024. ValueError if the resolution is below the step."""
    if resolution < step:
        raise ValueError(f"--bucket needs a --resolution of at least {step}")
    area, low, high = resolution**2, -(-resolution // 2 // step) * step, 2 * resolution
    square = resolution // step * step
    found = {(square, square)}
    for width in range(max(low, step), high + 1, step):
        height = min(high // step * step, area // width // step * step)
        if height >= low and height > 0:
            found |= {(width, height), (height, width)}
    return sorted(found)


def assign(size: Size, buckets: list[Size]) -> Size:
    """The bucket of a picture: its own size if that is one, else that of the nearest aspect ratio."""
    if size in buckets:
        return size
    return min(buckets, key=lambda b: abs(size[0] / size[1] - b[0] / b[1]))
