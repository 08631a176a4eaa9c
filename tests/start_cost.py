"""What starting a run costs as its data grows, from the start of the process to its first update.

    python tests/start_cost.py                             1,000, 10,000 and 100,000 images of 1024x1024
    python tests/start_cost.py --counts 1000 --rounds 5    fewer images, the median of more rounds
    python tests/start_cost.py --layouts index --counts 10000 10000000
    python tests/start_cost.py --scripts diffusers/examples    beside diffusers' script, from jsonl

The images are hard links to four JPEGs in a temporary folder, with captions in metadata.jsonl, beside them in
.txt files, or in the names of folders as kohya's scripts read them. The first start reads all headers, with
nothing remembered; the second finds what the first has remembered. Each is a process of its own, in which the
tiny model trains at 64 pixels and ends before its first update. CPU time is that of the process and of those
that it started. The rows of an index are those of a tar with four images, over and over, in shards of 1,000.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import cost_methods  # noqa: E402

PART = 1_000_000  # rows that are written at a time
LAYOUTS = ("jsonl", "txt", "kohya", "index")


def make(folder: Path, count: int, layout: str) -> None:
    """A folder of `count` images."""
    from PIL import Image

    originals = folder.parent / "originals"
    originals.mkdir(exist_ok=True)
    if layout == "index":
        return make_index(folder, count)
    folder.mkdir()
    inside = folder / "2_thing" if layout == "kohya" else folder
    inside.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        original = originals / f"{i % 4}-{i // 200_000}.jpg"  # a file has at most 65,000 links
        if not original.exists():
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC).save(original, quality=90)
        os.link(original, inside / f"{i:07}.jpg")
        rows.append({"file_name": f"{i:07}.jpg", "text": f"a photo of thing number {i} on a table"})
        if layout == "txt":
            (folder / f"{i:07}.txt").write_text(rows[-1]["text"])
    if layout == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_index(folder: Path, count: int) -> None:
    """An index of `count` rows."""
    from minisd import files
    from minisd.data import index

    plain = folder.parent / f"{folder.name}-images"
    make(plain, 4, "txt")
    tar = plain / "tar" / "0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for path in sorted(plain.glob("*.*")):
            file.add(path, path.name)
    records, _ = index.make(str(tar.parent), folder)
    rows, texts = (np.array(part) for part in (records.table.rows, records.table.texts))
    with open(folder / "rows", "wb") as rows_file, open(folder / "texts", "wb") as texts_file:
        for start in range(0, count, PART):
            turns = min(PART, count - start) // 4
            more = np.tile(rows, turns)
            more["texts"] += np.repeat(np.arange(turns, dtype=np.uint64) + start // 4, 4) * len(texts)
            rows_file.write(more.tobytes())
            texts_file.write(np.tile(texts, turns).tobytes())
    shards = [{"path": "0.tar", "rows": min(1000, count - start)} for start in range(0, count, 1000)]
    header = records.table.header | {"shards": shards, "lanes": index.default_lanes(len(shards))}
    files.write_json(folder / "index.json", header | {"captions": count})


def measure(folder: Path, begun: float) -> dict[str, float]:
    """Start in this process, which began at the time `begun`."""
    from minisd import __main__ as main
    from minisd import cli
    from minisd.training.step import Trainer

    class Arrived(BaseException):
        """The first batch is there."""

    def arrive(trainer, batches):
        next(batches)
        raise Arrived

    Trainer.update = arrive
    flags = ["--method", "text_to_image", "--data", str(folder), "--resolution", "64", "--no-cache_latents"]
    flags += ["--train_batch_size", "4", "--num_validation_images", "1"]
    with tempfile.TemporaryDirectory() as out:
        sys.argv = ["train.py", *flags, "--output_dir", f"{out}/run", "--report_to", "none"]
        cli.keep_memory()
        try:
            main.train()
        except Arrived:
            seconds = time.time() - begun
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in usage)
    return {"s": seconds, "cpu s": cpu, "MB": usage[0].ru_maxrss / 1024}


def start(folder: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling the sources is not measured
    environment["BEGUN"] = str(time.time())
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def save_tiny(folder: Path) -> None:
    """The tiny model in fp32, as diffusers' script trains no other."""
    import torch

    from minisd.options import TINY
    from minisd.sampling.stable_diffusion import StableDiffusion

    StableDiffusion.load(TINY, dtype=torch.float32).save(folder)


def start_script(script: Path, folder: Path, cache: Path, model: Path) -> dict[str, float]:
    """The same of diffusers' script."""
    os.environ["HF_HOME"] = str(cache)
    flags = {"pretrained_model_name_or_path": model, "train_data_dir": folder, "resolution": 64}
    flags |= {"train_batch_size": 4, "max_train_steps": 2, "output_dir": folder.parent / "out"}
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]
    found = cost_methods.measure("Steps", command, folder.parent, steps=2, skip=1)
    return {"s": found["start"], "MB": found["peak"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["jsonl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scripts", type=Path, help="the folder examples of diffusers")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, float(os.environ["BEGUN"]))))
        return
    columns = "s, CPU s, MB"
    print(f"| images | first start: {columns} | second start: {columns} |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        starts = {"": start}
        if args.scripts:
            script = (args.scripts / cost_methods.METHODS["text_to_image"][0]).resolve()
            save_tiny(Path(name) / "model")
            starts[", diffusers"] = functools.partial(start_script, script, model=Path(name) / "model")
        for layout in args.layouts:
            for count in args.counts:
                folder = Path(name) / f"{layout}-{count}"
                make(folder, count, layout)
                start(folder, Path(name) / "unused")
                for tool, begin in starts.items():
                    seen = []
                    for number in range(args.rounds):
                        cache = Path(name) / f"cache-{layout}-{count}-{number}{tool}"
                        seen.append([begin(folder, cache=cache), begin(folder, cache=cache)])
                    cells = [f"{count:,}, {layout}{tool}"]
                    for runs in zip(*seen, strict=True):
                        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                        cells.append(
                            ", ".join(f"{v:.0f}" if k == "MB" else f"{v:.1f}" for k, v in median.items())
                        )
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
