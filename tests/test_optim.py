"""The optimizer beside torch's own."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minisd import cli, files, registry
from minisd.options import TINY
from minisd.training import optim
from tests.conftest import ROOT
from tests.method_helpers import train

NEW = "files", "sha256", "conditions"  # what a checkpoint's state.json of an earlier version has not
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters():
    torch.manual_seed(0)
    plain = [torch.randn(4, 4, 3, 3), torch.randn(5), torch.randn(5, 3).t(), torch.randn(2)]
    plain[0] = plain[0].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(p) for p in plain]


def moved(kind, count, state=None):
    """Parameters and state after `count` more updates. The last parameter never has a gradient, the second
    one every other time."""
    ps = parameters()
    optimizer = kind(ps, **SETTINGS)
    first = 0
    if state:
        first = int(state[1][0]["step"])
        for i, slot in state[1].items():
            if kind is optim.AdamW:
                for key, value in optimizer.slot(ps[i]).items():
                    value.copy_(slot[key])
            else:
                optimizer.state[ps[i]] = slot
        with torch.no_grad():
            for p, value in zip(ps, state[0], strict=True):
                p.copy_(value)
    for i in range(first, first + count):
        torch.manual_seed(i)
        for j, p in enumerate(ps[:-1]):
            p.grad = torch.randn(p.shape) if j != 1 or i % 2 else None
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i)
        optimizer.step()
    state = {i: optimizer.state[p] for i, p in enumerate(ps) if p in optimizer.state}
    return [p.detach().clone() for p in ps], state


def test_it_is_torch_s():
    """Its values to rounding, its state by its names; either goes on from the other's."""
    ours, theirs = moved(optim.AdamW, 6), moved(torch.optim.AdamW, 6)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert ours[1].keys() == theirs[1].keys() == {0, 1, 2}
    for i, slot in theirs[1].items():
        assert ours[1][i].keys() == slot.keys()
        assert all(torch.allclose(ours[1][i][k], v, rtol=1e-5, atol=1e-8) for k, v in slot.items())
    for first, second in ((optim.AdamW, torch.optim.AdamW), (torch.optim.AdamW, optim.AdamW)):
        for a, b in zip(moved(second, 2, moved(first, 4))[0], theirs[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [1.0, 100.0, 0.0])
def test_clipping_is_torch_s(max_norm):
    """Which is a step before the optimizer's, and here a part of it."""
    pairs = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        ps = parameters()
        optimizer = kind(ps, **SETTINGS | {"eps": 1.0})  # so that the size of a gradient counts
        for i in range(3):
            torch.manual_seed(i)
            for p in ps:
                p.grad = torch.randn(p.shape)
            norm = optim.grad_norm(ps)
            assert torch.allclose(norm, torch.cat([p.grad.flatten() for p in ps]).norm(), rtol=1e-6)
            if kind is optim.AdamW:
                optimizer.step(optim.clip_divisor(norm, max_norm))
            else:
                if max_norm:
                    torch.nn.utils.clip_grad_norm_(ps, max_norm)
                optimizer.step()
        pairs.append(ps)
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_compiler_is_not_imported():
    code = """
import sys, torch
from minisd.training import optim
from minisd.adapters.token_embedding import TokenEmbedding
TokenEmbedding.of(torch.nn.Embedding(5, 3), torch.zeros(1, 3))
p = torch.nn.Parameter(torch.ones(3))
o = optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
p.sum().backward(); o.step(optim.clip_divisor(optim.grad_norm([p]), 1.0)); o.zero_grad()
print(p.grad, p[0].item() < 1, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "True", "False"], done.stdout + done.stderr


def resumed_and_whole(short_run, tmp_path, method, *flags):
    """The folders of a run of four updates and of the same with a stop after two, once compared."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    o = short_run(method, "--checkpointing_steps", 2, *flags, max_train_steps=4, output_dir=whole)
    assert train(method, o) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    assert train(method, replace(o, output_dir=parts, resume_from_checkpoint="latest")) == 0
    for name in ("trained", "optimizer"):
        ends = [files.read(folder / "checkpoint-4" / f"{name}.safetensors") for folder in (whole, parts)]
        assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0] | ends[1])
    assert (whole / "log.jsonl").read_text() == (parts / "log.jsonl").read_text()
    return whole


