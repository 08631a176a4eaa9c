"""What an example is: a picture, prepared, and its prompt. In which order they come is for batches.py.

A dataset has a length; `example(index, generator)`, which takes everything random from the generator and
returns a view of a picture and a prompt; `pixels(view)`; and `views()`, all there can be, or None if endless.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from minisd.data import images

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)


def chance(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def choice(options, generator: torch.Generator):
    return options[torch.randint(len(options), (), generator=generator).item()]


@dataclass(frozen=True)
class View:
    """A picture file as it is shown to the model: what a cached latent depends on."""

    path: Path
    flipped: bool


@dataclass
class Folder:
    """The usable pictures of a folder, captions from .txt files beside them, and what was passed over."""

    path: Path
    pictures: list[Path]
    captions: dict[Path, str]
    sizes: dict[Path, tuple[int, int]]
    skipped: list[str]

    def summary(self) -> str:
        sizes = sorted(set(self.sizes.values()))
        shown = ", ".join(f"{w}x{h}" for w, h in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
        text = f"{len(self.pictures)} pictures in {self.path} ({shown}), {len(self.captions)} with a caption"
        return text + "".join(f"\n  passed over: {reason}" for reason in self.skipped)


def read_folder(path: Path, *, flag: str, skip_bad_images: bool = False) -> Folder:
    """Find every picture of a folder and decode it once. ValueError, naming `flag`, if one cannot be decoded,
    unless `skip_bad_images`, or if none is left."""
    if not path.is_dir():
        raise ValueError(
            f"{flag}: {path} is not a folder" if path.exists() else f"{flag}: there is no {path}"
        )
    found, others = images.list_images(path)
    captions, sizes, skipped = {}, {}, [f"{p.name}: not a picture" for p in others if p.suffix != ".txt"]
    for picture in found:
        try:
            sizes[picture] = images.open_image(picture).size
        except ValueError as e:
            if not skip_bad_images:
                raise ValueError(f"{flag}: {e}; --skip_bad_images goes on without it") from None
            skipped.append(str(e))
            continue
        sidecar = picture.with_suffix(".txt")
        if sidecar.is_file():
            captions[picture] = sidecar.read_text(encoding="utf-8").strip()
    if not sizes:
        raise ValueError(f"{flag}: no picture in {path} ({len(found) + len(others)} files looked at)")
    return Folder(path, list(sizes), captions, sizes, skipped)


class ConceptPictures:
    """The pictures of one concept under prompts made from templates: textual inversion's data.

    A caption beside a picture is used instead of the templates; in it `{}`, or the token, is the concept.
    """

    def __init__(
        self,
        folder: Folder,
        token: str,
        *,
        style: bool,
        resolution: int,
        center_crop: bool,
        flip_p: float,
        repeats: int,
    ):
        self.folder = folder
        self.token = token
        self.templates = STYLE_TEMPLATES if style else OBJECT_TEMPLATES
        self.resolution = resolution
        self.center_crop = center_crop
        self.flip_p = flip_p
        self.repeats = repeats
        for path, caption in folder.captions.items():
            if token.lower() not in caption.lower() and "{}" not in caption:
                raise ValueError(
                    f"the caption of {path.name} has neither {token} nor {{}} in it: {caption!r}"
                )

    def __len__(self) -> int:
        return len(self.folder.pictures) * self.repeats

    def example(self, index: int, generator: torch.Generator) -> tuple[View, str]:
        path = self.folder.pictures[index % len(self.folder.pictures)]
        template = self.folder.captions.get(path) or choice(self.templates, generator)
        return View(path, chance(self.flip_p, generator)), template.replace("{}", self.token)

    def views(self) -> list[View]:
        """Every view there can be."""
        flips = [f for f, possible in ((False, self.flip_p < 1), (True, self.flip_p > 0)) if possible]
        return [View(path, flipped) for path in self.folder.pictures for flipped in flips]

    def pixels(self, view: View) -> torch.Tensor:
        """(3, resolution, resolution) in [-1, 1]."""
        image = images.open_image(view.path)
        if self.center_crop:
            image = images.center_square(image)
        image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        if view.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return images.to_tensor(image)
