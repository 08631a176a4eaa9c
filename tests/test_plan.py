"""--plan: what an update will take, and the flags that make it fit."""

import re
import shutil
import types

import pytest

from minisd import testing
from minisd.options import TINY
from minisd.training import plan
from tests import plan_cost

FLAGS = ["--method", "text_to_image", "--data", plan_cost.CAT, "--center_crop"]


@pytest.mark.parametrize(
    "name, flags",
    [
        ("text_to_image", ["--gradient_accumulation_steps", 3, "--gradient_checkpointing", "--use_ema"]),
        ("lora", ["--mixed_precision", "bf16", "--no-cache_latents", "--train_batch_size", 4]),
    ],
)
def test_the_plan_is_what_a_run_takes(tmp_path, name, flags):
    given = ["--data", plan_cost.CAT, "--center_crop", "--output_dir", tmp_path / "out", *flags]
    planned, measured = plan_cost.compare(name, *given)
    assert planned.peak.total() == pytest.approx(measured, rel=0.05)
    assert planned.peak["weights"] > 0 and planned.flops > 0


@pytest.mark.slow
def test_the_plans_of_larger_networks(tmp_path):
    plan_cost.make(tmp_path / "model")
    for name in plan_cost.CONFIGURATIONS:
        planned, measured = plan_cost.compare_larger(name, tmp_path / "model")
        assert planned.peak.total() == pytest.approx(measured, rel=0.1), name


def test_what_fits(tmp_path, command, monkeypatch):
    """The first flags that fit are named, with what they take; nothing is trained or written."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("train.py", *FLAGS, "--train_batch_size", 8, "--plan", "--memory", "150MB")
    assert status == 0 and not [*tmp_path.iterdir()]
    first, tried, last = [line for line in out.splitlines() if "GB" in line or "fits" in line]
    flags = "--train_batch_size 4 --gradient_accumulation_steps 2"
    assert first.startswith("these flags: 0.1") and tried.startswith(f"{flags}: 0.1")
    assert last == f"fits into 150MB: {flags}"


@pytest.mark.parametrize(
    "limit, fits",
    [
        (100, ""),
        (70, "--mixed_precision bf16"),
        (60, "--mixed_precision bf16 --use_8bit_adam"),
        (45, "--mixed_precision bf16 --train_batch_size 4 --gradient_accumulation_steps 2"),
        (23, "--use_8bit_adam --train_batch_size 1 --gradient_accumulation_steps 8"),
        (15, "--train_batch_size 2 --gradient_accumulation_steps 4 --mixed_precision bf16 --use_8bit_adam "
             "--gradient_checkpointing"),
    ],
)  # fmt: skip
def test_the_cheapest_that_fits(capsys, monkeypatch, limit, fits):
    """Flags are added by what they cost, until it fits, and then those that are not needed go again."""

    def trace(kind, o, read, gpu):
        meter, activations = plan.Meter(), 10 * o.train_batch_size
        activations *= 0.6 if o.mixed_precision == "bf16" else 1
        activations *= 0.2 if o.gradient_checkpointing else 1
        meter.peak.update(weights=10, optimizer=2 if o.use_8bit_adam else 10, activations=activations)
        return meter

    monkeypatch.setattr(plan, "trace", trace)
    monkeypatch.setattr(plan, "bytes_in", float)
    o = testing.options("text_to_image", "--data", plan_cost.CAT, "--train_batch_size", 8, "--device", "cuda")
    o.memory = str(limit)
    plan.report(lambda o, device: types.SimpleNamespace(read=None), o)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"fits into {limit}: {fits}" if fits else last.startswith("these flags")


def test_it_needs_no_weights_and_no_gpu(tmp_path, command):
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    gpu = ["--device", "cuda", "--resolution", 64]
    outs = [
        command("train.py", *FLAGS, *gpu, "--model", model, "--plan", "--memory", "8 gb")
        for model in (tmp_path / "model", TINY)
    ]
    figures = [re.findall(r"\d+\.\d+", out) for _, out, _ in outs]
    assert figures[0] == figures[1] and len(figures[0]) == 7


def test_class_images_need_not_be_there(tmp_path):
    flags = ["--data", plan_cost.CAT, "--center_crop", "--instance_prompt", "a", "--train_batch_size", 2]
    prior = ["--with_prior_preservation", "--class_prompt", "b", "--class_data_dir", tmp_path / "none"]
    alone, both = (plan_cost.planned("dreambooth", *flags, *more) for more in ([], prior))
    assert both.flops == pytest.approx(2 * alone.flops, rel=0.01)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--plan", "--memory", "lots"], "--memory must be an amount such as 8GB or 800MB"),
        (["--plan", "--memory", "0GB"], "--memory must be an amount"),
        (["--memory", "8GB"], "--memory needs --plan"),
        (["--plan", "--memory", "1MB"], "--memory 1MB is too little: the least is 0."),
    ],
)
def test_a_wrong_amount_is_one_line(command, flags, said):
    least = ["--train_batch_size", 1, "--gradient_checkpointing", "--mixed_precision", "bf16"]
    status, _, err = command("train.py", *FLAGS, *least, *flags)
    assert status == 2 and said in err.splitlines()[-1]


def test_eight_bits():
    """A quarter of the state, and a hundredth for the blocks."""
    flags = ["--data", plan_cost.CAT, "--center_crop"]
    full, small = (
        plan_cost.planned("text_to_image", *flags, *more).peak["optimizer"]
        for more in ([], ["--use_8bit_adam"])
    )
    assert 0.25 < small / full < 0.3