def test_eight_bits_resume(short_run, tmp_path):
    """By bitsandbytes; its state holds a nested table, and a step that is no tensor."""
    pytest.importorskip("bitsandbytes")
    flags = "--instance_prompt", "a cat", "--use_8bit_adam"
    whole = resumed_and_whole(short_run, tmp_path, "dreambooth", *flags)
    end = files.read(whole / "checkpoint-4" / "optimizer.safetensors")
    assert any(v.dtype == torch.uint8 for v in end.values())

    # From a checkpoint of an earlier version, which has neither digests nor the groups' learning rates.
    shutil.rmtree(whole / "checkpoint-4")
    middle = whole / "checkpoint-2"
    state = json.loads((middle / "state.json").read_text())
    (middle / "state.json").write_text(json.dumps({k: state[k] for k in state.keys() - {*NEW}}))
    tensors = files.read(middle / "optimizer.safetensors")
    rates = {k for k in tensors if k[0].isdigit()}
    assert "0|peak" in rates
    files.write(middle / "optimizer.safetensors", {k: v for k, v in tensors.items() if k not in rates})
    resume = {"output_dir": whole, "resume_from_checkpoint": "latest", "max_train_steps": 4}
    o = short_run("dreambooth", "--checkpointing_steps", 2, *flags, **resume)
    assert train("dreambooth", o) == 0
    again = files.read(whole / "checkpoint-4" / "optimizer.safetensors")
    assert all(torch.equal(end[k], again[k]) for k in end | again)


@pytest.mark.parametrize("before, after", [(["--use_8bit_adam"], []), ([], ["--use_8bit_adam"])], ids=str)
def test_a_checkpoint_is_of_one_optimizer(before, after, short_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ["dreambooth", "--instance_prompt", "a cat", "--checkpointing_steps", 1]
    steps = {"max_train_steps": 1, "output_dir": tmp_path / "out"}
    assert train("dreambooth", short_run(*flags, *before, **steps)) == 0
    o = short_run(*flags, *after, **steps, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=f"with other flags .--use_8bit_adam was {bool(before)}.: give the same"
    ):
        train("dreambooth", o)


class Drifting(torch.optim.Optimizer):
    """Keeps in its groups a number that its updates change, as Prodigy does, and counts by a number."""

    def __init__(self, params, lr, slope=1.0):
        super().__init__(params, {"lr": lr, "d": 1.0, "slope": slope, "limit": float("inf")})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                slot = self.state[p]
                slot["count"] = slot.get("count", 0) + 1
                slot["sum"] = slot.get("sum", torch.zeros_like(p)) + p.grad
                group["d"] += group["slope"] * p.grad.abs().mean().item() / 3
                p.data.sub_(slot["sum"] * group["lr"] * group["d"] / slot["count"])


@pytest.mark.parametrize(
    "flags",
    [
        ["torch.optim.SGD", "--optimizer_args", "momentum=0.9", "nesterov=True"],
        ["torch.optim.SGD"],
        ["torch.optim.Adam", "--optimizer_args", "betas=.5,.9", "fused=True"],
        ["transformers.Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
        ["tests.test_optim.Drifting", "--optimizer_args", "slope=0.5"],
    ],
    ids=lambda flags: flags[0] + str(len(flags)),
)
def test_other_optimizers_resume(short_run, tmp_path, flags):
    flags = ["--instance_prompt", "a cat", "--learning_rate", 1e-2, "--use_ema", "--optimizer_type", *flags]
    whole = resumed_and_whole(short_run, tmp_path, "dreambooth", *flags)
    first, last = (files.read(whole / f"checkpoint-{n}" / "trained.safetensors") for n in (2, 4))
    assert any(not torch.equal(first[k], last[k]) for k in first)


def test_plain_sgd_is_torch_s(short_run, tmp_path):
    """With the gradient clipped, and the rate of the schedule."""
    registry.admit("torch.optim.SGD")
    o = replace(short_run("lora", "--instance_prompt", "a cat"), optimizer="torch.optim.SGD")
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.new([p], o)
    p.grad = torch.full((3,), 2.0)
    optimizer.step(optim.clip_divisor(optim.grad_norm([p]), 1.0))
    torch.testing.assert_close(p.detach(), 1 - o.learning_rate * torch.full((3,), 3**-0.5))


def nowhere(cat, folder) -> list:
    """The command line of a run whose model is missing."""
    flags = {"method": "textual_inversion", "data": cat, "model": "nowhere", "output_dir": folder / "o"}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["Prodigy"], "--optimizer Prodigy: give MODULE.CLASS, such as torch.optim.SGD"),
        (["nowhere.Prodigy"], "--optimizer nowhere.Prodigy: No module named 'nowhere'"),
        (["torch.optim.Sgd"], "--optimizer torch.optim.Sgd: module 'torch.optim' has no attribute 'Sgd'"),
        (["torch.nn.Linear"], "--optimizer torch.nn.Linear: it is no torch.optim.Optimizer whose"),
        (["torch.optim.LBFGS"], "--optimizer torch.optim.LBFGS: it is no torch.optim.Optimizer whose"),
        (["torch.optim.SparseAdam"], "it is no torch.optim.Optimizer whose"),
        (["torch.optim.SGD", "--optimizer_args", "momentun=1"], "SGD: .*unexpected keyword .* 'momentun'"),
        (
            ["torch.optim.SGD", "--optimizer_args", "momentum=-1"],
            "torch.optim.SGD: Invalid momentum value: -1",
        ),
        (
            ["torch.optim.SGD", "--optimizer_args", "nesterov=true"],
            "--optimizer_args nesterov=true: give NAME",
        ),
        (["torch.optim.SGD", "--adam_beta1", "0.5"], "--optimizer and --adam_beta1 exclude each other"),
        (["torch.optim.SGD", "--use_8bit_adam"], "--optimizer and --use_8bit_adam exclude each other"),
    ],
)
def test_optimizers_that_are_none(command, cat, tmp_path, flags, message):
    """Before a model is loaded."""
    argv = nowhere(cat, tmp_path)
    status, _, err = command("train.py", *argv, "--optimizer", *flags)
    assert status == 2 and re.search(message, err) and len(err.splitlines()) == 1, err
    status, _, err = command("train.py", *argv, "--optimizer_args", "momentum=1")
    assert status == 2 and "--optimizer_args needs --optimizer" in err


