"""Small pictures with captions, and torchvision's operations on them, for the tests of minisd.data."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minisd.data.datasets import EditPairs

SIZES = [(40, 31), (31, 40), (32, 32), (57, 20), (20, 57), (33, 32)]
FILTERS = {  # torchvision's modes, and what its Resize does with a PIL image
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def noisy(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def make_noise(path: Path) -> Path:
    """Noise of six sizes under captions, each with a conditioning image of its size."""
    lines = []
    for i, size in enumerate(SIZES):
        noisy(size, i).save(path / f"{i}.png")
        noisy(size, 100 + i).save(path / f"c{i}.png")
        row = {"file_name": f"{i}.png", "text": f"caption {i}"}
        lines.append(json.dumps(row | {"conditioning_image_file_name": f"c{i}.png"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(dataset, index, seed=0):
    (example,) = dataset.examples(index, seeded(seed))
    return example


def normalized(image):
    """ToTensor and Normalize([0.5], [0.5])."""
    return (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5


def assert_pixels(got, image):
    expected = image if isinstance(image, np.ndarray) else normalized(image)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def torchvision_resize(image, side, resampling):
    """torchvision's Resize(side) of a PIL image."""
    w, h = image.size
    short, long = sorted((w, h))
    other = int(side * long / short)
    return image.resize((side, other) if w <= h else (other, side), resampling)


def torchvision_center_crop(image, side):
    """torchvision's CenterCrop(side)."""
    left, top = int(round((image.width - side) / 2.0)), int(round((image.height - side) / 2.0))
    return image.crop((left, top, left + side, top + side))


def torchvision_square(image, side, resampling):
    """Resize(side), then CenterCrop(side)."""
    return torchvision_center_crop(torchvision_resize(image, side, resampling), side)


def picture(path, color="red", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def captions(source, column="text"):
    """The text of each record by its name."""
    return {record.name: record.texts.get(column) for record in source.records}


def edit_pairs(source, **kwargs):
    """InstructPix2Pix's dataset, with the columns that are its defaults."""
    columns = {"image_column": "edited_image", "caption_column": "edit_prompt", "pair_column": "input_image"}
    return EditPairs(source, interpolation="bicubic", **columns | kwargs)
