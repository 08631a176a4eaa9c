"""Hostile files for hostile.py: damaged models, adapters, configs, images, tables and checkpoints."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minisd import cli, files
from minisd.formats import diffusers, lora_names, single_file
from minisd.sampling import infotext
from minisd.sampling.options import Sample
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.weights_helpers import tiny

DRAW = ["--width", "16", "--height", "16", "--steps", "2", "--output", "out"]
DEEP = "[" * 100_000
ODD_JSON = (
    DEEP,
    "{}",
    "[]",
    "null",
    "1e999",
    '{"a": NaN}',
    '"\\ud800"',
    "{",
    "",
    "\x00",
    '{"a": 1}' * 2,
    "9" * 5000,
)


@dataclass
class Case:
    """A command line to run in the case's folder."""

    what: str  # for people
    flags: list[str]
    program: str = "sample.py"
    refuse: bool = False  # accepting it would be a failure
    leaves: bool = False  # whether it may leave files though it is refused
    replaces: tuple[Path, ...] = ()  # files of its own that it may change
    environment: dict[str, str] = field(default_factory=dict)
    signals: tuple[tuple[float, int], ...] = ()  # seconds after the start, and what is sent to it then
    stdout: str = ""  # where its output goes instead of a file: a pipe that nobody reads, or a path
    second: tuple[list[str], dict[str, str]] | None = None  # flags and environment of a second process
    ends: tuple[int, ...] = (0, 2)  # exit statuses that are no failure, or minus the signal


@dataclass
class Assets:
    """Whole files that cases damage copies of."""

    folder: Path
    model: Path  # a folder in the layout of diffusers
    single: Path  # the same in one file
    loras: list[Path]
    embeddings: list[Path]
    image: Path  # a PNG that sample.py drew
    run: Path  # a run folder with two checkpoints
    data: Path  # captioned images
    digests: dict[Path, str] = field(default_factory=dict)  # of all files, which no case may change


def make_assets(folder: Path) -> Assets:
    """Write the whole files, random weights throughout."""
    from tests import hostile

    model, single, data, run = (folder / name for name in ("model", "model.safetensors", "data", "run"))
    parts = tiny()
    diffusers.save(model, parts)
    single_file.save(single, parts)
    data.mkdir()
    for i in range(3):
        Image.new("RGB", (40 + i, 36), (70 * i, 200, 90)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
    train(["lora", "--model", model, "--data", data, "--output_dir", run, *TRAIN, "--checkpointing_steps", 1])
    trained = load_file(run / "pytorch_lora_weights.safetensors")
    kohya = folder / "kohya.safetensors"
    sd = StableDiffusion.load(model)
    sd.attach(run)
    factors = {
        name: (u.lora_A, u.lora_B, 2.0)
        for a in sd.attached.values()
        for x in a.adapters
        for name, u in x.updates.items()
    }
    files.write(kohya, *lora_names.to_kohya(factors))
    assert len(trained) == 2 * len(factors)
    embedding, pickled = folder / "thing.safetensors", folder / "other.pt"
    save_file({"thing": torch.randn(2, 32)}, embedding)
    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "other"}, pickled)
    image = folder / "drawn.png"
    info = infotext.write(
        "a cat", 3, "model", Sample(model=str(model), prompt=["a cat"], width=16, height=16, steps=2)
    )
    write_png(image, info)
    loras = [run / "pytorch_lora_weights.safetensors", kohya]
    assets = Assets(folder, model, single, loras, [embedding, pickled], image, run, data)
    assets.digests = hostile.snapshot(folder)
    return assets


TRAIN = [
    "--resolution",
    16,
    "--max_train_steps",
    2,
    "--rank",
    2,
    "--report_to",
    "none",
    "--num_validation_images",
    1,
]