def test_an_optimizer_is_code(command, cat, tmp_path):
    """A file of flags may be a stranger's; but its arguments are none."""
    (tmp_path / "flags.toml").write_text('optimizer = "antigravity.SGD"\noptimizer_args = ["momentum=0.9"]')
    argv = nowhere(cat, tmp_path)
    status, _, err = command("train.py", *argv, "--config", tmp_path / "flags.toml")
    assert status == 2 and "--optimizer antigravity.SGD: it is code, and runs only if the command" in err
    assert "antigravity" not in sys.modules
    status, _, err = command(
        "train.py", *argv, "--config", tmp_path / "flags.toml", "--optimizer", "torch.optim.SGD"
    )
    assert status == 2 and "nowhere" in err


def test_the_tiny_model_s_own_flags_of_adam_give_way():
    _, o = cli.parse_train(["--method", "textual_inversion", "--data", "x", "--optimizer", "torch.optim.SGD"])
    assert o.optimizer == "torch.optim.SGD" and o.model == str(TINY)


# A learning rate for the text encoder


def test_a_learning_rate_for_the_text_encoder(short_run, tmp_path):
    flags = ["--instance_prompt", "a cat", "--train_text_encoder", "--train_batch_size", 1, "--scale_lr"]
    flags += ["--learning_rate", 1e-3, "--text_encoder_lr", 1e-5, "--lr_scheduler", "linear"]
    flags += ["--lr_warmup_steps", 0]
    whole = resumed_and_whole(short_run, tmp_path, "lora", *flags)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in log if "lr" in line] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert all(line["text_encoder_lr"] == pytest.approx(line["lr"] / 100) for line in log if "lr" in line)
    trained = files.read(whole / "checkpoint-2" / "trained.safetensors")
    sizes = {
        part: max(v.abs().max().item() for k, v in trained.items() if k.startswith(part) and "lora_B" in k)
        for part in ("unet.", "text_encoder.")
    }
    assert sizes["text_encoder."] < 2.5e-5 and 5e-4 < sizes["unet."] < 2.5e-3  # Adam's steps are its rate


def test_a_learning_rate_of_its_own_needs_the_text_encoder(short_run):
    for flags, message in (((), "needs --train_text_encoder"), (("--train_text_encoder",), "positive")):
        with pytest.raises(ValueError, match=f"--text_encoder_lr.*{message}"):
            options = short_run("lora", *flags)
            replace(options, text_encoder_lr=-1.0 if flags else 1e-5)
