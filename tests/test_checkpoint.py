"""Checkpoints that know themselves, and folders with one writer: whatever is damaged is said in one line."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minisd import files
from minisd.data.datasets import Captioned
from minisd.data.source import from_options
from minisd.formats import config_json
from minisd.sampling import run as sampling
from minisd.training import checkpoint, loop
from minisd.training.distributed import Processes
from minisd.training.lock import Lock
from minisd.training.run_folder import RunFolder, conditions
from minisd.training.step import Trainer
from tests.helpers import TINY_PIXELS
from tests.method_helpers import new, options, train

METHOD = "unconditional"  # a small network with an average
TRAINED, OPTIMIZER, STATE = checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.STATE


@pytest.fixture(scope="module")
def flags(cat, tmp_path_factory) -> list:
    """Of a run of four images, without its length, folder and checkpoints."""
    folder = tmp_path_factory.mktemp("config")
    config_json.write(folder, "unet2d", TINY_PIXELS)
    flags = ["--data", cat, "--model_config_name_or_path", folder, "--resolution", 16, "--use_ema"]
    flags += ["--eval_batch_size", 1, "--ddpm_num_inference_steps", 2, "--report_to", "none"]
    return flags + ["--train_batch_size", 1]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The options of a finished run with checkpoint-2 and checkpoint-4."""
    o = options(METHOD, *flags, "--checkpointing_steps", 2, "--max_train_steps", 4)
    o.output_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(METHOD, o) == 0
    return o


@pytest.fixture(scope="module")
def trainer(finished):
    """What the run trained, before its first update."""
    method = new(METHOD, finished)
    trained = method.setup()
    dataset = method.datasets()[0]
    trainer = Trainer(method, trained, len(dataset), Processes())
    trainer.dataset = dataset
    return trainer


@pytest.fixture
def copied(finished, tmp_path):
    """Options to resume a copy of the run."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return replace(finished, output_dir=tmp_path / "run", resume_from_checkpoint="latest")


def folder_of(o, dataset=None) -> RunFolder:
    folder = RunFolder(METHOD, o)
    if dataset is not None:
        folder.conditions = conditions(dataset, 1, torch.device("cpu"))
    return folder


def resume(o) -> Path | None:
    with folder_of(o) as folder:
        return folder.resume()


def edit(path: Path, change) -> None:
    """Rewrite a file of tensors with changed ones."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, max(tensors, key=lambda n: (tensors[n].ndim, [*tensors[n].shape[:2]] != [32, 32])))
    save_file(tensors, path)


def sign(path: Path, **changes) -> None:
    """Change state.json, and give it the digests of what is there now."""
    state = json.loads((path / STATE).read_text()) | changes
    del state["sha256"]
    for name, listed in state["files"].items():
        listed["sha256"] = checkpoint.digest(path / name)
        listed["tensors"] = checkpoint.layout(load_file(path / name))
    (path / STATE).write_text(json.dumps(state | {"sha256": checkpoint.own_digest(state)}))


def age(path: Path) -> None:
    """Make state.json what it was before there were digests."""
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps({name: state[name] for name in checkpoint.KINDS}))


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