def train(flags: list) -> None:
    import train

    before, sys.argv = sys.argv, ["train.py", "--method", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.run("train.py", train.main)
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = before


def write_png(path: Path, text: str) -> None:
    from minisd.data import images

    images.save_png(Image.linear_gradient("L").resize((16, 16)).convert("RGB"), path, text)


# ------------------------------ Files of tensors


def odd_value(rng: random.Random) -> object:
    """A JSON value that is rarely what is expected."""
    return rng.choice([
        None, True, -1, 0, 1, 0.5, 2**19, 2**40, 10**400, float("nan"), float("inf"), "", "x", "9" * 5000, [],
        [[]], [0] * 9, [2**31], {}, {"a": {}}, [None], "../../x", "\ud800", [64] * 40,
    ])  # fmt: skip


def damaged_tensors(rng: random.Random, source: Path, target: Path) -> Case:
    """A .safetensors file whose tensors or metadata are wrong, though it is well formed."""
    tensors, metadata = files.read_with_metadata(source)
    tensors = {name: t.clone() for name, t in tensors.items()}
    name = rng.choice(list(tensors))
    kind = rng.choice(
        ["nan", "inf", "int", "shape", "missing", "extra", "renamed", "empty", "transposed", "metadata"]
    )
    refuse = kind in ("shape", "empty", "nan", "inf")
    t = tensors[name]
    if kind in ("nan", "inf") and not t.is_floating_point():
        kind = "empty"
    if kind in ("nan", "inf"):
        t.view(-1)[rng.randrange(t.numel())] = float(kind)
    elif kind == "int":
        tensors[name] = t.to(rng.choice([torch.int64, torch.int8, torch.bool]))
    elif kind == "shape":
        tensors[name] = torch.cat([t.reshape(-1)] * 2)
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors[rng.choice(["x", f"{name}.alpha", f"{name}2", "", "state_dict"])] = torch.zeros(
            rng.choice([0, 1, 3])
        )
    elif kind == "renamed":
        tensors[name[1:]] = tensors.pop(name)
    elif kind == "empty":
        tensors[name] = t.reshape(-1)[:0]
    elif kind == "transposed":
        tensors[name] = t.T.contiguous() if t.ndim == 2 else t
    else:
        text = rng.choice(
            [*ODD_JSON, json.dumps({"unet.r": odd_value(rng), "unet.lora_alpha": odd_value(rng)})]
        )
        metadata = {rng.choice([lora_names.METADATA, "format", "controlnet", "minisd", "config"]): text}
    text = {key: value for key, value in metadata.items() if "\ud800" not in value}
    save_file(tensors, target, metadata=text)
    return Case(f"{source.name}: {kind} of {name}", [], refuse=refuse)


def damaged_bytes(rng: random.Random, source: Path, target: Path) -> Case:
    """A file whose bytes are damaged, or that is no file."""
    content = bytearray(source.read_bytes())
    kind = rng.choice(
        ["cut", "header", "length", "zeros", "lfs", "html", "fifo", "folder", "loop", "device", "deep"]
    )
    refuse = kind != "header"
    size = struct.unpack("<Q", content[:8])[0] if source.suffix == files.SAFETENSORS else 40
    if kind == "cut":
        content = content[: rng.choice([0, 1, 8, 9, size, len(content) // 2, len(content) - 1])]
    elif kind == "header":
        for _ in range(rng.choice([1, 3, 20])):
            content[8 + rng.randrange(min(size, len(content) - 8))] = rng.randrange(256)
    elif kind == "length":
        content[:8] = struct.pack(
            "<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, size - 1, size + 1, 10**8])
        )
    elif kind == "zeros":
        content = bytes(rng.choice([1, 100, len(content)]))
    elif kind == "lfs":
        content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    elif kind == "html":
        content = b"<!DOCTYPE html><html>" + b"x" * 1000
    elif kind == "deep":
        content = struct.pack("<Q", len(DEEP)) + DEEP.encode()
    special(kind, target) or target.write_bytes(content)
    return Case(f"{source.name}: {kind}", [], refuse=refuse)


def special(kind: str, target: Path) -> bool:
    """Make what is no regular file; False for other kinds."""
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "loop":
        target.symlink_to(target.name)
    elif kind == "device":
        target.symlink_to("/dev/zero")
    return kind in ("fifo", "folder", "loop", "device")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def odd_pickle(rng: random.Random, target: Path) -> Case:
    """A pickle that is hostile, odd or damaged."""
    kind = rng.choice(["code", "nested", "shared", "compressed", "names", "list", "raw", "cut", "types"])
    state: object = {"thing": torch.randn(2, 32)}
    if kind == "code":
        state = {"state_dict": Evil(), "thing": torch.zeros(2, 32)}
    elif kind == "nested":
        for _ in range(rng.choice([10, 200])):
            state = {"x": state}
    elif kind == "shared":
        for _ in range(5):
            state = {str(i): state for i in range(300)}
    elif kind == "names":
        state = {("x", 3): torch.zeros(2, 32), 5: torch.zeros(2, 32)}
    elif kind == "list":
        state = [torch.zeros(2, 32)] * 3
    elif kind == "types":
        state = {rng.choice(["thing", "*", "emb_params"]): odd_value(rng)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    if kind == "raw":
        content = rng.choice([pickle.dumps({"a": 1}), pickle.dumps(Evil()), pickle.dumps([1] * 1000)])
    elif kind == "cut":
        content = content[: rng.randrange(1, len(content))]
    elif kind == "compressed":
        packed = io.BytesIO()
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        content = packed.getvalue()
    target.write_bytes(content)
    return Case(f"pickle: {kind}", [], refuse=kind not in ("compressed", "nested", "shared"))


def model_file(rng: random.Random, assets: Assets, folder: Path) -> Case:
    target = folder / "model.safetensors"
    case = rng.choice([damaged_tensors, damaged_bytes])(rng, assets.single, target)
    case.flags = ["--model", str(target), "--prompt", "x", *DRAW]
    if any(word in case.what for word in (": nan", ": inf")):
        case.refuse = False  # it may be where it does not matter for this image; a black one is a failure
    case.refuse = case.refuse or ": missing" in case.what and "position_ids" not in case.what
    return case


def adapter(rng: random.Random, assets: Assets, folder: Path) -> Case:
    if rng.random() < 0.3:
        target = folder / "thing.pt"
        case = odd_pickle(rng, target)
    else:
        source = rng.choice([*assets.loras, *assets.embeddings])
        target = folder / source.name
        safe = source.suffix == files.SAFETENSORS
        case = (rng.choice([damaged_tensors, damaged_bytes]) if safe else damaged_bytes)(rng, source, target)
    scale = rng.choice(["", "", ":0.5", ":nan", ":1e39", ":-inf", ":" + "9" * 400, ":x"])
    case.refuse = case.refuse or scale[1:3] in ("na", "1e", "-i", "99")
    case.flags = [
        "--model",
        str(assets.model),
        "--adapter",
        f"{target}{scale}",
        "--prompt",
        "a thing other",
        *DRAW,
    ]
    return case


def config(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A model folder with a JSON file that is wrong."""
    model = folder / "model"
    shutil.copytree(assets.model, model, copy_function=os.symlink)
    read = ("config.json", "scheduler_config.json", "model_index.json")
    path = rng.choice(sorted(p for p in model.rglob("*.json") if p.name in read))
    content = json.loads(path.read_text())
    path.unlink()
    kind = rng.choice(["value", "value", "value", "value", "text", "gone", "special", "missing key"])
    keys = [key for key in content if not key.startswith("_")] or list(content)
    key = rng.choice(keys)
    if kind == "value":
        content[key] = odd_value(rng)
        path.write_text(json.dumps(content))
    elif kind == "missing key":
        del content[key]
        path.write_text(json.dumps(content))
    elif kind == "text":
        path.write_text(rng.choice(ODD_JSON[:1] + ODD_JSON[2:]), errors="replace")
    elif kind == "special":
        special(rng.choice(["fifo", "folder", "loop", "device"]), path)
    flags = ["--model", str(model), "--prompt", "x", *DRAW]
    return Case(
        f"{path.relative_to(model)}: {kind} {key} {str(content.get(key))[:40]!r}",
        flags,
        refuse=kind == "text",
    )


# ------------------------------ Images and tables


def image_file(rng: random.Random, target: Path) -> bool:
    """Write an image that is odd or damaged. Returns whether it must be refused."""
    kind = rng.choice(["cut", "bytes", "huge", "fifo", "folder", "loop", "device", "odd", "text", "empty"])
    buffer, image = io.BytesIO(), Image.effect_noise((40, 30), 90)
    image.save(buffer, format=rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    content = bytearray(buffer.getvalue())
    if kind == "cut":
        content = content[: rng.randrange(1, len(content) // 2)]
    elif kind == "bytes":
        for _ in range(20):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "huge":
        header = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0\0\0\0" + bytes(100)
    elif kind == "odd":
        buffer = io.BytesIO()
        mode, size = (
            rng.choice(["1", "L", "P", "RGBA", "LA", "I;16", "I", "F", "CMYK"]),
            rng.choice([(1, 1), (3, 90)]),
        )
        fits = "TIFF" if mode in ("I", "F", "CMYK") else "PNG"
        Image.new(mode, size).save(buffer, format=fits)
        content = buffer.getvalue()
    elif kind in ("text", "empty"):
        content = b"not an image" * (kind == "text")
    special(kind, target) or target.write_bytes(content)
    return kind not in ("bytes", "odd", "cut")


def picture(rng: random.Random, assets: Assets, folder: Path) -> Case:
    target = folder / "input.png"
    refuse = image_file(rng, target)
    use = rng.choice([["--image", str(target)], ["--image", str(assets.image), "--mask", str(target)]])
    flags = ["--model", str(assets.model), "--prompt", "x", *use, "--strength", "0.5", *DRAW]
    return Case(f"input image, {use[-2]}", flags, refuse=refuse)


def dataset(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A folder to train on, with a table, a caption or an image that is wrong."""
    data = folder / "data"
    shutil.copytree(assets.data, data)
    kind, refuse = rng.choice(["jsonl", "csv", "caption", "image", "links", "concepts", "names"]), False
    names = [
        "../run/options.json",
        "/etc/passwd",
        "0.png",
        "",
        "\x00",
        "x" * 300,
        "0.png/",
        ".",
        5,
        None,
        ["0.png"],
    ]
    flags = ["lora", "--model", assets.model, "--data", data, "--output_dir", folder / "out", *TRAIN]
    if kind in ("jsonl", "csv"):
        for path in data.glob("*.txt"):
            path.unlink()
        name = rng.choice(names)
        rows = [{"file_name": name, "text": "a"}, *({"file_name": f"{i}.png", "text": "b"} for i in range(3))]
        text = "\n".join(map(json.dumps, rows))
        if kind == "csv":
            text = "file_name,text\n" + "\n".join(f"{row['file_name']},{row['text']}" for row in rows)
        elif rng.random() < 0.4:
            text = rng.choice([text + "\n" + rng.choice(ODD_JSON), DEEP, text[:20], "\ufeff" + text])
        (data / f"metadata.{kind}").write_text(text.replace("\x00", "\0"), errors="replace")
        refuse = name not in ("0.png", "0.png/")
    elif kind == "caption":
        special(rng.choice(["fifo", "loop", "folder"]), data / "x.txt")
        text = rng.choice(
            ["a" * 10**6, "a " * 10**6, "\x00", "\ufeffx", "", "(" * 10**5, "é" * 10**5, "\n" * 1000]
        )
        (data / "0.txt").write_text(text)
    elif kind == "image":
        refuse = image_file(rng, data / "3.png") and (data / "3.png").is_file()
        (data / "3.txt").write_text("x")
    elif kind == "links":
        (data / "sub").mkdir()
        (data / "sub" / "up").symlink_to(data, target_is_directory=True)
        special(
            rng.choice(["fifo", "loop", "device"]), data / rng.choice(["9.png", "metadata.jsonl", "9.txt"])
        )
    elif kind == "concepts":
        listed = folder / "concepts.json"
        entry = {"instance_prompt": "a", "instance_data_dir": str(data)}
        listed.write_text(
            rng.choice([*ODD_JSON, json.dumps([entry | {rng.choice(list(entry)): odd_value(rng)}])]),
            errors="replace",
        )
        flags[flags.index("--data") : flags.index("--data") + 2] = ["--concepts_list", listed]
        flags[0], refuse = "custom_diffusion", True
        flags = [flag for flag in flags if flag not in ("--rank", 2)]
        flags += ["--max_train_steps", 2]
    else:
        for i in range(200):
            (data / f"{i} {rng.choice(['é', ' ', chr(10), '🐈', 'x' * 200])}.png").symlink_to(data / "0.png")
    what = f"data: {kind}"
    return Case(what, ["--method", *map(str, flags)], "train.py", refuse=refuse, leaves=False)


# ------------------------------ Checkpoints


def checkpoint(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A run that is resumed from a checkpoint of which a file is damaged."""
    run = folder / "run"
    shutil.copytree(assets.run, run)
    newest = run / "checkpoint-2"
    for name in ("pytorch_lora_weights.safetensors", "result.png"):
        (run / name).unlink(missing_ok=True)
    path = rng.choice(sorted(newest.iterdir()))
    kind = rng.choice(["bytes", "tensors", "gone", "flip", "numbers"])
    if path.suffix != files.SAFETENSORS or kind == "numbers":
        path = newest / "state.json"
        content = json.loads(path.read_text())
        content[rng.choice(list(content))] = odd_value(rng)
        texts = [json.dumps(content), *ODD_JSON[:4], ""]
        path.unlink()
        path.write_text(rng.choice(texts))
    elif kind == "tensors":
        copy = path.with_name("copy.safetensors")
        damaged_tensors(rng, path, copy)
        os.replace(copy, path)
    elif kind == "gone":
        path.unlink()
    elif kind == "flip":
        content = bytearray(path.read_bytes())
        content[-rng.randrange(1, len(content) // 2)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        copy = path.with_name("copy")
        damaged_bytes(rng, path, copy)
        path.unlink()
        if copy.is_dir() or copy.is_symlink() or not copy.is_file():
            path.write_bytes(b"")
            copy.unlink() if not copy.is_dir() else copy.rmdir()
        else:
            os.replace(copy, path)
    which = rng.choice(["latest", "checkpoint-2"])
    flags = ["lora", "--model", assets.model, "--data", assets.data, "--output_dir", run, *TRAIN]
    flags += ["--checkpointing_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", which]
    return Case(
        f"{path.name}: {kind}, {which}", ["--method", *map(str, flags)], "train.py",
        refuse=which != "latest", leaves=which == "latest",
        replaces=tuple(path for path in (*run.iterdir(), *newest.iterdir()) if path.is_file()),
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = {
    "model files": model_file,
    "adapters": adapter,
    "configs": config,
    "input images": picture,
    "training data": dataset,
    "checkpoints": checkpoint,
}
