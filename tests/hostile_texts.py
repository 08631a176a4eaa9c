"""Hostile texts for hostile.py: prompts, infotexts, flags, tables of settings, paths in the way."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile_files import DRAW, ODD_JSON, Assets, Case, special, write_png

PIECES = (
    "(",
    ")",
    "[",
    "]",
    ":",
    "\\",
    "|",
    ",",
    "<lora:",
    ">",
    "BREAK",
    "AND",
    "a",
    "1.3",
    ":1.2)",
    "é",
    "🐈",
    " ",
    "\n",
    "<",
)


def text(rng: random.Random, pieces: tuple[str, ...] = PIECES) -> str:
    """Some characters that mean something, in any order; or one of them many times."""
    if rng.random() < 0.5:
        return "".join(rng.choice(pieces) for _ in range(rng.choice([1, 5, 20, 200])))
    few = "".join(rng.choice(pieces) for _ in range(rng.choice([1, 2, 3])))
    return (
        rng.choice(["", "a", "(a", "[a"])
        + few * rng.choice([20, 2000, 20_000])
        + rng.choice(["", "x", ")", "]"])
    )


def argument(prompt: str) -> str:
    """As much of a text as the system takes for one argument."""
    return prompt.encode()[:120_000].decode(errors="ignore").replace("\0", "") or "x"


def prompt(rng: random.Random, assets: Assets, folder: Path) -> Case:
    number = rng.choice(["9" * 400, "1e400", "1" * 20_000, "nan", "-1e38", "1e38", "0", "1_0"])
    written = rng.choice(
        [text(rng), f"(a:{number})", f"[a:{number}", f"(a{' ' * 20_000}:1", f"<lora:x:{number}>"]
    )
    flag = rng.choice(["--prompt", "--prompt", "--negative_prompt", "--plain_prompt"])
    flags = ["--prompt", "x", flag, argument(written)] if flag != "--prompt" else [flag, argument(written)]
    if flag == "--plain_prompt":
        flags = ["--prompt", argument(written), flag]
    return Case(f"{flag} {written[:30]!r}", ["--model", str(assets.model), *flags, *DRAW])


def prompt_file(rng: random.Random, assets: Assets, folder: Path) -> Case:
    path = folder / "prompts.txt"
    kind = rng.choice(["text", "long", "bytes", "lines", "fifo", "folder", "loop", "device", "empty"])
    content = {
        "text": b"\n".join(text(rng).encode()[:2000].split(b"\n")[:5]),  # a line is an image
        "long": rng.choice(["a", "(", " ", "a b ", "é"]).encode() * 10**6,
    }
    content |= {"bytes": rng.randbytes(500), "lines": b"\n" * 10**6, "empty": b""}
    special(kind, path) or path.write_bytes(content[kind])
    flags = ["--model", str(assets.model), "--prompt_file", str(path), *DRAW]
    return Case(
        f"prompt file: {kind}", flags, refuse=kind in ("fifo", "folder", "loop", "device", "lines", "empty")
    )


def infotext(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """--like an image whose text is wrong."""
    from minisd.sampling.infotext import read

    whole = read(assets.image)
    kind = rng.choice(["soup", "value", "value", "pairs", "json", "long"])
    lines = whole.split("\n")
    pairs = lines[-1].split(", ")
    if kind == "soup":
        whole = text(rng, (*PIECES, "Steps: 20, ", "Negative prompt: ", '"', "Size: 16x16, ", "Seed: 1, "))
    elif kind == "value":
        key = rng.choice(pairs).split(": ")[0]
        odd = rng.choice(
            ["nan", "inf", "-1", "9" * 400, "", '"', "x" * 10**5, "99999999x16", "1e9", "\\", "0x0"]
        )
        whole = "\n".join(
            [*lines[:-1], ", ".join(f"{key}: {odd}" if p.startswith(f"{key}:") else p for p in pairs)]
        )
    elif kind == "pairs":
        whole = "\n".join([*lines[:-1], ", ".join(rng.sample(pairs, len(pairs) - 1) * rng.choice([1, 3]))])
    elif kind == "json":
        quoted = rng.choice(ODD_JSON)[:50_000].replace('"', '\\"')
        whole = f'{whole}, Prompts: "{quoted}"'
    else:
        whole = rng.choice(["x ", "x: ", '"', "a, ", ": ", "x:,", 'xx:"', " "]) * 100_000
    path = folder / "like.png"
    write_png(path, whole.replace("\0", " ").encode(errors="replace").decode())
    return Case(f"infotext: {kind}", ["--model", str(assets.model), "--like", str(path), *DRAW])


NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e39",
    "9" * 400,
    "1e-400",
    "",
    "x",
    "8000000",
    "2147483648",
    "1.5",
    "1e9",
)
NUMERIC = (
    "width",
    "height",
    "steps",
    "seed",
    "guidance_scale",
    "num_images",
    "batch_size",
    "eta",
    "clip_skip",
    "preview",
    "strength",
)


def flag(rng: random.Random, assets: Assets, folder: Path) -> Case:
    name = rng.choice(
        [*NUMERIC, "device", "dtype", "scheduler", "model", "controlnet", "revision", "variant", "lora_dir"]
    )
    value = rng.choice(
        NUMBERS
        if name in NUMERIC
        else ["", "x", "cuda", "mps", "gpu", "cuda:99", "\n", "../x", "fp64", "x:nan", "-1"]
    )
    given = [] if name == "model" else ["--model", str(assets.model)]
    return Case(f"--{name}={value[:30]}", [*given, "--prompt", "x", *DRAW, f"--{name}={value}"])


def training_flag(rng: random.Random, assets: Assets, folder: Path) -> Case:
    from tests.hostile_files import TRAIN

    name = rng.choice([
        "learning_rate", "resolution", "train_batch_size", "rank", "max_train_steps", "seed", "snr_gamma",
        "gradient_accumulation_steps", "lr_warmup_steps", "max_grad_norm", "adam_beta1", "adam_epsilon",
        "noise_offset", "num_train_epochs", "dataloader_num_workers", "checkpointing_steps", "lora_alpha",
        "caption_dropout", "validation_epochs",
    ])  # fmt: skip
    value = rng.choice(NUMBERS)
    flags = ["lora", "--model", assets.model, "--data", assets.data, "--output_dir", folder / "out", *TRAIN]
    return Case(
        f"--{name}={value[:30]}", ["--method", *map(str, flags), f"--{name}={value}"], "train.py", leaves=True
    )


def table(rng: random.Random, assets: Assets, folder: Path) -> Case:
    path = folder / "sweep.csv"
    header = rng.choice(
        ["steps", "seed", "prompt", "output", "x", "steps,seed", "adapter", "model", "csv", "steps,steps", ""]
    )
    rows = [
        rng.choice(["1", "x", "", "1,2", "\0", '"', "9" * 400, "nan", "../../out"])
        for _ in range(rng.choice([0, 1, 3]))
    ]
    kind = rng.choice(["text", "text", "bytes", "fifo", "device", "folder", "long"])
    content = {
        "text": "\n".join([header, *rows]).encode(),
        "bytes": rng.randbytes(300),
        "long": b"steps\n" + b"1" * 10**6,
    }
    special(kind, path) or path.write_bytes(content[kind])
    flags = ["--model", str(assets.model), "--prompt", "x", "--csv", str(path), *DRAW]
    return Case(f"csv: {kind} {header}", flags, refuse=kind not in ("text", "bytes"), leaves=True)


def in_the_way(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A file or folder of the user's where something would be written."""
    kind = rng.choice(
        ["output", "image", "export file", "export folder", "output_dir", "output_dir model", "loop"]
    )
    mine = folder / rng.choice(["mine.png", "mine.safetensors", "mine"])
    copied = folder / "copy.png"
    copied.write_bytes(assets.image.read_bytes())
    draw = ["--model", str(assets.model), "--prompt", "x", *DRAW[:6]]
    if kind == "output":
        mine = folder / "mine.png"
        mine.write_bytes(b"mine")
        return Case(kind, [*draw, "--output", str(mine)], refuse=True)
    if kind == "image":
        return Case(kind, [*draw, "--image", str(copied), "--output", str(copied)], refuse=True)
    if kind == "export file":
        mine = folder / "mine.safetensors"
        mine.write_bytes(b"mine")
        return Case(kind, ["--model", str(assets.model), "--export", str(mine)], refuse=True)
    if kind == "export folder":
        mine = folder / "mine"
        (mine / "unet").mkdir(parents=True)
        (mine / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"mine")
        return Case(kind, ["--model", str(assets.model), "--export", str(mine)], refuse=True)
    if kind == "loop":
        special("loop", folder / "out")
        return Case(kind, [*draw, "--output", str(folder / "out")], refuse=True)
    from tests.hostile_files import TRAIN

    out = folder / "out"
    out.mkdir()
    name = rng.choice(
        ["pytorch_lora_weights.safetensors", "result.png", "log.jsonl", "options.json", ".x.deadbeef.tmp"]
    )
    (out / name).write_bytes(b"mine")
    flags = ["lora", "--model", assets.model, "--data", assets.data, "--output_dir", out, *TRAIN]
    return Case(
        f"{kind}: {name}", ["--method", *map(str, flags)], "train.py", leaves=True, refuse=name[0] != "."
    )


