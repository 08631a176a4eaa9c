"""Images in and out: files, PIL images, and tensors (3, h, w) in [-1, 1]."""

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
import string
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minisd import files, reading
from minisd.data import quick
from minisd.options import MAX_PIXELS, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
HEIC = (".heic", ".heif")  # of phones
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1")  # with which such a file begins, after its first size
NO_HEIC = "HEIC needs pip install 'minisd[heic]'"
SUFFIXES += HEIC if importlib.util.find_spec("pillow_heif") else ()
FONTS = (
    "~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "/System/Library/Fonts", "/Library/Fonts", "$WINDIR/Fonts",
)  # fmt: skip
MOST = 1 << 30  # bytes of an encoded image
GAP = 4  # pixels between the images of a grid


@dataclass(frozen=True, eq=False)
class Cell:
    """An image in a dataset of the package `datasets`."""

    table: Any
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"

    def read_bytes(self) -> bytes:
        """The encoded image, as Path.read_bytes; empty if the cell is."""
        value = self.table[self.row][self.column] or b""
        if isinstance(value, bytes):
            return value
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name, without hidden files. ValueError if it is not a folder."""
    require(folder.is_dir(), f"{folder} is not a folder")
    visible = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in visible if p.suffix.lower() in SUFFIXES)


def open_image(
    path: Path | str | Cell,
    content: bytes | None = None,
    behind: str = "white",
    max_pixels: int | None = MAX_PIXELS,
    alpha: bool = False,
) -> Image.Image:
    """Read an RGB image from a file, or from `content`; EXIF rotation is applied, and `behind` is the
    background of transparent pixels. With `alpha`, how opaque it is as a grey is read instead. ValueError,
    naming `path`, if it cannot be decoded, or has more than `max_pixels`."""
    with _opened(path, content, max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if alpha:
            image = image.convert("RGBA").getchannel("A")
        elif _transparent(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
        return image.convert("RGB")


def has_alpha(path: str | Cell) -> bool:
    """Whether an image may be transparent. ValueError as for `open_image`."""
    with _opened(path, None, None, header=True) as image:
        return _transparent(image)


def _transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def read_size(
    path: str | Cell, content: bytes | None = None, *, whole: bool, max_pixels: int | None
) -> tuple[int, int]:
    """Width and height of an image after EXIF rotation, by its header, or if `whole` by decoding it.
    ValueError as for `open_image`, without `whole` only for what is wrong with the header."""
    if whole:
        return open_image(path, content, max_pixels=max_pixels).size
    size = quick.size(path, MOST) if isinstance(path, str) and content is None else None
    if size and (max_pixels is None or size[0] * size[1] <= max_pixels):
        return size
    with _opened(path, content, max_pixels, header=True) as image:
        # Not image.getexif(), which decodes a PNG. A TIFF's size is already that after rotation.
        orientation = image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return image.size[::-1] if orientation in (5, 6, 7, 8) else image.size


@contextmanager
def _opened(
    path: Path | str | Cell, content: bytes | None, max_pixels: int | None, header: bool = False
) -> Iterator[Image.Image]:
    """The image in a file or in `content`, which is read whole unless only its `header` is needed. Errors are
    ValueErrors that name the path, those in the block too."""
    is_file = content is None and not isinstance(path, Cell)
    if is_file:
        reading.check_regular(path, MOST)
    try:
        if is_file and header:
            file = open(path, "rb")
        else:
            whole = Path(path).read_bytes() if is_file else path.read_bytes() if content is None else content
            require(whole, "it is empty")
            file = io.BytesIO(whole)
        with file, unlimited():
            if file.read(12)[4:] in HEIC_BRANDS:
                read_heic()
            with Image.open(file) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                yield image
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture") from None
    except Image.DecompressionBombError:
        problem = f"{path} has more than {max_pixels:,} pixels; --max_pixels raises the limit"
        raise ValueError(problem) from None
    except (OSError, SyntaxError, ValueError, struct.error) as e:
        raise ValueError(f"{path} cannot be decoded: {e}") from None


@contextmanager
def unlimited() -> Iterator[None]:
    """Within the block Pillow does not warn of large images. Its limit is one for all threads: a block around
    all of them keeps it as it is."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def read_heic() -> None:
    """Teach Pillow to read HEIC. ValueError if the package for it is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(NO_HEIC) from None
    pillow_heif.register_heif_opener()


def read_square(name: str, side: int, *, flag: str, max_pixels: int) -> Tensor:
    """The largest centred square of the image at a path or a URL, (3, side, side) in [-1, 1]. ValueError,
    naming `flag`, if it cannot be read, or has more than `max_pixels`."""
    content = None
    try:
        if name.startswith(("http://", "https://")):
            with urlopen(name, timeout=20) as answer:
                content = answer.read()
        image = center_square(open_image(Path(name), content, max_pixels=max_pixels))
    except (OSError, ValueError) as e:
        raise ValueError(f"{flag} {name}: {e}") from None
    return to_tensor(image.resize((side, side)))


def center_square(image: Image.Image) -> Image.Image:
    """The largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, h, w) in [-1, 1], fp32."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()  # (3, h, w)


