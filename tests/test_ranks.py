"""Processes that train together and one of them is stopped, killed, on a machine that differs, or started
wrongly: each case ends within a minute."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LIMIT = 60  # seconds
# train.py, for which a process is lost after 9 seconds instead of 30
TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from minisd import cli
from minisd.training import distributed
distributed.BEAT = 0.6
cli.run("train.py", train.main)
"""
RESUME = "--resume_from_checkpoint", "latest"
RESULTS = "learned_embeds.safetensors", "log.jsonl", "result.png", "checkpoint-6/optimizer.safetensors"


@pytest.fixture
def flags(model, cat):
    words = ["--method", "textual_inversion", "--model", model, "--data", cat, "--resolution", 32]
    words += ["--train_batch_size", 1, "--checkpointing_steps", 1, "--report_to", "none"]
    words += ["--num_validation_images", 1, "--learning_rate", 1e-2]
    return [str(word) for word in words]


def start(folders: list[Path], flags: list[str], last: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """A process on each of several machines, which have a working folder each and nothing in common. `last`
    are flags of the last one alone."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = ENV | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(folders))}
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": "0"} | env
        command = [sys.executable, "-c", TRAIN, *flags, "--output_dir", "out"]
        command += last if rank == len(folders) - 1 else ()
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=own, cwd=folder, **pipe))
    return processes


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The exit status of each and the last line on stderr. They have to end in time."""
    deadline = time.monotonic() + LIMIT
    try:
        texts = [p.communicate(timeout=deadline - time.monotonic())[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    lines = [text.strip().splitlines()[-1:] for text in texts]
    return [(p.returncode, "".join(line)) for p, line in zip(processes, lines, strict=True)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [tmp_path / "first", tmp_path / "second"]


@pytest.mark.slow
def test_machines_without_a_shared_folder(flags, two):
    """The first one alone has checkpoints. Both say at once that the second one needs a copy, and go on from
    it to the same result as without the interruption."""
    shared = two[0].parent / "shared"
    assert [status for status, _ in ends(start([shared, two[1]], [*flags, "--max_train_steps", "6"]))] == [
        0,
        0,
    ]
    assert [status for status, _ in ends(start(two, [*flags, "--max_train_steps", "3"]))] == [0, 0]
    assert not (two[1] / "out").exists()
    again = [*flags, "--max_train_steps", "6", *RESUME]
    for status, line in ends(start(two, again)):
        assert status == 2 and "process 1 on" in line and "has not the same checkpoint as process 0" in line
    shutil.copytree(two[0] / "out" / "checkpoint-3", two[1] / "out" / "checkpoint-3")
    assert [status for status, _ in ends(start(two, again))] == [0, 0]
    assert results(two[0] / "out") == results(shared / "out")


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["data", "weights", "flags"])
def test_machines_that_differ(flags, two, model, cat, difference):
    """Other data, another model or other flags: refused by both before the first update."""
    for folder in two:
        folder.mkdir()
        shutil.copytree(cat, folder / "cat")
        shutil.copytree(model, folder / "model", symlinks=True)
    if difference == "data":
        (two[1] / "cat" / "0.png").unlink()
    if difference == "weights":
        weights = two[1] / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-4] ^= 1  # the lowest bit of the last value
        weights.write_bytes(content)
    words = [*flags, "--max_train_steps", "2", "--model", "model", "--data", "cat"]
    for status, line in ends(start(two, words, last=("--seed", "1") if difference == "flags" else ())):
        assert status == 2 and f"process 1 on {socket.gethostname()} has not the same {difference} as" in line
    assert not (two[0] / "out" / "checkpoint-1").exists()


def test_a_stopped_process_ends_the_others(flags, two):
    """Within a bounded time, and with its name."""
    first, second = processes = start(two, [*flags, "--max_train_steps", "100000"])
    try:
        wait_for(two[0] / "out" / "checkpoint-3", first)
        os.kill(second.pid, signal.SIGSTOP)
        ((status, line),) = ends([first])
    finally:
        for p in processes:
            p.kill()
    assert status == 1
    assert f"process 1 on {socket.gethostname()} has given no sign of life for 9 seconds" in line


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(flags, tmp_path):
    """And the run ends with the bytes of one that nobody killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "--max_restarts",
        "3",
        "-m",
        "train",
        *flags,
        "--max_train_steps",
        "6",
        *RESUME,
        "--output_dir",
    ]
    whole = subprocess.run([*command, tmp_path / "whole"], env=ENV, capture_output=True, timeout=LIMIT)
    assert whole.returncode == 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launched = subprocess.Popen([*command, tmp_path / "killed"], env=ENV, **quiet)
    try:
        wait_for(tmp_path / "killed" / "checkpoint-2", launched)
        children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        assert launched.wait(timeout=LIMIT) == 0
    finally:
        launched.terminate()
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").open()] == [*range(1, 7)]


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1" * 99},
        {"RANK": "1"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "any"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "65536"},
    ],
    ids=str,
)
def test_nonsense_of_the_launcher(environment, flags, tmp_path, monkeypatch, command):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, _, error = command("train.py", *flags, "--output_dir", tmp_path / "out")
    assert status == 2 and len(error.splitlines()) == 1
    assert [name for name in ("WORLD_SIZE", "RANK", "did not join") if name in error], error
    assert not (tmp_path / "out").exists()


def test_a_store_that_never_answers(monkeypatch, capfd):
    """As torch's does where the killed process 0 has left a worker that holds the connection."""
    from minisd.training import distributed

    class Store:
        asked = 0

        def set(self, key, value):
            pass

        def multi_get(self, keys):
            self.asked += 1
            if self.asked > 3:
                threading.Event().wait()
            return [f"{self.asked} host".encode()] * len(keys)

    monkeypatch.setattr(distributed, "BEAT", 0.01)
    monkeypatch.setattr(distributed, "MISSED", 5)
    processes = distributed.Processes()
    processes.rank, processes.world, statuses = 1, 2, []

    def leave(status):
        statuses.append(status)
        processes.ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    threading.Thread(target=processes._watch, args=[Store()], daemon=True).start()
    processes._guard()
    assert statuses == [1] and processes.heard == 3
    assert "process 0 has not answered" in capfd.readouterr().err
