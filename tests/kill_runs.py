"""Kills training runs with SIGKILL at random moments and lets them go on: run by test_kill.py, or

    python kill_runs.py FOLDER COUNT [KIND ...]

in FOLDER for a campaign of COUNT kills, over all kinds of runs in turn unless some are named. A kind is a
method and a number of processes, such as lora-2; all accumulate gradients, average weights where the method
can, and load images in worker processes; some have their latents on disk. Of two processes a random one is
killed, and the other has to end by itself.

Every file that a run leaves has to be that of a run which nobody killed, byte by byte, with none excepted:
log, options, checkpoints, class images, result. A campaign that is stopped goes on where it was: what it has
seen is in FOLDER/kills.jsonl. Prints a line of JSON with the counts.

Each run is a fork of this process, which has imported everything and computed nothing: so a run lasts as long
as its training, not as long as its imports.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from minisd import cli, registry
from minisd.formats import config_json
from minisd.training import distributed, latents, loop
from minisd.training.run_folder import RunFolder

STEPS, LIMIT = 5, 120  # updates of a run, and seconds within which it has to end
JOIN = timedelta(seconds=30)  # a process waits so long for one that was killed before they met
KINDS = [f"{name}-{world}" for name in registry.names("methods") for world in (1, 2)]
CLASSES = ["--instance_prompt", "a sks cat", "--with_prior_preservation", "--class_data_dir", "class"]
CLASSES += ["--class_prompt", "a cat", "--num_class_images", "5"]
# So the cache is in files, each of one view. Their names depend on the time of an image's file, which class
# images have from their own run.
DISK = ["--latents_memory", "0"]
OWN = {
    "controlnet": ["--data", "pairs"],
    "textual_inversion": ["--data", "cat", *DISK],
    "lora": ["--data", "captioned", "--center_crop", *DISK],
    "lcm": ["--data", "captioned", "--center_crop", *DISK],
    "erase": ["--erase", "a cat", "a dog", "--ddim_steps", "5"],
    "sliders": ["--target_prompt", "a cat", "--positive_prompt", "a big cat", "--negative_prompt", "a cat",
                "--ddim_steps", "5"],
    "reward": ["--reward", "redness.py", "--prompt", "a cat", "a dog", "--ddim_steps", "5",
               "--images_per_prompt", "2"],
    "instruct_pix2pix": ["--data", "pairs"],
    "dpo": ["--data", "pairs", "--rejected_image_column", "source", "--center_crop", *DISK],
    "text_to_image": ["--data", "captioned", "--random_flip", "--center_crop", *DISK],
    "dreambooth": ["--data", "cat", *CLASSES],
    "custom_diffusion": ["--data", "cat", *CLASSES],
    "unconditional": ["--data", "cat", "--model_config_name_or_path", "config.json",
                      "--ddpm_num_inference_steps", "2"],
}  # fmt: skip


def prepare(folder: Path) -> None:
    """A tiny model and data for all methods."""
    from PIL import Image

    from tests.conftest import save_pipeline
    from tests.helpers import TINY_PIXELS
    from tests.method_helpers import make_pairs

    save_pipeline(folder / "model")
    make_pairs(folder / "pairs", 5)
    shutil.copy(registry.HERE / "tiny" / "redness.py", folder)
    for i in range(5):
        picture = Image.effect_noise((48, 40 + 4 * i), 20 * i + 10).convert("RGB")
        for name in ("cat", "captioned"):
            (folder / name).mkdir(exist_ok=True)
            picture.save(folder / name / f"{i}.png")
        (folder / "captioned" / f"{i}.txt").write_text(f"a drawing of cat number {i}")
    config_json.write(folder, "unet2d", TINY_PIXELS)


def train(kind: str, source: Path) -> None:
    """Train in the working folder, as one of the processes that the environment speaks of."""
    name, world = kind.split("-")
    argv = ["--output_dir", "out", "--max_train_steps", str(STEPS), "--resolution", "32"]
    argv += ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"]
    argv += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--report_to", "none"]
    argv += ["--dataloader_num_workers", "1" if world == "2" else "2", "--lr_scheduler", "cosine"]
    argv += ["--resume_from_checkpoint", "latest"]
    flags = cli.names_of(cli.options_of(name))
    argv += ["--use_ema"] if "use_ema" in flags else []
    argv += ["--num_validation_images", "1"] if "num_validation_images" in flags else []
    argv += ["--save_steps", "1"] if "save_steps" in flags else []
    argv += ["--model", str(source / "model")] if name != "unconditional" else []
    # Relative names, and the flag to resume even where nothing is yet: so the recorded options are the same.
    for word in OWN.get(name, ["--data", "cat"]):
        argv.append(str(source / word) if (source / word).exists() else word)
    name, options = cli.parse_train(["--method", name, *argv])
    method = registry.load_class("methods", name)(options, distributed.device())
    loop.train(method, RunFolder(name, options))


def start(kind: str, source: Path, folder: Path) -> list[int]:
    """Fork the processes of a run in a folder of its own. Returns their ids."""
    folder.mkdir(exist_ok=True)
    world, pids = int(kind.split("-")[1]), []
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.chdir(folder)
            log = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
            os.environ["MASTER_PORT"] = str(port)
            try:
                train(kind, source)
                os._exit(0)
            except BaseException as e:
                print(repr(e), file=sys.stderr, flush=True)
                os._exit(1)
    return pids


def wait(pids: list[int]) -> list[int | None]:
    """The exit status of each process; None of one that had to be ended."""
    deadline, statuses = time.monotonic() + LIMIT, []
    for pid in pids:
        while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.005)
        if not done[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        statuses.append(os.waitstatus_to_exitcode(done[1]) if done[0] else None)
    return statuses


def content(folder: Path) -> dict[str, bytes]:
    """All files that a run leaves, hidden ones too."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p != folder / "stderr"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def kill(kind: str, source: Path, folder: Path, rng: random.Random, seconds: float) -> dict:
    """Start a run, kill a process of it some way into a random update, and let it go on to its end. `seconds`
    is what a whole run takes."""
    pids = start(kind, source, folder)
    victim, update, wished = rng.choice(pids), rng.randrange(STEPS), rng.uniform(0, 1)
    deadline = time.monotonic() + LIMIT
    while update and not (folder / "out" / f"checkpoint-{update}").exists():
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    time.sleep(wished * seconds / (STEPS if update else 2))
    os.kill(victim, signal.SIGKILL)  # which is still our child if it has ended by itself
    statuses = wait(pids)
    found = [int(p.name[11:]) for p in folder.glob("out/checkpoint-*") if p.name[11:].isdigit()]
    seen = {"kind": kind, "after": max(found, default=0), "killed": -signal.SIGKILL in statuses}
    if None in statuses:
        return seen | {"failure": f"a process did not end: {statuses}"}
    statuses = wait(start(kind, source, folder))
    if any(statuses):
        return seen | {"failure": f"did not go on: {statuses}: {(folder / 'stderr').read_text()[-500:]}"}
    whole, here = content(folder.parent / kind), content(folder)
    different = sorted(n for n in whole.keys() | here.keys() if whole.get(n) != here.get(n))
    return seen | {"failure": f"ended differently: {different}"} if different else seen | {"files": len(here)}


