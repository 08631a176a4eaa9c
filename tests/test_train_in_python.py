"""minisd.train: what train.py does, in a program that goes on afterwards."""

import json
import os
import signal
import sys
import threading

import pytest
import torch

import minisd
from minisd import cli, graph, ops, testing
from minisd.methods._base import Method
from tests.conftest import ROOT

COMMON = {"instance_prompt": "a cat", "resolution": 32, "num_validation_images": 1, "report_to": "none"}
COMMON |= {"train_batch_size": 2, "max_train_steps": 2, "validation_epochs": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch, in_foreground):
    """Images of few steps, and the signals of a program in the foreground."""
    monkeypatch.setattr(Method, "preview_steps", 2)


def state() -> list:
    """What a run might change in its process."""
    torch_s = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    threads = [t for t in threading.enumerate() if "tqdm" not in t.name]  # which keeps one for all its bars
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return [
        torch.get_deterministic_debug_mode(), torch_s[0].deterministic, torch_s[0].benchmark, torch_s[1],
        torch.backends.cuda.matmul.allow_tf32, torch_s[0].allow_tf32, torch.get_rng_state().tolist(),
        torch.get_num_threads(), dict(os.environ), handlers, sys.stdout, sys.stderr, list(sys.argv),
        ops._choice, graph._choice, threads, os.getcwd(),
    ]  # fmt: skip


def test_what_train_py_leaves(model, cat, tmp_path, command):
    """The same bytes as by the command, twice in one process, and nothing else has changed."""
    heard, before = [], state()
    runs = [
        minisd.train(
            "lora", data=cat, model=str(model), output_dir=str(tmp_path / name / "run"), rank=2,
            deterministic=True, allow_tf32=True, on_update=lambda *row: heard.append(row), **COMMON,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert state() == before
    run = runs[0]
    rows = [{"step": step, **values} for step, values in heard]
    assert rows == run.log + runs[1].log and [row["step"] for row in run.log] == [1, 2]
    assert run.path == tmp_path / "one" / "run" and run.options["rank"] == 2
    flags = [part for k, v in COMMON.items() if v is not None for part in (f"--{k}", v)]
    flags += ["--data", cat, "--model", model, "--rank", 2, "--deterministic", "--allow_tf32"]
    status, _, err = command(
        "train.py", "--method", "lora", *flags, "--output_dir", tmp_path / "three" / "run"
    )
    assert status == 0, err
    o = cli.parse_train(["--config", str(run.path / "options.json")])[1]
    names = [p.relative_to(run.path).as_posix() for p in testing.results(o)]
    assert {"pytorch_lora_weights.safetensors", "result.png", "log.jsonl"} <= {*names}
    for other in ("two", "three"):
        for name in names:
            assert (run.path / name).read_bytes() == (tmp_path / other / "run" / name).read_bytes(), name
    sd = minisd.load(model, device="cpu")
    sd.attach(run.path)
    again = minisd.train(
        **json.loads((run.path / "options.json").read_text()) | {"output_dir": tmp_path / "x"}
    )
    assert again.log == run.log


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("painting", {}, "unknown method 'painting'"),
        ("lora", {}, "give --data or --dataset_name"),
        ("textual_inversion", {}, "required: --data"),
        ("lora", {"rankk": 4}, "unknown flag --rankk; did you mean --rank?"),
        ("lora", {"network_dim": 4}, "unknown flag --network_dim; did you mean --rank?"),
        ("lora", {"data": "x", "erase": "a"}, "--erase is not a flag of this method; it belongs to: erase"),
        ("lora", {"data": "x", "rank": "many"}, "argument --rank: invalid int value: 'many'"),
        ("lora", {"data": "x", "rank": 2.5}, "argument --rank: invalid int value: '2.5'"),
        ("lora", {"data": "x", "rank": 0}, "--rank must be positive"),
        ("lora", {"data": "x", "bucket": "maybe"}, "--bucket is yes or no, not 'maybe'"),
        ("lora", {"data": "nowhere", "instance_prompt": "x"}, "nowhere"),
        ("lora", {"data": "x", "help": True}, "--help"),
        ("lora", {"data": "x", "config": "c.toml"}, "config is no value of a flag"),
        ("lora", {"data": "x", "validation_scheduler": "mine.py"}, "is code"),
    ],
    ids=str,
)
def test_mistakes_are_value_errors(method, flags, message):
    before = state()
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        minisd.train(method, **flags)
    assert state() == before


class Enough(Exception):
    pass


def test_an_error_or_a_signal_in_a_callback(model, cat, tmp_path):
    """Both end the run, and leave the process as it was; what a signal stopped goes on from there."""
    flags = COMMON | {"data": cat, "model": model, "output_dir": tmp_path / "out", "max_train_steps": 4}
    before = state()

    def stop(step: int, values: dict) -> None:
        raise Enough

    with pytest.raises(Enough):
        minisd.train("lora", on_update=stop, **flags)
    assert state() == before

    def interrupt(step: int, values: dict) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        minisd.train("lora", on_update=interrupt, overwrite=True, **flags)
    assert state() == before and (tmp_path / "out" / "checkpoint-1").is_dir()
    run = minisd.train("lora", resume_from_checkpoint="latest", **flags)
    assert [row["step"] for row in run.log] == [1, 2, 3, 4]


def test_in_a_thread(model, cat, tmp_path):
    """As of a program with windows: signals are the main thread's affair."""
    found = []
    flags = COMMON | {"data": cat, "model": model, "output_dir": tmp_path / "out"}
    thread = threading.Thread(target=lambda: found.append(minisd.train("lora", **flags)))
    thread.start()
    thread.join()
    assert len(found[0].log) == 2


def test_data_is_checked_without_a_run(cat, tmp_path, capsys):
    flags = {"data": cat, "instance_prompt": "x", "output_dir": tmp_path / "out"}
    assert minisd.train("lora", check_data=True, **flags) is None
    assert "the same content: 0" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells run, one after the other, in fewer updates; its outputs are not kept."""
    notebook = json.loads((ROOT / "docs" / "train_and_draw.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    (tmp_path / "cat").symlink_to(ROOT / "cat")
    monkeypatch.chdir(tmp_path)
    names = {"display": lambda *shown: None}
    for cell in cells:
        source = "".join(cell["source"])
        exec(source.replace("UPDATES = 300", "UPDATES = 2").replace(", steps=20", ", steps=2"), names)
    assert names["UPDATES"] == 2 and [image.size for image in names["images"]] == [(64, 64)] * 4
