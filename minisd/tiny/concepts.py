"""Things that the tiny model never saw, for the judge: some drawn here, some that training held out."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from minisd.tiny import bank
from minisd.tiny.pictures import SIDE, recoloured

SCALE = 4  # things are drawn larger and reduced, for smooth edges
VIOLET = 300  # degrees, between the named hues purple and pink


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGBA", (SIDE * SCALE, SIDE * SCALE))
    return image, ImageDraw.Draw(image)


def _shaded(image: Image.Image) -> Image.Image:
    """Return the drawing at 64x64, darker towards the bottom, as the 3d style is."""
    light = Image.linear_gradient("L").resize(image.size).point(lambda v: 255 - v // 4)
    shaded = ImageChops.multiply(image.convert("RGB"), Image.merge("RGB", [light] * 3))
    shaded.putalpha(image.getchannel("A"))
    return shaded.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA")


def mug() -> Image.Image:
    """A mug with red and white stripes and a handle on its right."""
    image, draw = _canvas()
    draw.ellipse((144, 80, 244, 188), outline=(200, 40, 50), width=22)
    draw.rounded_rectangle((36, 44, 180, 228), 26, fill=(250, 250, 250))
    for left in range(36, 180, 48):
        draw.rectangle((left, 64, left + 24, 206), fill=(215, 45, 55))
    draw.ellipse((36, 30, 180, 70), fill=(250, 250, 250), outline=(200, 200, 205), width=6)
    draw.ellipse((50, 38, 166, 64), fill=(95, 60, 45))
    return _shaded(image)


def robot() -> Image.Image:
    """A green face with square eyes, a grille for a mouth, ears and an antenna."""
    image, draw = _canvas()
    draw.line((128, 20, 128, 70), fill=(60, 110, 70), width=12)
    draw.ellipse((110, 6, 146, 42), fill=(240, 210, 60))
    for left in (12, 212):
        draw.rounded_rectangle((left, 110, left + 32, 180), 10, fill=(50, 120, 70))
    draw.rounded_rectangle((34, 60, 222, 236), 30, fill=(90, 200, 105))
    for left in (66, 144):
        draw.rectangle((left, 98, left + 46, 144), fill=(245, 250, 245))
        draw.rectangle((left + 14, 112, left + 34, 134), fill=(25, 40, 30))
    draw.rectangle((70, 172, 186, 208), fill=(40, 80, 50))
    for left in range(84, 180, 24):
        draw.rectangle((left, 178, left + 10, 202), fill=(235, 245, 235))
    return _shaded(image)


def teapot() -> Image.Image:
    """A blue and white teapot: spout on the left, handle on the right, lid with a knob."""
    image, draw = _canvas()
    draw.ellipse((164, 88, 250, 190), outline=(40, 90, 190), width=18)
    draw.polygon(((84, 190), (8, 110), (22, 92), (52, 104), (100, 140)), fill=(60, 120, 215))
    draw.ellipse((48, 84, 208, 232), fill=(70, 135, 230))
    draw.rectangle((84, 218, 172, 240), fill=(40, 90, 190))
    draw.ellipse((58, 138, 198, 176), fill=(240, 245, 255))
    draw.pieslice((78, 56, 178, 130), 180, 360, fill=(240, 245, 255))
    draw.ellipse((112, 32, 144, 64), fill=(230, 170, 60))
    return _shaded(image)


def _of_bank(name: str, hue: float | None = None) -> Callable[[], Image.Image]:
    def tile() -> Image.Image:
        image = bank.read()[name, "3d"]
        return image if hue is None else recoloured(image, hue)

    return tile


@dataclass(frozen=True)
class Concept:
    """`tile` draws the thing with transparency, `start` is the word that training starts from, `kind` what
    the bank calls things of that word, and `bank` what it calls this one, if it has it."""

    tile: Callable[[], Image.Image]
    start: str
    kind: str
    bank: str = ""


UNSEEN = {
    "striped-mug": Concept(mug, "beverage", "hot-beverage"),
    "green-robot-face": Concept(robot, "robot", "robot"),
    "teapot": Concept(teapot, "beverage", "hot-beverage"),
    "violet-banana": Concept(_of_bank("banana", VIOLET), "banana", "banana", "banana"),
    "guitar": Concept(_of_bank("guitar"), "key", "key", "guitar"),
    "tulip": Concept(_of_bank("tulip"), "rose", "rose", "tulip"),
}
