"""Build the tiny model's data: openly licensed emoji at 64x64, in folders for train.py.

    python -m minisd.tiny.data OUT                      fetch the packages with npm, and draw them
    python -m minisd.tiny.data OUT --packages FOLDER    with FOLDER/fluent-emoji-3d and so on, unpacked
    python -m minisd.tiny.data OUT --world core         fewer things; wide: all, not only those of world.json

    OUT/train       images with several captions each, in the 3d and the flat style: the model's training data
    OUT/noto        the same things in a style that the model has never seen
    OUT/control     silhouette -> image, for ControlNet
    OUT/edits       3d -> flat with an instruction, for InstructPix2Pix
    OUT/held_out    excluded from all training: concepts/NAME, five images of one thing with {} for its name;
                    styles and hues, images of held-out combinations; control and edits, of the held-out
                    things
    OUT/cat         five images of a cat in a hue without a name: those of cat/ at the top level
    OUT/bank        every thing once in every style, with transparency, for minisd.tiny.metrics; bank.webp has
                    the same in one file, with lossy colours, for the judge

Building twice gives equal bytes: every choice depends on the names alone. The things, and what is held out,
are listed in world.json. OUT/NOTICE.md has the licences of the images.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from minisd import cli
from minisd.tiny import bank
from minisd.tiny.pictures import (
    GROUNDS,
    HUES,
    SIDE,
    WHITE,
    hues_of,
    on,
    posed,
    recoloured,
    resized,
    silhouette,
)

PACKAGES = {  # folder -> name and version for npm
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-emoji-flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "noto": "emoji-datasource-google@16.0.0",
    "names": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
STYLES = ("3d", "flat")
# Poses: caption with {} for the thing -> rotation in degrees, scale, whether mirrored.
POSES = {
    "small {}": (0, 0.65, False),
    "mirrored {}": (0, 1.0, True),
    "{} tilted to the left": (15, 0.95, False),
    "{} tilted to the right": (-15, 0.95, False),
}
# Categories of the Noto package that --world wide includes.
WIDE = ("Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places", "Smileys & Emotion")
TURQUOISE = 168  # degrees, between the named hues green and blue
MASS = set("bread broccoli garlic popcorn bacon butter salt ice coral confetti".split())
NOTICE = """Drawn at 64x64 from Fluent Emoji, Copyright (c) Microsoft Corporation, MIT License, and, in noto
and bank, from Noto Emoji, Copyright Google Inc., Apache License 2.0, as packed by emoji-datasource, Copyright
(c) 2013 Cal Henderson, MIT License. The packages:

"""


# ------------------------------ The packages


def fetch(into: Path) -> None:
    """Fetch each package that `into` lacks by `npm pack`. ValueError if npm is missing or fails."""
    missing = {folder: name for folder, name in PACKAGES.items() if not (into / folder).is_dir()}
    if missing and not shutil.which("npm"):
        raise ValueError(
            f"npm is not installed: install it, or unpack {', '.join(missing.values())} into "
            f"folders named {', '.join(missing)} and pass their parent folder as --packages"
        )
    for folder, name in missing.items():
        with tempfile.TemporaryDirectory() as scratch:
            command = ["npm", "pack", "--silent", name, "--pack-destination", scratch]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{' '.join(command[:4])} failed: {done.stderr.strip()}")
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as tar:
                tar.extractall(Path(scratch) / "unpacked", filter="data")
            into.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch) / "unpacked" / "package", into / folder)


def _key(code: str) -> str:
    """Return an emoji's code points without the variation selector, on which the packages differ."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


class Emoji:
    """The images of the packages, by style and by the name of the thing, such as "cat-face"."""

    def __init__(self, packages: Path):
        folders = {
            "3d": packages / "fluent-emoji-3d" / "assets",
            "flat": packages / "fluent-emoji-flat" / "assets",
            "noto": packages / "noto" / "img" / "google" / "64",
        }
        names = json.loads((packages / "names" / "chars.json").read_text())
        self.names = {_key(code): name for code, name in sorted(names.items())}
        self.files = {
            style: {
                self.names[_key(p.stem)]: p for p in sorted(folder.iterdir()) if _key(p.stem) in self.names
            }
            for style, folder in folders.items()
        }
        self.table = packages / "noto" / "emoji.json"

    def wide(self) -> dict[str, list[str]]:
        """Return all things of the categories in WIDE: category -> names, sorted."""
        kinds: dict[str, list[str]] = {}
        for row in json.loads(self.table.read_text()):
            name = self.names.get(_key(row["unified"]))
            if name and row["category"] in WIDE and row["subcategory"] != "time":
                if all(name in self.files[style] for style in STYLES):
                    kinds.setdefault(row["category"], []).append(name)
        return {kind: sorted(names) for kind, names in sorted(kinds.items())}

    def draw(self, style: str, name: str) -> Image.Image:
        """Return a thing's image, 64x64 RGBA. ValueError if the package lacks it."""
        if name not in self.files[style]:
            raise ValueError(f"--packages: there is no {style} image of {name!r}")
        path = self.files[style][name]
        if path.suffix == ".svg":
            return resized(Image.open(io.BytesIO(_rasterize(path.read_text()))))
        return resized(Image.open(path))


