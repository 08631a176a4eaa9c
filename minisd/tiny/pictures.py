"""Transformations of 64x64 images with transparency: pose, hue, background."""

import numpy as np
from PIL import Image

SIDE = 64
WHITE = (255, 255, 255)
GROUNDS = {
    "red": (224, 60, 60),
    "orange": (250, 160, 60),
    "yellow": (250, 225, 90),
    "green": (80, 180, 90),
    "blue": (70, 130, 230),
    "purple": (160, 95, 210),
    "pink": (250, 165, 200),
    "gray": (140, 140, 140),
}
HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 50,
    "green": 110,
    "blue": 215,
    "purple": 272,
    "pink": 325,
}  # degrees


def resized(image: Image.Image) -> Image.Image:
    """Return the image at 64x64, RGBA; weighting by opacity keeps hidden colours from bleeding in."""
    image = image.convert("RGBA")
    if image.size == (SIDE, SIDE):
        return image
    return image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")


def posed(
    image: Image.Image, *, angle: float = 0, scale: float = 1, mirror: bool = False, shift=(0, 0)
) -> Image.Image:
    """Return the image mirrored, scaled about the centre, rotated counter-clockwise (degrees), and shifted
    (pixels), in this order."""
    image = image.convert("RGBa")
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if scale != 1:
        side = round(SIDE * scale)
        small, left = image.resize((side, side), Image.Resampling.LANCZOS), (SIDE - side) // 2
        image = Image.new("RGBa", (SIDE, SIDE))
        image.paste(small, (left, left))
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
    if shift != (0, 0):
        moved = Image.new("RGBa", (SIDE, SIDE))
        moved.paste(image, shift)
        image = moved
    return image.convert("RGBA")


def _hsv(image: Image.Image) -> np.ndarray:
    """Return hue, saturation and value, each from 0 to 1, (64, 64, 3)."""
    return np.asarray(image.convert("RGB").convert("HSV"), dtype=np.float64) / 255


def main_hue(image: Image.Image) -> tuple[float, float]:
    """Return a thing's mean hue in degrees, weighted by saturation, and its mean saturation."""
    h, s, v = np.moveaxis(_hsv(image), -1, 0)
    weight = np.asarray(image)[..., 3] / 255 * v
    direction = (weight * s * np.exp(2j * np.pi * h)).sum()
    return float(np.degrees(np.angle(direction)) % 360), float((weight * s).sum() / max(weight.sum(), 1e-6))


def recoloured(image: Image.Image, hue: float) -> Image.Image:
    """Return the image with its main hue rotated to `hue` (degrees); a colourless thing is tinted."""
    own, saturation = main_hue(image)
    hsv = _hsv(image)
    if saturation < 0.3:
        hsv[..., 0] = hue / 360
        hsv[..., 1] = np.maximum(hsv[..., 1], 0.55)
    else:
        hsv[..., 0] = (hsv[..., 0] + (hue - own) / 360) % 1
    hsv[..., 2] **= 0.8  # brighter, because a brown rotated to another hue is dark
    colour = Image.fromarray((hsv * 255).round().astype(np.uint8), "HSV").convert("RGB")
    colour.putalpha(image.getchannel("A"))
    return colour


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """Return the image with every hue turned by so many degrees."""
    h, s, v = image.convert("RGB").convert("HSV").split()
    h = h.point([round(i + degrees / 360 * 256) % 256 for i in range(256)])
    colour = Image.merge("HSV", (h, s, v)).convert("RGB")
    colour.putalpha(image.getchannel("A"))
    return colour


def hues_of(image: Image.Image) -> list[str]:
    """Return the names of the hues that are clearly not the thing's own."""
    own, saturation = main_hue(image)
    far = [n for n, hue in HUES.items() if min(abs(hue - own), 360 - abs(hue - own)) >= 40]
    return list(HUES) if saturation < 0.3 else far


def on(image: Image.Image, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """Return the image on a background, RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def silhouette(image: Image.Image) -> Image.Image:
    """Return an RGB image, white where the thing is and black elsewhere."""
    return image.getchannel("A").point(lambda a: 255 * (a > 127)).convert("RGB")
