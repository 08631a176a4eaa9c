"""The records of a folder: rows of its metadata files, and other images with the captions beside them."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from minisd import reading
from minisd.data import images, tables
from minisd.data.records import ABSENT, Records
from minisd.options import require

Subfolders = Literal["all", "repeated", "none"]

REPEATED = re.compile(r"(\d+)_([^/]+)/")  # kohya's folders: repeats and caption (10_sks dog/)
CAPTION_SUFFIXES = (".txt", ".caption")  # of captions beside images; the first that exists is read


class Folder:
    """Reads the records of a folder and its subfolders, and notes the skipped and hidden files. Paths are
    texts: a hundred thousand `Path`s take a second to make."""

    def __init__(self, root: Path, subfolders: Subfolders, by_split: bool, allow_outside: bool):
        require(root.is_dir(), f"{root} is not a folder" if root.exists() else f"there is no {root}")
        # Not ".", which paths in it would begin with, or not.
        self.root = os.getcwd() if str(root) == "." else str(root)
        self.subfolders, self.by_split = subfolders, by_split
        self.prefix = os.path.join(self.root, "")
        self.limits = None if allow_outside else root
        self.files: set[str] = set()
        self.folders = {self.root}  # that have files
        self.skipped: list[str] = []
        self.hidden: list[str] = []
        self.left_out: list[str] = []

    def records(self) -> Records:
        """The records of metadata files, then those of other images. ValueError if an image has no row in the
        metadata, if a row has no image, or if there are no images."""
        files = list(self._files(self.root))
        others = self._other_splits(files) if self.by_split else set()
        if others:
            files = [path for path in files if path not in others]
            self.folders = {self.root, *map(os.path.dirname, files)}
        self.files = set(files)
        folders = sorted(self.folders, key=lambda folder: folder.split(os.sep))
        metadata = {folder: path for folder in folders if (path := tables.find(Path(folder)))}
        records = Records()
        for folder, path in metadata.items():
            pictures, texts = tables.split(tables.read(path), folder, self.limits, self.files)
            if others:
                rows = enumerate(zip(*pictures.values(), strict=True))
                kept = [i for i, paths in rows if not others.issuperset(paths)]
                pictures, texts = (
                    {column: [values[i] for i in kept] for column, values in columns.items()}
                    for columns in (pictures, texts)
                )
            self._add(records, pictures, texts)
        self._add_others(records, files, metadata)
        if not records:
            count = len(self.skipped) + len(self.hidden)
            contents = f"{count} other entries" if count else "empty"
            heic = sum(reason.endswith(images.NO_HEIC) for reason in self.skipped)
            contents = f"{heic} of {contents} are photos: {images.NO_HEIC}" if heic else contents
            raise ValueError(f"no picture in {self.root} ({contents})")
        return records

    def _add_others(self, records: Records, files: list[str], metadata: Mapping[str, Path]) -> None:
        """Append the images that no row of the `metadata` has described, and note the other files."""
        pictures = [path for path in files if is_image(path)]
        described = {path for column in records.pictures.values() for path in column}
        alone = [path for path in pictures if path not in described]
        if described and alone:
            described = {os.path.normpath(path) for path in described if path is not ABSENT}
            alone = [path for path in alone if os.path.normpath(path) not in described]
        for path in alone if metadata else ():
            nearest = self._nearest(path, metadata)
            require(not nearest, f"{path} has no row in {nearest}")
        if alone:
            self._add(records, {"image": alone}, {})
        others = [path for path in files if not is_image(path)]
        captioned = any(path.endswith(CAPTION_SUFFIXES) for path in others)
        stems = {os.path.splitext(path)[0] for path in pictures} if captioned else ()
        for path in others:
            if path.endswith(CAPTION_SUFFIXES):
                if os.path.splitext(path)[0] not in stems:
                    self._skip(path, "no picture of that name")
            elif (used := metadata.get(os.path.dirname(path))) != Path(path):
                unused = used and os.path.basename(path) in tables.METADATA
                other = images.NO_HEIC if path.lower().endswith(images.HEIC) else "not a picture"
                self._skip(path, f"{used.name} is used instead" if unused else other)

    def _nearest(self, path: str, metadata: Mapping[str, Path]) -> Path | None:
        """The metadata file of an image's folder, or of the nearest one above it."""
        folder = os.path.dirname(path)
        while folder not in metadata and folder != self.root:
            folder = os.path.dirname(folder)
        return metadata.get(folder)

    def _other_splits(self, files: list[str]) -> set[str]:
        """The files that are not of the split train. ValueError if that leaves no picture."""
        names = {self._short(path): path for path in files}
        pictures = set(filter(is_image, names))
        splits = tables.splits(names, pictures)
        training = splits.pop("train")
        counts = {split: len(pictures & found - training) for split, found in splits.items()}
        counts["no split"] = len(pictures - training.union(*splits.values()))
        self.left_out = [f"{count} of {split}" for split, count in counts.items() if count]
        if pictures and not pictures & training:
            raise ValueError(f"{self.root} has no split train by its names, but {', '.join(self.left_out)}")
        others = pictures.union(*splits.values()) - training
        return {names[name] for name in others}

    def _files(self, folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
        """Yield the files in a folder and its subfolders by name; `above` are the folders above it."""
        real = os.path.realpath(folder)
        if real in above:  # a link that leads back up
            return
        prefix, names, folders = os.path.join(folder, ""), [], set()
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.add(entry.name)
        for name in sorted(names):
            path = prefix + name
            if name.startswith(".") or name == "__MACOSX":
                self.hidden.append(self._short(path))
            elif name not in folders:
                self.folders.add(folder)
                yield path
            elif reason := self._exclusion(folder, name):
                self._skip(path, reason)
            else:
                yield from self._files(path, above | {real})

    def _exclusion(self, above: str, name: str) -> str | None:
        """The reason to skip a folder, or None. Only folders directly in the root can be skipped."""
        kohya = REPEATED.match(f"{name}/")
        if above != self.root or not os.listdir(os.path.join(above, name)):
            return None
        if self.subfolders == "none" or (self.subfolders == "repeated" and not kohya):
            return "a folder"
        return "repeated 0 times" if kohya and int(kohya[1]) == 0 else None

    def _add(self, records: Records, pictures: dict[str, list[str]], texts: dict[str, list[Any]]) -> None:
        """Append records; without texts, each has the caption beside its first image, or kohya's."""
        paths = next(iter(pictures.values()))
        names = list(map(self._short, paths))
        inside = names if self.subfolders != "none" else ()
        kohya = {i: found for i, name in enumerate(inside) if "/" in name and (found := REPEATED.match(name))}
        if not texts:
            captions = [self._caption(path) for path in paths]
            for i, found in kohya.items():
                captions[i] = found[2] if captions[i] is ABSENT else captions[i]
            texts = {"text": captions} if any(caption is not ABSENT for caption in captions) else {}
        repeats = [1] * len(names)
        for i, found in kohya.items():
            repeats[i] = int(found[1]) or 1
        records.extend(names, pictures, texts, repeats)

    def _caption(self, path: str) -> str:
        """The caption beside an image, or ABSENT."""
        stem = os.path.splitext(path)[0]
        for file in (stem + suffix for suffix in CAPTION_SUFFIXES):
            # Most have none, which the list of files says without asking the disk.
            if (file in self.files or path not in self.files) and os.path.isfile(file):
                return reading.text(Path(file)).strip()
        return ABSENT

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(f"{self._short(path)}: {reason}")

    def _short(self, path: str) -> str:
        return path.removeprefix(self.prefix)


def is_image(path: str) -> bool:
    """Whether a file is an image by its name."""
    return path.lower().endswith(images.SUFFIXES)