def _rasterize(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise ValueError("the flat emoji are SVG, drawn by resvg-py: pip install 'minisd[tiny]'") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE))


# ------------------------------ Words


def plain(name: str) -> str:
    """Return "cat face" for "cat-face"."""
    return name.replace("-", " ")


def uncoloured(name: str) -> str:
    """Return the words of a thing without a colour, so that nothing is called "a blue red apple"."""
    return " ".join(w for w in plain(name).split() if w not in HUES)


def article(words: str) -> str:
    """Return the words with "a" or "an", unless they are a plural or uncountable."""
    last = words.split(" with ")[0].split(" tilted ")[0].split()[-1]
    if last in MASS or last.endswith("s") and not last.endswith(("ss", "us", "os", "is")):
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def captions(style: str, words: str, ground: str = "", kind: str = "") -> list[str]:
    """Return possible captions, the usual one several times. `kind` is the category of the thing."""
    behind, thing = f" on {article(ground)} background" if ground else "", article(words)
    usual = f"{style} emoji of {thing}{behind}"
    rows = [usual] * 5 + [
        f"an emoji of {thing}{behind}",
        f"a picture of {thing}{behind}",
        f"a photo of {thing}{behind}",
        f"{words}, {style} style{behind}",
    ]
    return rows + [f"{style} emoji of {article(kind)}{behind}" if kind else usual]


# ------------------------------ The folders