def odd_path(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """Names that the system allows: blanks, line ends, undecodable bytes, very long ones, deep folders."""
    name = rng.choice(
        [
            "a b",
            "a\nb",
            "é🐈",
            "x" * 250,
            "-x",
            "--help",
            ":0.5",
            "a:1",
            "%d%s",
            "{}",
            "\udcff",
            "x/" * 300,
            "$HOME",
        ]
    )
    path = folder / name
    if len(name) < 255:
        path.mkdir(parents=True)
        (path / "thing.safetensors").write_bytes(assets.embeddings[0].read_bytes())
    flags = ["--model", str(assets.model), "--prompt", "a thing", *DRAW[:6]]
    use = rng.choice(
        [["--adapter", f"{path}/thing.safetensors"], ["--output", str(path)], ["--lora_dir", str(path)]]
    )
    if os.sep * 2 in use[1]:
        use[1] = use[1].replace(os.sep * 2, os.sep)
    return Case(f"path {name[:20]!r}, {use[0]}", [*flags, f"{use[0]}={use[1]}"])


KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = {
    "prompts": prompt,
    "prompt files": prompt_file,
    "infotexts": infotext,
    "flags of sample.py": flag,
    "flags of train.py": training_flag,
    "tables of settings": table,
    "files in the way": in_the_way,
    "odd paths": odd_path,
}
