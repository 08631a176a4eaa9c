"""Hostile inputs for hostile.py: files given to the wrong flag, tokenizers, names of LoRAs, environments,
indices, rewards."""

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from minisd.data import index
from tests.hostile_files import DRAW, ODD_JSON, TRAIN, Assets, Case, odd_value, special


def mixed_up(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """Whole files, each given to a flag that wants another kind of file."""
    are = {
        "--model": {assets.model, assets.single},
        "--adapter": {*assets.loras, *assets.embeddings, assets.run},
        "--image": {assets.image, assets.data, assets.run},
        "--like": {assets.image},
        "--csv": set(),
        "--lora_dir": {folder, assets.folder, assets.model, assets.data, assets.run},
        "--tokenizer_name": {assets.model / "tokenizer"},
        "--controlnet": set(),
    }
    flag = rng.choice(list(are))
    known = {path for paths in are.values() for path in paths} | {assets.run / "log.jsonl"}
    wrong = rng.choice(sorted(known - are[flag]))
    flags = [] if flag == "--model" else ["--model", str(assets.model)]
    flags += ["--control_image", str(assets.image)] if flag == "--controlnet" else []
    prompt = "<lora:x:1>" if flag == "--lora_dir" else "x"
    what = f"{flag} {wrong.relative_to(assets.folder)}" if wrong.is_relative_to(assets.folder) else flag
    return Case(what, [*flags, "--prompt", prompt, flag, str(wrong), *DRAW], refuse=True)


def tokenizer(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A folder with a vocabulary or a list of merges that is wrong."""
    words = folder / "tokenizer"
    shutil.copytree(assets.model / "tokenizer", words)
    name = rng.choice(["vocab.json", "vocab.json", "merges.txt"])
    path = words / name
    whole = path.read_text(encoding="utf-8")
    kind = rng.choice(["cut", "gone", "special", "text", "entry", "ids", "added"])
    if kind in ("entry", "ids"):
        path = words / "vocab.json"
        entries = json.loads(path.read_text())
        if kind == "ids":
            entries = {word: i + 10**5 for word, i in entries.items()}
        else:
            entries[rng.choice(["a</w>", "<|endoftext|>", "x</w>"])] = odd_value(rng)
        path.write_text(json.dumps(entries))
    elif kind == "cut":
        path.write_text(whole[: rng.randrange(len(whole))], encoding="utf-8")
    elif kind == "text":
        path.write_text(rng.choice(ODD_JSON[:1] + ODD_JSON[2:]), errors="replace")
    elif kind == "added":
        name = rng.choice(["tokenizer.json", "added_tokens.json"])
        (words / name).write_text(
            rng.choice([*ODD_JSON, json.dumps({"x": odd_value(rng)})]), errors="replace"
        )
    else:
        path.unlink()
        kind == "gone" or special(rng.choice(["fifo", "folder", "loop", "device"]), path)
    flags = ["--model", str(assets.model), "--tokenizer_name", str(words), "--prompt", "a x", *DRAW]
    return Case(f"tokenizer: {kind} {name}", flags, refuse=kind in ("gone", "special", "ids"))


def lora_name(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """<lora:NAME:SCALE> whose name leads elsewhere, or a folder of LoRAs with odd entries."""
    shelf = folder / "shelf"
    shelf.mkdir()
    (shelf / "good.safetensors").symlink_to(assets.loras[0])
    odd = shelf / rng.choice(["odd.safetensors", "odd.pt", "sub"])
    special(rng.choice(["fifo", "folder", "loop", "device"]), odd) if odd.suffix else odd.symlink_to(shelf)
    outside = os.path.relpath(assets.loras[1].with_suffix(""), shelf)
    name = rng.choice([
        outside, str(assets.loras[1]), str(assets.loras[1].with_suffix("")), "../shelf/good", "*", "goo?", "",
        ".", "..", "x" * 5000, "good.safetensors", "good\n", "odd", "sub", " ", "%s", "good", "good:1:2:3",
        "good:lbw=9", "~", "GOOD", "gооd",
    ])  # fmt: skip
    count = rng.choice([1, 1, 3, 500])
    flags = ["--model", str(assets.model), "--prompt", f"a <lora:{name}:1>" * count, "--lora_dir", str(shelf)]
    return Case(
        f"<lora:{name[:30]}> x {count}", [*flags, *DRAW], refuse=name.split(":")[0] not in ("good", "sub")
    )


def environment(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A variable of the environment that says nonsense."""
    name = rng.choice([
        "COLUMNS", "LINES", "HOME", "TMPDIR", "LANG", "LC_ALL", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME",
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION",
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "http_proxy", "PYTHONHASHSEED", "TZ", "TERM",
    ])  # fmt: skip
    value = rng.choice(
        ["", "x", "-1", "0", "9" * 400, "nan", "/nonexistent", "/dev/null", "\udcff", "é", "a\nb"]
    )
    if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or rng.random() < 0.3:
        flags = [
            "lora",
            "--model",
            assets.model,
            "--data",
            assets.data,
            "--output_dir",
            folder / "out",
            *TRAIN,
        ]
        flags, program = ["--method", *map(str, flags)], "train.py"
    else:
        flags, program = ["--model", str(assets.model), "--prompt", "x", *DRAW], "sample.py"
    return Case(f"{name}={value[:20]!r}", flags, program, environment={name: value})


def image_index(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """An index with a damaged file, or one whose tar has changed since."""
    data, out = folder / "data", folder / "index"
    data.mkdir()
    with tarfile.open(data / "0.tar", "w") as tar:
        for path in sorted(assets.data.iterdir()):
            tar.add(path, path.name)
    index.make(str(data), out)
    path = rng.choice([data / "0.tar", out / "rows", out / "texts", out / "index.json"])
    content, kind = bytearray(path.read_bytes()), rng.choice(["cut", "byte", "gone", "special", "value"])
    if kind == "value":
        path = out / "index.json"
        header = json.loads(path.read_text())
        name = rng.choice([*header])
        content = json.dumps(header | {name: odd_value(rng)}, indent=2).encode(errors="replace")
    elif kind == "byte":
        content[rng.randrange(min(len(content), 3000))] ^= rng.randrange(1, 256)
    elif kind == "cut":
        content = content[: rng.choice([0, 1, 20, len(content) // 4])]
    path.unlink()
    if kind == "special":
        special(rng.choice(["fifo", "folder", "loop", "device"]), path)
    elif kind != "gone":
        path.write_bytes(content)
    flags = ["lora", "--model", assets.model, "--data", out, "--output_dir", folder / "out", *TRAIN]
    refuse = kind in ("cut", "gone", "special") or (kind == "byte" and path.name == "texts")
    return Case(f"{path.name}: {kind}", ["--method", *map(str, flags)], "train.py", refuse, leaves=True)


def own_reward(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """A reward that is none, or does anything but return a number for each image."""
    body = rng.choice([
        "return [float('nan')] * 2", "return [1]", "return iter(float, None)", "raise SystemExit(0)",
        "return reward(images, prompts)", "return None", "return [10**400] * 2", "return [[1, 2]] * 2",
        "exit()", "raise MemoryError", "return images", "return {}", "raise StopIteration",
    ])  # fmt: skip
    name, source = folder / "mine.py", f"def reward(images, prompts):\n    {body}\n"
    source = rng.choice([source] * 4 + ["reward = 5", "x = 1", "exit()", "def (", "\0", "import nowhere"])
    name.write_text(source)
    flags = ["--model", assets.model, "--reward", name, "--prompt", "x", "--output_dir", folder / "out"]
    flags += ["--ddim_steps", 1, "--learned_steps", 1, "--images_per_prompt", 2, *TRAIN]
    what = f"reward: {source.strip()[-60:]!r}"
    return Case(what, ["--method", "reward", *map(str, flags)], "train.py", refuse=True, leaves=True)


KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = {
    "files mixed up": mixed_up,
    "tokenizers": tokenizer,
    "names of LoRAs": lora_name,
    "environments": environment,
    "indices": image_index,
    "rewards": own_reward,
}