def to_pil(pixels: Tensor) -> Image.Image:
    """The inverse of `to_tensor`, clipped and rounded. ValueError if a value is not finite."""
    array = (pixels.detach().float().cpu() / 2 + 0.5) * 255
    if not array.isfinite().all():
        raise ValueError(
            "the image has values that are not numbers: weights are damaged, a scale or the guidance is too "
            "large, or fp16 overflows (--dtype bf16 or fp32)"
        )
    array = array.clamp(0, 255)
    return Image.fromarray(array.round().to(torch.uint8).permute(1, 2, 0).numpy())


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images in a grid on white, in cells as large as the largest; by default the grid is about square."""
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = max(i.width for i in images), max(i.height for i in images)
    cells = [ImageOps.expand(i, (0, 0, width - i.width, height - i.height), "white") for i in images]
    rows = [stack(cells[first : first + columns], True, GAP) for first in range(0, len(cells), columns)]
    return stack(rows, gap=GAP)


@functools.cache
def font_for(characters: str) -> ImageFont.FreeTypeFont:
    """A font for labels that has these characters: Pillow's own, or one of the system's. Prints a line if
    there is none."""

    def missing(font: ImageFont.FreeTypeFont) -> list[str]:
        box = bytes(font.getmask("\U0010ffff"))  # what is drawn instead of a character that a font lacks
        return [c for c in characters if not c.isspace() and bytes(font.getmask(c)) in (b"", box)]

    best = ImageFont.load_default(12)
    if not (lacking := missing(best)):
        return best
    folders = (Path(os.path.expandvars(os.path.expanduser(folder))) for folder in FONTS)
    paths = [
        p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".ttc", ".otf")
    ]
    for path in sorted(paths, key=lambda path: ("Sans" not in path.name, len(path.name), path)):
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(path, 12)
            if len(left := missing(font)) < len(lacking):
                best, lacking = font, left
        if not lacking:
            return best
    print(f"labels show boxes for {' '.join(lacking)}: no font of this system has them", file=sys.stderr)
    return best


def label(text: str, width: int, height: int = 0) -> Image.Image:
    """Text on white, in lines that fit into `width`; at least `height` high. A word that does not fit into a
    line goes on in the next one."""
    font = font_for("".join(sorted({*text} - {*string.printable})))

    def fits(line: str) -> bool:
        return len(line) <= 1 or font.getlength(line.rstrip()) <= width - 8

    lines = [""]
    for part in re.split(r"(?<=[ _/,.:-])", " ".join(text.split())):  # where a line may end
        if lines[-1] and not fits(lines[-1] + part):
            lines.append("")
        for piece in [part] if fits(lines[-1] + part) else part:
            if not fits(lines[-1] + piece):
                lines.append("")
            lines[-1] += piece
    height = max(height, 16 * len(lines) + 6)
    image = Image.new("RGB", (width, height), "white")
    top = (height - 16 * len(lines)) // 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((4, top + 16 * number), line, fill="black", font=font)
    return image


def stack(parts: Sequence[Image.Image], across: bool = False, gap: int = 0) -> Image.Image:
    """Images of any size on white, below each other, or with `across` side by side."""
    ends = list(itertools.accumulate((i.width if across else i.height) + gap for i in parts))
    length, breadth = ends[-1] - gap, max(i.height if across else i.width for i in parts)
    sheet = Image.new("RGB", (length, breadth) if across else (breadth, length), "white")
    for image, start in zip(parts, [0, *ends], strict=False):
        sheet.paste(image, (start, 0) if across else (0, start))
    return sheet


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The image under its label."""
    return stack([label(text, image.width), image])


def table(cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Images in rows and columns, with labels on the left and on top."""
    flat = [image for row in cells for image in row]
    width, height = max(i.width for i in flat), max(i.height for i in flat)
    fitting = (w for w in (64, 96, 160, 240) if all(label(text, w).height <= height for text in rows))
    margin = next(fitting, 320)
    height = max(height, *(label(text, margin).height for text in rows))
    flat = [ImageOps.expand(i, (0, 0, 0, height - i.height), "white") for i in flat]
    above = stack([label(text, width) for text in columns], True, GAP)
    above = ImageOps.expand(above, (margin, 0, 0, 0), "white")
    left = stack([label(text, margin, height) for text in rows], gap=GAP)
    return stack([above, stack([left, grid(flat, len(columns))], across=True)])


def labelled_rows(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: int | None = 256) -> Image.Image:
    """A row of images under each label, for example results and what they should look like; as squares of
    `size`, unless that is None."""
    strips = [(text, [i.resize((size, size)) if size else i for i in row]) for text, row in rows if row]
    return stack([labelled(grid(row, columns=len(row)), text) for text, row in strips])


def save_png(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Write a PNG atomically, with `parameters` in the text chunk of that name."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", parameters)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    files.write_bytes(path, buffer.getvalue())