def main(place: str, count: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    distributed.JOIN, latents.SHARD = JOIN, 1
    folder, kinds = Path(place).resolve(), kinds or tuple(KINDS)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        prepared = os.fork()
        if prepared == 0:
            prepare(folder)
            os._exit(0)
        os.waitpid(prepared, 0)
    for name in registry.names("methods"):
        registry.load_class("methods", name)
    record, durations = folder / "kills.jsonl", {}
    record.touch()
    for number in range(len(record.read_text().splitlines()), int(count)):
        kind, run = kinds[number % len(kinds)], folder / f"run-{number}"
        if kind not in durations:  # the run that nobody kills
            shutil.rmtree(folder / kind, ignore_errors=True)
            begun = time.monotonic()
            statuses = wait(start(kind, folder, folder / kind))
            assert not any(statuses), (kind, (folder / kind / "stderr").read_text())
            durations[kind] = time.monotonic() - begun
        shutil.rmtree(run, ignore_errors=True)
        seen = kill(kind, folder, run, random.Random(number), durations[kind])
        with record.open("a") as file:
            file.write(json.dumps(seen) + "\n")
        if "failure" not in seen:
            shutil.rmtree(run)
    seen = [json.loads(line) for line in record.read_text().splitlines()]
    failures = [s for s in seen if "failure" in s]
    report = {
        "kills": len(seen),
        "killed": sum(s["killed"] for s in seen),
        "kinds": len({s["kind"] for s in seen}),
    }
    print(json.dumps(report | {"moments": len({s["after"] for s in seen}), "failures": failures}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(*sys.argv[1:])
