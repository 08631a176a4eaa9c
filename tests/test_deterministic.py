"""--deterministic takes effect before CUDA starts, and changes no byte on a CPU; on a GPU the same command
gives the same bytes."""

import json
import os

import pytest
import torch
from PIL import Image

from minisd import ops
from minisd.methods._base import Method
from minisd.sampling import infotext
from tests.helpers import mostly_slow
from tests.method_helpers import outputs, same
from tests.test_methods import METHODS, NEEDS
from tests.test_methods import run as train


def settings() -> tuple:
    fixed = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    return fixed, algorithms, torch.backends.cudnn.deterministic, not torch.backends.cudnn.benchmark


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before
    ops.choose("auto")


@pytest.fixture
def states(monkeypatch):
    """The settings at each question for a GPU, which comes before anything else that CUDA is asked for."""
    seen, available = [], torch.cuda.is_available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(settings()) or available())
    return seen


def test_training_is_set_up_before_cuda_starts(command, states, cat, model, tmp_path):
    flags = ["--method", "textual_inversion", "--data", cat, "--model", model, "--resolution", 32]
    flags += ["--max_train_steps", 1, "--report_to", "none", "--output_dir", tmp_path / "out"]
    status, _, stderr = command("train.py", *flags, "--deterministic")
    assert status == 0, stderr
    assert states and all(state == (True,) * 4 for state in states)
    assert json.loads((tmp_path / "out" / "options.json").read_text())["deterministic"] is True
    status, _, stderr = command("train.py", *flags, "--overwrite")
    assert status == 0, stderr
    assert states[-1][1:] == (False, False, False)  # shapes are fixed, so cuDNN searches


def test_sampling_is_set_up_before_cuda_starts(command, states, model, tmp_path):
    flags = ["--model", model, "--prompt", "a cat", "--steps", 2, "--width", 32, "--height", 32]
    for name, more in (("plain", []), ("fixed", ["--deterministic"])):
        states.clear()
        status, _, stderr = command("sample.py", *flags, *more, "--output", tmp_path / f"{name}.png")
        assert status == 0, stderr
    assert states and all(state == (True,) * 4 for state in states)
    plain, fixed = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "fixed"))
    assert plain.tobytes() == fixed.tobytes()
    assert "deterministic: True" in infotext.read(tmp_path / "fixed.png")
    assert "deterministic" not in infotext.read(tmp_path / "plain.png")


def test_auto_goes_by_no_measurement(short_run, monkeypatch):
    chosen = []
    monkeypatch.setattr(ops, "choose", chosen.append)
    for fixed, kernels in ((True, "auto"), (True, "triton"), (False, "auto")):
        Method(short_run("lora", deterministic=fixed, kernels=kernels), torch.device("cpu"))
    assert chosen == ["torch", "triton", "auto"]


@pytest.mark.parametrize("bucket", [False, True])
def test_cudnn_searches_where_shapes_are_fixed(short_run, bucket):
    Method(short_run("lora", bucket=bucket), torch.device("cpu"))
    assert torch.backends.cudnn.benchmark is not bucket


def test_a_run_keeps_to_it(short_run):
    o = short_run("textual_inversion", "--checkpointing_steps", 1, deterministic=True)
    assert train("textual_inversion", o) == 0
    o = short_run("textual_inversion", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="--deterministic was True"):
        train("textual_inversion", o)


@pytest.mark.parametrize("method", mostly_slow(METHODS, "lora", "text_to_image", "unconditional"))
def test_it_changes_no_byte_on_a_cpu(method, short_run, tmp_path):
    for name in ("plain", "fixed"):
        o = short_run(
            method, *NEEDS.get(method, []), deterministic=name == "fixed", output_dir=tmp_path / name
        )
        assert train(method, o) == 0
    same(outputs(tmp_path / "plain"), outputs(tmp_path / "fixed"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_gives_the_same_bytes(method, kernels, precision, script, short_run, tmp_path):
    """Twice, and in two parts; each in a process of its own."""
    o = short_run(method, *NEEDS.get(method, []))
    flags = [
        "--method",
        method,
        *(["--data", o.data] if hasattr(o, "data") else []),
        "--resolution",
        32,
        "--train_batch_size",
        2,
        "--report_to",
        "none",
    ]
    flags += ["--model_config_name_or_path", o.model_config_name_or_path] if method == "unconditional" else []
    flags += [] if method == "unconditional" else ["--model", o.model, "--num_validation_images", 1]
    flags += [*NEEDS.get(method, []), "--deterministic", "--kernels", kernels, "--mixed_precision", precision]

    def run(name: str, *more) -> dict:
        folder = "--checkpointing_steps", 2, "--output_dir", tmp_path / name
        status, _, stderr = script("train.py", *flags, *folder, *more)
        assert status == 0, stderr
        return outputs(tmp_path / name)

    whole = run("whole", "--max_train_steps", 4)
    same(whole, run("again", "--max_train_steps", 4))
    run("parts", "--max_train_steps", 2)
    same(whole, run("parts", "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    drawn = [(tmp_path / name / "result.png").read_bytes() for name in ("whole", "again", "parts")]
    assert drawn[0] == drawn[1] == drawn[2]
