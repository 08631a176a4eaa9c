"""Kills training runs with SIGKILL at random moments and lets them go on: run by test_kill.py.

    python kill_runs.py MODEL DATA FOLDER COUNT

Each run is a fork of this process, which has imported everything and computed nothing: so a run lasts as long
as its training, not as long as its imports. Prints a line of JSON with what it saw.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from minisd import cli, registry
from minisd.methods import textual_inversion  # noqa: F401  imported before the forks, like the next
from minisd.training import loop
from minisd.training.distributed import device
from minisd.training.run_folder import RunFolder

STEPS = 6


def train(model: str, data: str, out: Path, resume: bool) -> None:
    argv = ["--method", "textual_inversion", "--model", model, "--data", data, "--output_dir", str(out)]
    argv += ["--max_train_steps", str(STEPS), "--resolution", "32", "--train_batch_size", "2"]
    argv += ["--learning_rate", "1e-2", "--checkpointing_steps", "1", "--checkpoints_total_limit", "3"]
    argv += ["--save_steps", "1", "--report_to", "none", "--num_validation_images", "1"]
    argv += ["--resume_from_checkpoint", "latest"] if resume else []
    name, options = cli.parse_train(argv)
    method = registry.load_class("methods", name)(options, device())
    loop.train(method, RunFolder(name, options))


def fork(*args, silent: bool = True) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if silent:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
        try:
            train(*args)
            os._exit(0)
        except BaseException as e:
            print(repr(e), file=sys.stderr)
            os._exit(1)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(out: Path) -> dict[str, bytes]:
    """What a finished run leaves."""
    names = [
        "learned_embeds.safetensors",
        f"checkpoint-{STEPS}/optimizer.safetensors",
        "log.jsonl",
        "result.png",
    ]
    return {name: (out / name).read_bytes() for name in names}


def main(model: str, data: str, folder: str, count: str) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    begun = time.monotonic()
    whole = Path(folder) / "whole"
    assert wait(fork(model, data, whole, False)) == 0, "the run that nobody kills failed"
    duration = time.monotonic() - begun
    expected = result(whole)
    killed_at, killed, failures = [], 0, []
    for i in range(int(count)):
        out = Path(folder) / f"run-{i}"
        pid = fork(model, data, out, False)
        # Some way into a random update, whatever the machine's speed at the moment.
        update = rng.randrange(STEPS)
        while update and not (out / f"checkpoint-{update}").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.5) * duration / STEPS if update else rng.uniform(0, 0.5) * duration)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        killed += wait(pid) == -signal.SIGKILL
        found = [int(p.name[11:]) for p in out.glob("checkpoint-*") if p.name[11:].isdigit()]
        killed_at.append(max(found, default=0))
        if (status := wait(fork(model, data, out, True, silent=False))) != 0:
            failures.append(f"run {i}, killed after update {killed_at[-1]}, did not go on: status {status}")
        elif different := [name for name, content in result(out).items() if content != expected[name]]:
            failures.append(f"run {i}, killed after update {killed_at[-1]}, ended differently: {different}")
        failures += [f"run {i} left {p}" for p in out.rglob("*.tmp")]
    print(json.dumps({"killed": killed, "at": killed_at, "failures": failures, "seconds": duration}))


if __name__ == "__main__":
    main(*sys.argv[1:])