class Folder:
    """Writes a folder of images and its metadata.jsonl."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        path.mkdir(parents=True, exist_ok=True)

    def add(self, images: dict[str, Image.Image], **texts) -> None:
        """Add a row: images by column ("" is file_name), and texts."""
        row = {}
        for column, image in images.items():
            name = f"{len(self.rows):05}{'-' + column if column else ''}.png"
            image.save(self.path / name)
            row[f"{column}_file_name" if column else "file_name"] = name
        self.rows.append(row | texts)

    def close(self) -> None:
        lines = [json.dumps(row) for row in self.rows]
        (self.path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def jittered(image: Image.Image, chance: random.Random) -> Image.Image:
    """Return the image shifted by up to 2 pixels and scaled a little, which no caption mentions."""
    shift = chance.randint(-2, 2), chance.randint(-2, 2)
    return posed(image, scale=1 - chance.randint(0, 3) / 40, shift=shift)


def variants(name: str, kind: str, style: str, image: Image.Image, held_hues: set):
    """Yield the training images of a thing in a style, with their captions: plain, on coloured backgrounds,
    in other hues, in another pose."""
    chance = random.Random(f"{name} {style}")
    words = plain(name)
    grounds = chance.sample(list(GROUNDS), 5)
    yield on(image), captions(style, words, kind=kind)
    for _ in range(4):
        yield on(jittered(image, chance)), captions(style, words)
    for i, ground in enumerate(grounds[:3]):
        shifted = jittered(image, chance) if i else image
        yield on(shifted, GROUNDS[ground]), captions(style, words, ground, kind if not i else "")
    hues = [h for h in hues_of(image) if (name, h) not in held_hues]
    for i, hue in enumerate(chance.sample(hues, min(3, len(hues)))):
        ground = "" if i < 2 else next(g for g in grounds[3:] if g != hue)
        other = recoloured(jittered(image, chance) if i else image, HUES[hue])
        yield on(other, GROUNDS.get(ground, WHITE)), captions(style, f"{hue} {uncoloured(name)}", ground)
    pose = chance.choice(list(POSES))
    angle, scale, mirror = POSES[pose]
    yield on(posed(image, angle=angle, scale=scale, mirror=mirror)), captions(style, pose.format(words))


def loose(image: Image.Image, chance: random.Random) -> Image.Image:
    """Return the image at a random position and scale, perhaps mirrored: only the silhouette tells which."""
    shift = chance.randint(-5, 5), chance.randint(-5, 5)
    return posed(image, scale=chance.randint(28, 40) / 40, mirror=chance.random() < 0.5, shift=shift)


def five(image: Image.Image) -> list[tuple[Image.Image, str]]:
    """Return a thing on white and on four coloured backgrounds, with captions that have {} for its name."""
    grounds = {"": WHITE} | {g: GROUNDS[g] for g in ("red", "yellow", "purple", "gray")}
    behind = {g: f" on {article(g)} background" if g else "" for g in grounds}
    return [(on(image, colour), f"3d emoji of a {{}}{behind[g]}") for g, colour in grounds.items()]


def write_cat(folder: Path, image: Image.Image) -> None:
    """Write the five images of cat/, and their captions as text files."""
    folder.mkdir()
    for number, (variant, text) in enumerate(five(recoloured(image, TURQUOISE)), 1):
        variant.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text + "\n")


def things_of(size: str, emoji: Emoji) -> dict[str, list[str]]:
    """Return the things of a world, "core", "small" or "wide": kind -> names."""
    kinds = {kind: names.split() for kind, names in bank.world()["concepts"].items()}
    if size == "core":
        few = {*bank.world()["held_out"]["concepts"].split(), *bank.world()["core"].split()}
        kinds = {kind: [n for n in names if n in few] for kind, names in kinds.items()}
    elif size == "wide":
        listed = {name for names in kinds.values() for name in names}
        kinds |= {k: [n for n in names if n not in listed] for k, names in emoji.wide().items()}
    return kinds


class Writer:
    """Writes the images of one thing after another into the folders listed in this file's docstring."""

    PARTS = "train noto control edits bank held_out/styles held_out/hues held_out/control held_out/edits"

    def __init__(self, out: Path):
        self.out = out
        self.folders = {part: Folder(out / part) for part in self.PARTS.split()}
        self.tiles: bank.Tiles = {}
        held = bank.world()["held_out"]
        self.unseen = set(held["concepts"].split())
        self.styles, self.hues = set(map(tuple, held["style"])), [tuple(pair) for pair in held["hue"]]

    def add(self, name: str, kind: str, drawn: dict[str, Image.Image]) -> None:
        """Write all images of a thing; `drawn` has one in each style."""
        for style, image in drawn.items():
            self.tiles[name, style] = image
            self._add_style(name, kind, style, image)
        known = name not in self.unseen
        seen = known and not {(name, s) for s in STYLES} & self.styles
        if seen or not known:
            self._add_pairs(name, drawn, "" if seen else "held_out/")
        if not known:
            concept = Folder(self.out / "held_out" / "concepts" / name)
            for variant, text in five(drawn["3d"]):
                concept.add({"": variant}, text=text)
            concept.close()

    def _add_style(self, name: str, kind: str, style: str, image: Image.Image) -> None:
        """Write the images of a thing in one style, for training or held out."""
        known, usual = name not in self.unseen, captions(style, plain(name))[0]
        seen = known and style != "noto" and (name, style) not in self.styles
        about = {"name": plain(name), "kind": kind, "style": style, "seen": seen}
        self.folders["bank"].add({"": image}, text=usual, **about)
        if seen:
            # The categories of --world wide cannot be used in captions.
            word = kind if kind in bank.world()["concepts"] else ""
            for variant, texts in variants(name, word, style, image, set(self.hues)):
                self.folders["train"].add({"": variant}, text=texts)
        elif known:
            part = "noto" if style == "noto" else "held_out/styles"
            self.folders[part].add({"": on(image)}, text=usual)
        for hue in [h for n, h in self.hues if n == name and style != "noto"]:
            text = captions(style, f"{hue} {uncoloured(name)}")[0]
            self.folders["held_out/hues"].add({"": on(recoloured(image, HUES[hue]))}, text=text)

    def _add_pairs(self, name: str, drawn: dict[str, Image.Image], part: str) -> None:
        """Write silhouettes with their images, and images before and after an edit."""
        chance = random.Random(f"{name} pairs")
        for turn in range(3):
            shape = loose(drawn["3d"], chance) if turn else drawn["3d"]
            pair = {"": on(shape), "conditioning_image": silhouette(shape)}
            self.folders[f"{part}control"].add(pair, text=captions("3d", plain(name))[0])
        ground = chance.choice(list(GROUNDS.values()))
        for behind in (WHITE, ground):
            before, after = (on(drawn[style], behind) for style in STYLES)
            pair = {"input_image": before, "edited_image": after}
            self.folders[f"{part}edits"].add(pair, edit_prompt="make it flat")


def build(out: Path, packages: Path, world: str) -> str:
    """Write all folders into `out`, which must be empty; return the number of rows of each as a text."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    emoji, writer = Emoji(packages), Writer(out)
    for kind, names in things_of(world, emoji).items():
        for name in names:
            in_style = {s: emoji.draw(s, name) for s in (*STYLES, "noto") if name in emoji.files[s]}
            writer.add(name, kind, in_style)
    write_cat(out / "cat", emoji.draw("3d", "cat"))
    for folder in writer.folders.values():
        folder.close()
    bank.write(out / "bank.webp", writer.tiles)
    (out / "NOTICE.md").write_text(NOTICE + "".join(f"- {name}\n" for name in PACKAGES.values()))
    (out / "names.txt").write_text("\n".join(sorted(set(map(plain, emoji.names.values())))) + "\n")
    return ", ".join(f"{part}: {len(folder.rows)}" for part, folder in writer.folders.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.tiny.data", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages; what it lacks is fetched")
    parser.add_argument("--world", choices=("core", "small", "wide"), default="small", help="how many things")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = o.packages or Path(scratch)
        fetch(packages)
        print(build(o.out, packages, o.world))


if __name__ == "__main__":
    cli.run("minisd.tiny.data", main)