# Kinds that leave a file of tensors which cannot be one of this run, digests or not.
UNFIT = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no file": lambda path: path.unlink(),
    "not tensors": lambda path: path.write_text("hello"),
    "one element": lambda path: edit(path, lambda t, n: t.update({n: torch.zeros(1)})),
    "no element": lambda path: edit(path, lambda t, n: t.update({n: torch.zeros(0)})),
    "half as wide": lambda path: edit(path, lambda t, n: t.update({n: t[n][: len(t[n]) // 2].clone()})),
    "twice as long": lambda path: edit(path, lambda t, n: t.update({n: torch.cat([t[n], t[n]])})),
    "transposed": lambda path: edit(path, lambda t, n: t.update({n: t[n].transpose(0, 1).contiguous()})),
    "another type": lambda path: edit(path, lambda t, n: t.update({n: t[n].half()})),
    "integers": lambda path: edit(path, lambda t, n: t.update({n: t[n].int()})),
    "a tensor less": lambda path: edit(path, lambda t, n: t.pop(n)),
    "a tensor more": lambda path: edit(
        path, lambda t, n: t.update({"unet.more.weight|exp_avg": t[n].clone()})
    ),
    "NaN": lambda path: edit(path, lambda t, n: t[n].view(-1)[3:4].fill_(float("nan"))),
    "no tensor": lambda path: save_file({}, path),
    "infinity": lambda path: edit(path, lambda t, n: t[n].view(-1)[-1:].fill_(float("inf"))),
}
# Kinds that only a digest can tell from the truth.
CHANGED = {
    "flipped bit": lambda path: flip(path, 0.7),
    "last bit": lambda path: flip(path, 1.0),
    "zeros": lambda path: edit(path, lambda t, n: t[n].zero_()),
    "of the other checkpoint": lambda path: shutil.copy(
        path.parent.parent / "checkpoint-2" / path.name, path
    ),
}


@pytest.mark.parametrize("kind", [*UNFIT, *CHANGED])
@pytest.mark.parametrize("name", [TRAINED, OPTIMIZER])
def test_damaged_tensors_are_passed_over(copied, name, kind, capsys):
    newest = copied.output_dir / "checkpoint-4"
    (UNFIT | CHANGED)[kind](newest / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        checkpoint.check(newest)
    assert "\n" not in str(error.value) and str(newest) in str(error.value)
    assert resume(copied).name == "checkpoint-2"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("passing over checkpoint-4: ") and name in said[0]
    assert said[1].startswith("continuing from ") and len(said) == 2
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        resume(replace(copied, resume_from_checkpoint="checkpoint-4"))


UNREADABLE = ["empty", "truncated", "no file", "not tensors"]
NEVER_WRITTEN = [*UNREADABLE, "NaN", "infinity"]


@pytest.mark.parametrize("name", [TRAINED, OPTIMIZER])
@pytest.mark.parametrize(
    "kind, digests",
    [(kind, False) for kind in UNFIT] + [(kind, True) for kind in UNFIT if kind not in NEVER_WRITTEN],
)
def test_tensors_that_do_not_fit_are_never_loaded(copied, trainer, name, kind, digests):
    """Of a checkpoint from before there were digests, or of one that is whole, but not of this model."""
    newest = copied.output_dir / "checkpoint-4"
    UNFIT[kind](newest / name)
    sign(newest) if digests else age(newest)
    before = {n: p.detach().clone() for n, p in trainer.trained.items()}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        checkpoint.check(newest)
        folder_of(copied, trainer.dataset).restore(trainer, newest)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in trainer.trained.items())


STATES = {
    "empty": "", "an empty object": "{}", "a list": "[]", "null": "null", "half": '{"step": 4, "sam',
    "deep": "[" * 100_000, "a long number": '{"step": ' + "9" * 5000 + "}", "binary": "\ud800",
}  # fmt: skip
VALUES = {
    "step": [None, "4", 4.0, True, -5, 2, 5, 10**30, [], {}],
    "samples": [None, "4", -1, 5, 10**30],
    "scaler": [None, [], "x", {"scale": 1}],
    "options": [None, [], "x", {}],
    "files": [None, {}, [], {TRAINED: {}}],
    "sha256": [None, "", 5, "0" * 64],
    "conditions": [None, {}, []],
}


def test_a_damaged_state_is_one_line(copied, finished, capsys):
    """Of every kind: other content, and each value missing, of another type, negative or too large."""
    newest = copied.output_dir / "checkpoint-4"
    true = json.loads((newest / STATE).read_text())
    contents = [text.encode(errors="surrogatepass") for text in STATES.values()]
    contents += [json.dumps({k: v for k, v in true.items() if k != name}).encode() for name in true]
    contents += [json.dumps(true | {name: value}).encode() for name in VALUES for value in VALUES[name]]
    for content in contents:
        (newest / STATE).write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.json") as error:
            checkpoint.check(newest)
        assert "\n" not in str(error.value)
        assert resume(copied).name == "checkpoint-2", content[:80]
    (newest / STATE).write_text(json.dumps(true, indent=1))  # the same content
    assert resume(copied).name == "checkpoint-4"


@pytest.mark.parametrize("name, value", [("samples", 5), ("step", 3), ("samples", 8)])
def test_numbers_of_an_old_checkpoint_that_contradict_each_other(copied, trainer, name, value):
    newest = copied.output_dir / "checkpoint-4"
    age(newest)
    state = json.loads((newest / STATE).read_text())
    (newest / STATE).write_text(json.dumps(state | {name: value}))
    with pytest.raises(ValueError, match="images in . updates"):
        folder_of(copied, trainer.dataset).restore(trainer, newest)


def ends_like(o, finished) -> bool:
    """Whether the runs left the same bytes."""
    names = ["unet/diffusion_pytorch_model.safetensors", "log.jsonl", "result.png"]
    names += [f"checkpoint-4/{name}" for name in (TRAINED, OPTIMIZER)]
    return all((o.output_dir / n).read_bytes() == (finished.output_dir / n).read_bytes() for n in names)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(copied, finished, capsys):
    """Past a damaged one, an empty folder and a file; and from one without digests, which is said."""
    CHANGED["flipped bit"](copied.output_dir / "checkpoint-4" / OPTIMIZER)
    (copied.output_dir / "checkpoint-99").mkdir()
    (copied.output_dir / "checkpoint-100").write_text("")
    age(copied.output_dir / "checkpoint-2")
    assert train(METHOD, copied) == 0
    assert ends_like(copied, finished)
    out, err = capsys.readouterr()
    assert out.index("passing over checkpoint-99") < out.index("passing over checkpoint-4")
    assert "checkpoint-2 is of an earlier version" in err


def test_without_a_whole_checkpoint_a_run_does_not_start_over(copied):
    for path in copied.output_dir.glob("checkpoint-*"):
        (path / STATE).write_text("{}")
    with pytest.raises(ValueError, match="none of the checkpoints in .* is whole"):
        train(METHOD, copied)
    assert len(list(copied.output_dir.glob("checkpoint-*"))) == 2


# What has to be the same besides the flags


def more(folder: Path) -> None:
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"0.{suffix}", folder / f"9.{suffix}")


def renamed(folder: Path) -> None:
    for suffix in ("png", "txt"):
        (folder / f"4.{suffix}").rename(folder / f"44.{suffix}")


DATA = {
    "more": more,
    "less": lambda folder: (folder / "4.png").unlink(),
    "renamed": renamed,
    "another size": lambda folder: Image.new("RGB", (32, 48)).save(folder / "0.png"),
    "another caption": lambda folder: (folder / "0.txt").write_text("something else"),
}


@pytest.mark.parametrize("kind", DATA)
def test_other_data_is_refused(copied, captioned, trainer, kind, tmp_path):
    newest, data = copied.output_dir / "checkpoint-4", tmp_path / captioned.name
    shutil.copytree(captioned, data)

    def described() -> dict:
        source = from_options(replace(copied, data=data), None)
        return conditions(Captioned(source, resolution=16), 1, torch.device("cpu"))

    sign(newest, conditions=described())
    folder = folder_of(copied)
    folder.conditions = described()
    folder.restore(trainer, newest)
    DATA[kind](data)
    folder.conditions = described()
    with pytest.raises(ValueError, match="on other data: .*5 images then"):
        folder.restore(trainer, newest)


def test_another_number_of_processes_is_refused_and_other_versions_are_said(copied, finished, capsys):
    newest = copied.output_dir / "checkpoint-2"
    shutil.rmtree(copied.output_dir / "checkpoint-4")
    true = json.loads((newest / STATE).read_text())
    sign(newest, samples=2 * true["samples"], conditions=true["conditions"] | {"processes": 2})
    with pytest.raises(ValueError, match="4 images in 2 updates, which are of 1 images here: start as many"):
        train(METHOD, copied)
    sign(newest, samples=true["samples"], conditions=true["conditions"] | {"torch": "1.0"})
    capsys.readouterr()
    assert train(METHOD, copied) == 0
    assert f"was written with torch 1.0, now {torch.__version__}" in capsys.readouterr().out


# What is saved


@pytest.mark.parametrize("where", ["weight", "exp_avg", "average"])
@pytest.mark.parametrize("after", [3, 4])
def test_values_that_are_not_finite_are_never_saved(finished, tmp_path, monkeypatch, where, after):
    """By neither a checkpoint, nor the result of the last update; the last good checkpoint is named."""
    o = replace(finished, output_dir=tmp_path / "run", checkpointing_steps=1 if after == 3 else 2)
    update = Trainer.update

    def spoil(self, batches):
        values = update(self, batches)
        if self.step == after:
            p = self.parameters[0]
            chosen = {"weight": p.data, "exp_avg": self.optimizer.state[p]["exp_avg"]}
            chosen["average"] = self.ema.average[0]
            chosen[where].view(-1)[0] = float("inf")
        return values

    monkeypatch.setattr(Trainer, "update", spoil)
    with pytest.raises(ValueError, match=f"update {after} left values in .* not finite.*checkpoint-2 is the"):
        train(METHOD, o)
    assert not (o.output_dir / "unet").exists()
    assert sorted(p.name for p in o.output_dir.glob("checkpoint-*"))[-1] == "checkpoint-2"


def test_rotation_keeps_what_was_asked_for(copied, finished):
    """checkpoint-2 was named, and checkpoint-9 is of an earlier attempt; a link is only unlinked."""
    out = copied.output_dir
    (out / "checkpoint-4").rename(out / "checkpoint-9")
    outside = out.parent / "elsewhere"
    (out / "checkpoint-2").rename(outside)
    (out / "checkpoint-1").symlink_to(outside)
    shutil.copytree(outside, out / "checkpoint-2")
    limits = {"checkpoints_total_limit": 1, "checkpointing_steps": 1, "max_train_steps": 5}
    assert train(METHOD, replace(copied, resume_from_checkpoint="checkpoint-2", **limits)) == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5", "checkpoint-9"}
    assert checkpoint.check(outside)["step"] == 2


def test_a_run_that_was_killed_before_it_removed_a_checkpoint(copied):
    """The next one does, even if it has nothing else to do."""
    shutil.copytree(copied.output_dir / "checkpoint-2", copied.output_dir / "checkpoint-1")
    assert train(METHOD, replace(copied, checkpoints_total_limit=2)) == 0
    assert {p.name for p in copied.output_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_a_run_that_ended_before_its_first_checkpoint_leaves_one_log(finished, tmp_path, monkeypatch):
    o = replace(finished, output_dir=tmp_path / "run", checkpointing_steps=4)
    after_update = loop.after_update

    def fail(trainer, held_out, folder, log):
        after_update(trainer, held_out, folder, log)
        if trainer.step == 3:
            raise ValueError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "after_update", fail)
        with pytest.raises(ValueError, match="the disk is gone"):
            train(METHOD, o)
    (o.output_dir / "log.jsonl").open("a").write('{"step": 4, "lo')
    assert train(METHOD, replace(o, resume_from_checkpoint="latest")) == 0
    steps = [json.loads(line)["step"] for line in (o.output_dir / "log.jsonl").open()]
    assert steps == [1, 2, 3, 4] and ends_like(o, finished)


@pytest.fixture
def slow(monkeypatch):
    """Checkpoints are only written once this is set."""
    released, write = threading.Event(), RunFolder._write_checkpoint

    def wait_and_write(*args):
        assert released.wait(60)
        write(*args)

    monkeypatch.setattr(RunFolder, "_write_checkpoint", wait_and_write)
    return released


def test_a_checkpoint_is_written_while_training_goes_on(finished, tmp_path, monkeypatch, slow):
    """With the bytes of its update, though two more have been made; the next one waits for it."""
    o, seen = replace(finished, output_dir=tmp_path / "run", checkpointing_steps=2), []
    after_update = loop.after_update

    def look(trainer, held_out, folder, log):
        after_update(trainer, held_out, folder, log)
        seen.append(sorted(p.name for p in o.output_dir.glob("checkpoint-*")))
        if trainer.step == 4:
            slow.set()

    monkeypatch.setattr(loop, "after_update", look)
    assert train(METHOD, o) == 0
    assert seen == [[], [], [], []]
    assert ends_like(o, finished)
    for name in (TRAINED, OPTIMIZER):
        one, other = (r.output_dir / "checkpoint-2" / name for r in (o, finished))
        assert one.read_bytes() == other.read_bytes()


def test_checkpoints_that_training_waits_for(finished, tmp_path, slow):
    """--no-background_checkpoints: nothing is copied."""
    slow.set()
    o = replace(finished, output_dir=tmp_path / "run", background_checkpoints=False)
    assert train(METHOD, o) == 0
    assert ends_like(o, finished)


@pytest.mark.parametrize("name", ["slow disk", "fast disk"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(finished, tmp_path, monkeypatch, name, slow):
    """After the next update, or at the end; nothing of it stays, and the folder is free."""
    o = replace(finished, output_dir=tmp_path / "run", checkpointing_steps=2, max_train_steps=3)
    update, write = Trainer.update, files.write

    def then_write(self, batches):
        values = update(self, batches)
        if self.step == 3 and name == "fast disk":
            slow.set(), wait([self.folder.writing])
        return values

    def full(path, *args):
        if path.name == OPTIMIZER:
            raise ValueError(f"cannot write {path}: No space left on device")
        write(path, *args)

    def save(folder, trainer, verdicts):
        trainer.folder = folder
        save_checkpoint(folder, trainer, verdicts)

    save_checkpoint = RunFolder.save_checkpoint
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    monkeypatch.setattr(files, "write", full)
    monkeypatch.setattr(Trainer, "update", then_write)
    if name == "slow disk":
        monkeypatch.setattr(loop, "end", lambda *args, end=loop.end: (slow.set(), end(*args)))
    with pytest.raises(ValueError, match=r"^cannot write .*checkpoint-2/optimizer.*: No space left") as error:
        train(METHOD, o)
    assert "\n" not in str(error.value)
    assert not [*o.output_dir.glob("checkpoint-*"), *o.output_dir.glob(".*"), *o.output_dir.glob("unet")]
    logged = [json.loads(line)["step"] for line in (o.output_dir / "log.jsonl").open()]
    assert logged == ([1, 2, 3] if name == "slow disk" else [1, 2])


# One writer


@pytest.fixture
def other(copied):
    """The process id of another process that has the lock of the run's folder."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = Lock(copied.output_dir)
        os.write(write, b"locked")
        time.sleep(600)
        lock.release()
        os._exit(0)
    assert os.read(read, 6) == b"locked"
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_second_run_in_a_folder_is_refused_until_the_first_one_is_gone(copied, other, flags, command):
    """In one line, with exit status 2, before anything is deleted; and a dead one's lock is taken over."""
    (copied.output_dir / ".x.minisd-0123abcd.tmp").write_text("half-written by the other run")
    before = contents(copied.output_dir)
    flags = ["--method", METHOD, *flags, "--output_dir", copied.output_dir]
    for how in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"], []):
        status, _, err = command("train.py", *flags, *how)
        assert status == 2 and err.count("\n") == 1
        assert f"is in use by process {other} on " in err
        assert contents(copied.output_dir) == before
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    status, out, err = command("train.py", *flags, "--overwrite_output_dir", "--max_train_steps", 1)
    assert status == 0, err
    assert f"taking over {copied.output_dir} from process {other} on " in out
    assert not (copied.output_dir / ".lock").exists()


def test_a_removed_checkpoint_is_gone_at_once(copied, monkeypatch):
    """Also if the process is killed while it deletes: no half of it stays, and the next run tidies up."""
    path = copied.output_dir / "checkpoint-4"
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path: (path / "state.json").unlink() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.remove(path)
    assert not path.exists()
    (left,) = files.leftovers(copied.output_dir)
    assert left.is_dir()
    with folder_of(copied) as folder:
        folder.resume()
        folder.start(2)
    assert not files.leftovers(copied.output_dir)


def test_two_runs_of_one_process_and_a_run_after_a_failed_one(copied):
    with folder_of(copied) as first:
        assert first.resume().name == "checkpoint-4"
        with pytest.raises(ValueError, match="in use by another run of this process"):
            resume(copied)
        with pytest.raises(ValueError, match="in use"):  # and again: a refusal frees nothing
            resume(replace(copied, output_dir=copied.output_dir / ".." / "run"))
    with pytest.raises(ValueError, match="there is no folder"):
        resume(replace(copied, resume_from_checkpoint="checkpoint-7"))
    assert resume(copied).name == "checkpoint-4" and not (copied.output_dir / ".lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_images_of_several_processes_never_share_a_number(tmp_path):
    """Nor do they after number 99999."""
    (tmp_path / "99998-seed-0.png").touch()
    image, children = Image.new("RGB", (8, 8)), []
    for seed in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            for _ in range(8):
                sampling.save(image, "", tmp_path, seed, None)
            os._exit(0)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    numbers = sorted(int(path.name.partition("-")[0]) for path in tmp_path.glob("*.png"))
    assert numbers == list(range(99998, 99998 + 33))


def test_the_command_line_names_a_damaged_checkpoint(copied, flags, command):
    CHANGED["flipped bit"](copied.output_dir / "checkpoint-4" / TRAINED)
    flags = [*flags, "--output_dir", copied.output_dir, "--resume_from_checkpoint", "checkpoint-4"]
    status, _, err = command("train.py", "--method", METHOD, *flags)
    assert status == 2 and err.count("\n") == 1 and f"{TRAINED} is damaged" in err
