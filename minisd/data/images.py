"""Pictures in and out: files, PIL images, and tensors (3, h, w) in [-1, 1]."""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minisd import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def list_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder in the order of their names, and the other files. Hidden files are neither."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    return pictures, [p for p in files if p.suffix.lower() not in SUFFIXES]


def open_image(path: Path, content: bytes | None = None, behind: str = "white") -> Image.Image:
    """An RGB image, turned as its EXIF says, with transparency laid on `behind`. ValueError if it is not one.
    `content` is read instead of the file, if given; `path` is its name then."""
    try:
        file = path if content is None else io.BytesIO(content)
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as e:
        raise ValueError(f"{path} cannot be decoded: {e}") from None


def read_square(name: str, side: int, *, flag: str) -> Tensor:
    """The middle of the picture at a path or an address, (3, side, side) in [-1, 1]. ValueError, naming
    `flag`, if there is none."""
    content = None
    try:
        if name.startswith(("http://", "https://")):
            with urlopen(name, timeout=20) as answer:
                content = answer.read()
        image = center_square(open_image(Path(name), content))
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
    """The inverse of `to_tensor`, clipped and rounded."""
    array = (pixels.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(array.round().to(torch.uint8).permute(1, 2, 0).numpy())


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side on white, each in a cell of the largest one's size; about square by default."""
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def label(text: str, width: int, height: int = 0) -> Image.Image:
    """Words on white, in lines that fit into `width`; at least `height` high."""
    font = ImageFont.load_default(12)
    lines = [""]
    for part in re.split(r"(?<=[ _/,.:-])", " ".join(text.split())):  # where a line may end
        longer = lines[-1] + part
        fits = font.getlength(longer.rstrip()) <= width - 8
        lines = [*lines[:-1], longer] if fits or not lines[-1] else [*lines, part]
    height = max(height, 16 * len(lines) + 6)
    image = Image.new("RGB", (width, height), "white")
    top = (height - 16 * len(lines)) // 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((4, top + 16 * number), line, fill="black", font=font)
    return image


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture under its label."""
    above = label(text, image.width)
    sheet = Image.new("RGB", (image.width, above.height + image.height), "white")
    sheet.paste(above, (0, 0))
    sheet.paste(image, (0, above.height))
    return sheet


def table(
    cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], gap: int = 4
) -> Image.Image:
    """Pictures in rows and columns, with the labels of these to the left and above."""
    flat = [image for row in cells for image in row]
    width, height = max(i.width for i in flat), max(i.height for i in flat)
    above = [label(text, width) for text in columns]
    fitting = (w for w in (64, 96, 160, 240) if all(label(text, w).height <= height for text in rows))
    wide = next(fitting, 320)
    left = [label(text, wide, height).crop((0, 0, wide, height)) for text in rows]
    body = grid(flat, len(columns), gap)
    sheet = Image.new(
        "RGB", (left[0].width + body.width, max(i.height for i in above) + body.height), "white"
    )
    for number, image in enumerate(above):
        sheet.paste(image, (left[0].width + number * (width + gap), 0))
    for number, image in enumerate(left):
        sheet.paste(image, (0, sheet.height - body.height + number * (height + gap)))
    sheet.paste(body, (left[0].width, sheet.height - body.height))
    return sheet


def labelled_rows(rows: Sequence[tuple[str, Sequence[Image.Image]]], size: int = 256) -> Image.Image:
    """One row of pictures under each label: how results are shown beside what they should look like."""
    header = 20
    strips = [
        (text, grid([i.resize((size, size)) for i in row], columns=len(row))) for text, row in rows if row
    ]
    sheet = Image.new(
        "RGB", (max(s.width for _, s in strips), sum(s.height + header for _, s in strips)), "white"
    )
    top, draw = 0, ImageDraw.Draw(sheet)
    for text, strip in strips:
        draw.text((4, top + 4), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
        sheet.paste(strip, (0, top + header))
        top += header + strip.height
    return sheet


def save_png(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Write a PNG at once or not at all; `parameters` go into its text chunk of that name."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", parameters)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    files.write_bytes(path, buffer.getvalue())
