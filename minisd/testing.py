"""Checks of a training method, one of your own too: on a CPU, in a few updates.

    def test_mine(tmp_path):
        testing.check_method("mine.py", tmp_path, "--data", "./cat")

It trains the tiny model unless there is a --model, and is about wiring: whether what was learned is what the
paper promises takes a longer run.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minisd import cli, registry
from minisd.data.order import Stream, collate
from minisd.methods._base import Method
from minisd.options import Training
from minisd.training import loop
from minisd.training.run_folder import RunFolder


def check_method(method: str, folder: Path, *flags: object) -> None:
    """Check a method, by name or by the path of its file: exactly what `build` returns changes, and a run
    that was stopped and resumed ends with the bytes of one that was not. Writes to `folder`. AssertionError,
    saying what is wrong."""
    short = ["--max_train_steps", 4, "--learning_rate", 1e-2, "--lr_warmup_steps", 1]
    o = options(method, *short, *flags, num_validation_images=1)
    assert_exactly_these_train(*built(method, o), steps=3)
    assert_resumed_equals_uninterrupted(method, o, folder)


def options(method: str, *flags: object, **changes) -> Training:
    """Of a short run that reports to nobody. `changes` are of the flags that the method has."""
    argv = ["--method", method, "--train_batch_size", "2", "--report_to", "none", "--max_train_steps", "2"]
    o = cli.parse_train([*argv, *map(str, flags)])[1]
    return replace(o, **{name: value for name, value in changes.items() if hasattr(o, name)})


def new(method: str, o: Training) -> Method:
    """A method with these options, on the CPU."""
    return registry.load_class("methods", method)(o, torch.device("cpu"))


def built(method: str, o: Training, count: int = 4) -> tuple[Method, dict[str, nn.Parameter], dict]:
    """A method ready to compute, its trained parameters, and a batch."""
    m = new(method, o)
    m.prepare()
    trained = m.setup()
    stream = Stream(m.datasets()[0], o.seed)
    return m, trained, collate([stream[k] for k in range(count)])


def train(method: str, o: Training) -> int:
    """Train, and return the exit status."""
    return loop.train(new(method, o), RunFolder(method, o))


def networks(m: Method) -> dict[str, nn.Module]:
    """All networks of a method, including frozen ones."""
    return m.sd.parts | {name: value for name, value in vars(m).items() if isinstance(value, nn.Module)}


def assert_exactly_these_train(m: Method, trained: dict, batch: dict, steps: int = 1) -> None:
    """Gradients reach the declared parameters and no others, and all of the declared ones change."""
    everything = {
        f"{part}.{n}": p for part, module in networks(m).items() for n, p in module.named_parameters()
    }
    ids = {id(p) for p in trained.values()}
    declared = {n for n, p in everything.items() if id(p) in ids}
    assert declared, "nothing trains"
    assert ids <= {id(p) for p in everything.values()}, "what trains is in no network"
    before = {n: p.detach().clone() for n, p in everything.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(steps):
        m.loss(batch).backward()
        reached = {n for n, p in everything.items() if p.grad is not None}
        assert reached == declared, f"a gradient, or none, against the declaration: {reached ^ declared}"
        optimizer.step()
    changed = {n for n, p in everything.items() if not torch.equal(p, before[n])}
    assert changed == declared, f"changed, or did not, against the declaration: {changed ^ declared}"


def assert_resumed_equals_uninterrupted(method: str, o: Training, folder: Path) -> None:
    """A run to its end, and one that a signal stops after update 3 and that goes on from there: the results,
    the log and the image are the same to the byte."""
    # Both folders have one name, which a result may record.
    outputs = (folder / name / "run" for name in ("whole", "parts"))
    whole, parts = (replace(o, output_dir=output, checkpointing_steps=2) for output in outputs)
    assert train(method, whole) == 0
    interrupted = RunFolder(method, parts)
    log = interrupted.log

    def log_and_stop(step: int, **values: float) -> None:
        log(step, **values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    interrupted.log = log_and_stop
    assert loop.train(new(method, parts), interrupted) == 128 + signal.SIGTERM
    kept = sorted(path.name for path in parts.output_dir.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"], kept
    assert train(method, replace(parts, resume_from_checkpoint="latest")) == 0
    compared = [(path, parts.output_dir / path.relative_to(whole.output_dir)) for path in results(whole)]
    assert {other for _, other in compared} == set(results(parts)), "the runs left different files"
    for one, other in compared:
        assert one.read_bytes() == other.read_bytes(), f"{one} and {other} differ"


def results(o: Training) -> list[Path]:
    """The files of a run that have to be the same in another one: tensors, images, and the log."""
    found = (p for pattern in ("*.safetensors", "*.png", "log.jsonl") for p in o.output_dir.rglob(pattern))
    return [p for p in found if p.parent.name != "checkpoint-3"]  # of the stop itself
