"""Two processes on one machine train what one process trains with twice the batch."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minisd.training import averaging, distributed
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
    flags += ["--num_validation_images", 3]
    flags += ["--validation_split", 2] if method == "text_to_image" else []
    flags += ["--center_crop", "--lr_scheduler", "linear", "--lr_warmup_steps", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(method, options(method, *flags, "--train_batch_size", 2, "--output_dir", one)) == 0
    done = start("--method", method, *flags, "--train_batch_size", 1, "--output_dir", two)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters train") == 1  # one of them speaks
    with pytest.raises(ValueError, match="16 images in 4 updates, which are of 2 images here: start as many"):
        alone = "--train_batch_size", 1, "--resume_from_checkpoint", "latest", "--output_dir", two
        train(method, options(method, *flags, *alone))
    with pytest.raises(ValueError, match="--reduce_dtype is for several processes"):
        train(method, options(method, *flags, "--reduce_dtype", "bf16", "--output_dir", tmp_path / "none"))
    # Nor does AdamW mind a factor in all gradients, so their norms are compared.
    logs = [list(map(json.loads, (out / "log.jsonl").open())) for out in (one, two)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    shared = "grad_norm", "validation_loss"  # the processes share the held-out examples
    ours, theirs = ([line[k] for line in log for k in shared if k in line] for log in logs)
    assert theirs == pytest.approx(ours, rel=0.02) and len(ours) == (5 if method == "text_to_image" else 4)
    # And the images.
    first, second = (np.array(Image.open(out / "validation" / "step-000000.png"), int) for out in (one, two))
    assert abs(first - second).max() <= 2 and first.std() > 5
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
    monkeypatch.setattr(averaging, "BUCKET", 100)
    sizes = [10, 10, 5, 100, 1, 2, 22, 25]
    tensors = [torch.zeros(n, dtype=torch.float64 if n == 2 else torch.float32) for n in sizes]
    found = list(averaging.buckets(tensors))
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert [[len(t) for t in bucket] for bucket in found] == [[10, 10, 5], [100], [1], [2], [22], [25]]
    assert not list(averaging.buckets([]))


def averaged(rank: int) -> None:
    """In one of two processes, what two updates leave as gradients, in fp32 and in bf16."""
    processes, loss = distributed.Processes(), torch.tensor(float(rank))
    assert processes.share(range(5), lambda own: [10 * i for i in own]) == [0, 10, 20, 30, 40]
    assert processes.share(["one"], lambda own: [*own] if own else 1 / 0) == ["one"]
    averaging.BUCKET = 4 * 40
    for dtype in (torch.float32, torch.bfloat16):
        names = ["first", "strided", "some", "none", "last"]
        parameters = [torch.nn.Parameter(torch.ones(2, 3, 1, 4)) for _ in names]
        parameters[1].data = parameters[1].data.contiguous(memory_format=torch.channels_last)
        means, sent = averaging.Averaging(parameters, processes, dtype), []
        count = functools.partial(lambda sent, means, p: sent.append(len(means.sent)), sent, means)
        parameters[0].register_post_accumulate_grad_hook(count)
        without = ["none"] if rank else ["none", "some"]
        for update in range(2):
            for p in parameters:
                p.grad = None
            draw = torch.Generator().manual_seed(10 * update + rank)
            made = {n: torch.randn(2, 3, 1, 4, generator=draw) for n in names if n not in without}
            for passed in range(2):
                if passed:
                    means.begin()
                x = torch.ones(())
                for n, p in zip(names, parameters, strict=True):
                    x = x * 1.0 + (p * made[n]).sum() if n in made else x  # the first comes last in backward
                x.backward()
            assert means.finish(loss).item() == 0.5
        everyone = processes.gather(made)
        for n, p in zip(names, parameters, strict=True):
            parts = [2 * theirs[n] for theirs in everyone if n in theirs]
            assert (p.grad is None) == (not parts)
            if parts:
                assert torch.equal(p.grad, sum(part.to(dtype) for part in parts).float() / 2), n
                assert p.grad.stride() == p.stride()
        # Not before the last backward pass of an update, nor in the first one, which shows the order.
        assert sent[:3] == [0, 0, 0] and sent[3] >= 1, sent
    processes.close()


def test_gradients_are_averaged_while_backward_runs(tmp_path):
    """The means are exact, and have the strides of their parameters; a parameter without a gradient in one
    process counts as 0 there, and one without any keeps none."""
    code = "import sys; from tests.test_distributed import averaged; averaged(int(sys.argv[1]))"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = ENV | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=env | {"RANK": str(rank)}, cwd=ROOT)
        for rank in range(2)
    ]
    assert [p.wait(timeout=120) for p in both] == [0, 0]


@pytest.mark.slow
def test_averaging_in_buckets_takes_a_third(capsys):
    """And during the backward pass, less than after it."""
    done = subprocess.run(
        [*TWO, str(ROOT / "tests" / "bucket_cost.py")], capture_output=True, text=True, env=ENV, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(seen)
    seconds = seen["after backward"]
    assert 30 < seen["MB"] < 40 and seconds["after"] < seconds["tensors"] / 3
    assert seconds["during"] < seconds["after"]
