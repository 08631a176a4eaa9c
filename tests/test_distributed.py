"""Two processes on one machine train what one process trains with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minisd.training import distributed
from tests.conftest import ROOT
from tests.method_helpers import options, train

ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*flags) -> subprocess.CompletedProcess:
    """Run train.py in two processes."""
    command = [*TWO, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-4" / "trained.safetensors")


@pytest.mark.parametrize(
    "method", [pytest.param("textual_inversion", marks=pytest.mark.slow), "text_to_image"]
)
def test_two_processes_equal_one(model, cat, captioned, tmp_path, method):
    flags = ["--model", model, "--data", captioned if method == "text_to_image" else cat]
    flags += ["--resolution", 32, "--max_train_steps", 4, "--gradient_accumulation_steps", 2, "--scale_lr"]
    flags += ["--learning_rate", 1e-3, "--checkpointing_steps", 2, "--report_to", "none"]
    flags += ["--num_validation_images", 1]
    flags += ["--center_crop", "--lr_scheduler", "linear", "--lr_warmup_steps", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(method, options(method, *flags, "--train_batch_size", 2, "--output_dir", one)) == 0
    done = start("--method", method, *flags, "--train_batch_size", 1, "--output_dir", two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters train") == 1  # one of them speaks
    with pytest.raises(ValueError, match="16 images in 4 updates, which are of 2 images here: start as many"):
        alone = "--train_batch_size", 1, "--resume_from_checkpoint", "latest", "--output_dir", two
        train(method, options(method, *flags, *alone))
    # Nor does AdamW mind a factor in all gradients, so their norms are compared.
    logs = ((out / "log.jsonl").read_text().splitlines() for out in (one, two))
    ours, theirs = ([json.loads(line)["grad_norm"] for line in log] for log in logs)
    assert theirs == pytest.approx(ours, rel=0.02)
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    begun = load_file(one / "checkpoint-2" / "trained.safetensors")
    assert any(not torch.equal(a[k], begun[k]) for k in a)
    # AdamW divides by the gradient's own size, so a rounding of a gradient that is nearly nothing counts.
    for name in a:
        moved = (a[name] - begun[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= max(0.02 * moved, 1e-6), name


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_it_goes_on(model, cat, tmp_path):
    flags = ["--method", "textual_inversion", "--model", model, "--data", cat, "--resolution", 32]
    flags += ["--train_batch_size", 1, "--checkpointing_steps", 1, "--report_to", "none"]
    flags += ["--num_validation_images", 1, "--learning_rate", 1e-3, "--output_dir", tmp_path / "out"]
    command = [*TWO, str(ROOT / "train.py"), *map(str, flags), "--max_train_steps", "2000"]
    launched = subprocess.Popen(
        command, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / "out" / "checkpoint-2").exists():
        assert launched.poll() is None
    children = subprocess.run(
        ["pgrep", "-P", str(launched.pid), "-f", "train.py"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), 9)
    _, stderr = launched.communicate(timeout=120)
    assert launched.returncode != 0 and "exitcode  : -9" in stderr
    last = max(int(p.name[11:]) for p in (tmp_path / "out").glob("checkpoint-*"))
    done = start(*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", last + 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / f"checkpoint-{last + 1}").exists()


def test_buckets(monkeypatch):
    """Each tensor is in one, in order; a bucket has one dtype, and at most so many bytes or one tensor."""
    monkeypatch.setattr(distributed, "BUCKET", 100)
    sizes = [10, 10, 5, 100, 1, 2, 22, 25]
    tensors = [torch.zeros(n, dtype=torch.float64 if n == 2 else torch.float32) for n in sizes]
    found = list(distributed.buckets(tensors))
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert [[len(t) for t in bucket] for bucket in found] == [[10, 10, 5], [100], [1], [2], [22], [25]]
    assert not list(distributed.buckets([]))


@pytest.mark.slow
def test_averaging_in_buckets_takes_a_third(capsys):
    done = subprocess.run(
        [*TWO, str(ROOT / "tests" / "bucket_cost.py")], capture_output=True, text=True, env=ENV, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(seen)
    assert 30 < seen["MB"] < 40 and seen["seconds"]["buckets"] < seen["seconds"]["tensors"] / 3
