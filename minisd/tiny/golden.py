"""Golden pictures: what the small model draws with each scheduler, and after two updates by each method.

    python -m minisd.tiny.golden              compare with golden.json; exit status 1 if one is another
    python -m minisd.tiny.golden euler lora   these alone
    python -m minisd.tiny.golden --write      write golden.json anew, after a change that is meant

The same command gives the same bytes only on one kind of CPU with one version of torch. So what is kept of a
picture is the mean of each 8x8 pixels, and in no cell may it be further away than BOUND. Another order of
sums changes it by 1 or less, other arithmetic (a sign, a timestep, a forgotten factor) by tens.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from minisd import cli, files, registry, testing
from minisd.data import images
from minisd.methods._base import Method
from minisd.options import TINY
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank
from minisd.tiny.data import Folder
from minisd.tiny.pictures import on, silhouette
from minisd.tiny.trial import called
from minisd.training.distributed import Processes
from minisd.training.loop import micro_batches
from minisd.training.step import Trainer

PATH = TINY / "golden.json"
CELLS, BOUND = 8, 3  # along a side; of 255
STEPS = 6
WORD = "<thing>"
PROMPT = called("3d", "cat", "blue")
STEADY = ["--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--device", "cpu"]

# Of each method, what it needs besides the pictures.
FLAGS = {
    "textual_inversion": [
        "--placeholder_token",
        WORD,
        "--initializer_token",
        "cat",
        "--learning_rate",
        "0.05",
    ],
    "dreambooth": ["--instance_prompt", PROMPT],
    "lora": ["--learning_rate", "0.01"],
    "lcm": ["--learning_rate", "0.01"],
    "dpo": ["--learning_rate", "0.01"],
    "custom_diffusion": ["--instance_prompt", called("3d", WORD), "--modifier_token", WORD]
    + ["--initializer_token", "cat", "--learning_rate", "0.01"],
    "erase": ["--erase", PROMPT, "--learning_rate", "0.001"],
    "sliders": ["--target_prompt", PROMPT, "--positive_prompt", called("3d", "cat", "red")]
    + ["--negative_prompt", PROMPT, "--learning_rate", "0.01"],
    "reward": ["--reward", str(TINY / "redness.py"), "--prompt", PROMPT, "--learning_rate", "0.01"]
    + ["--images_per_prompt", "2"],
    "unconditional": ["--model_config_name_or_path", str(TINY / "unconditional"), "--resolution", "32"]
    + ["--ddpm_num_inference_steps", str(STEPS), "--eval_batch_size", "1", "--learning_rate", "0.001"],
}


def scheduler_pictures(names: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """What each scheduler draws in STEPS steps."""
    sd = StableDiffusion.load(TINY)
    for name in names:
        settings = Settings(steps=STEPS, guidance_scale=3, scheduler=name, width=64, height=64)
        yield name, next(iter(pictures(sd, [PROMPT], [0], settings)))


def method_pictures(names: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """What each method draws after two updates, on four pictures that have the columns of all methods."""
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "data")
        for name in names:
            yield name, DRAWN.get(name, sampled)(trained(name, data, Path(folder) / name))


def write(folder: Path) -> Path:
    """Four things in several styles, with captions and edits."""
    tiles, rows = bank.read(), Folder(folder)
    for name in ("cat", "camel", "house", "fish"):
        thing, flat = tiles[name, "3d"], on(tiles[name, "flat"])
        columns = {"": on(thing), "rejected_image": flat, "conditioning_image": silhouette(thing)}
        columns |= {"input_image": on(thing), "edited_image": flat}
        rows.add(columns, text=called("3d", WORD), edit_prompt="make it flat")
    rows.close()
    return folder


def trained(name: str, data: Path, folder: Path) -> Method:
    """A method after two updates in this process."""
    given = ["--data", data] if "data" in cli.names_of(cli.options_of(name)) else []
    flags = [*STEADY, *given, "--output_dir", folder, *FLAGS.get(name, [])]
    method = testing.new(name, testing.options(name, *flags, num_validation_images=1))
    method.preview_steps = STEPS
    method.read()
    torch.manual_seed(0)
    method.prepare()
    trained = method.setup()
    dataset, _ = method.datasets()
    trainer = Trainer(method, trained, len(dataset), Processes())
    updates = micro_batches(trainer, dataset)
    for _ in range(trainer.total):
        trainer.update(updates)
    return method


def sampled(method: Method) -> Image.Image:
    """An image for a prompt that is trained on, by what has been trained."""
    return method.samples(*method.training_prompts()[0])[0]


def reconstructed(method: Method) -> Image.Image:
    """An image that is trained on, from its latents."""
    mean, _ = method.sd.encode_images(method.sample_pixels(1))
    return images.to_pil(method.sd.decode(mean)[0])


DRAWN: dict[str, Callable[[Method], Image.Image]] = {
    "autoencoder": reconstructed, "unconditional": lambda method: method.preview()
}  # fmt: skip
KINDS = {"schedulers": scheduler_pictures, "methods": method_pictures}


def cells(image: Image.Image) -> bytes:
    """The means of an image's cells, by rows, red, green and blue of each."""
    return image.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()


def distance(one: bytes, other: bytes) -> int:
    """How far apart two pictures are in the cell where they are furthest, of 255."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def distances(kind: str, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Of each scheduler, or method, how far its picture is from the golden one; 255 if there is none."""
    known = json.loads(PATH.read_text())[kind]
    for name, image in KINDS[kind](names):
        yield name, distance(cells(image), bytes.fromhex(known[name])) if name in known else 255


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.tiny.golden", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="schedulers and methods; by default all")
    parser.add_argument("--write", action="store_true", help="write golden.json anew")
    o = parser.parse_args()
    kinds = {kind: [n for n in registry.names(kind) if n in (o.names or [n])] for kind in KINDS}
    if wrong := set(o.names) - set().union(*kinds.values()):
        raise ValueError(f"no scheduler or method {', '.join(sorted(wrong))}")
    registry.admit(str(TINY / "redness.py"))
    if o.write:
        known = json.loads(PATH.read_text()) if PATH.exists() else dict.fromkeys(KINDS, {})
        for kind, names in kinds.items():
            kept = {n: v for n, v in known[kind].items() if n in registry.names(kind)}
            drawn = {name: cells(image).hex() for name, image in KINDS[kind](names)}
            known[kind] = dict(sorted((kept | drawn).items()))
        files.write_text(PATH, json.dumps(known, indent=1) + "\n")
        return 0
    worst = 0
    for kind, names in kinds.items():
        for name, far in distances(kind, names):
            print(f"{kind} {name}: {far} of {BOUND}", flush=True)
            worst = max(worst, far)
    return int(worst > BOUND)


if __name__ == "__main__":
    cli.run("minisd.tiny.golden", main)
