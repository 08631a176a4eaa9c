"""Which of a kernel and torch computes: every decision, with a bench that says what the test wants."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minisd import ops
from minisd.training import checkpoint

pytest.importorskip("triton")
from minisd.kernels.trial import Call, Spec, Wrong  # noqa: E402
from minisd.kernels.verdicts import Table, Verdicts  # noqa: E402

from minisd.kernels import verdicts  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.method_helpers import options, train  # noqa: E402

ABOUT = dict(GPU="a chip", capability="9.0", torch="2", CUDA="13", triton="3", kernels="abc")


def spec(*shape, dtype=torch.bfloat16, requires_grad=False) -> Spec:
    stride = torch.empty(shape, device="meta").stride()
    return Spec(shape, stride, dtype, requires_grad)


def geglu(rows: int = 64, **kinds) -> Call:
    return Call("geglu", (spec(rows, 256, **kinds),), grad=True, autocast=False, graph=False)


def attention(dtype=torch.bfloat16) -> Call:
    q = spec(2, 64, 8, 40, dtype=dtype)
    return Call("attention", (q, q, q), grad=False, autocast=False, graph=False)


class Fake:
    """A bench: `ms` by name of a kernel, torch takes 1; what is not in it takes 2. It counts the trials."""

    def __init__(self, noise: float = 0.0, check=None, **ms: float):
        self.ms, self.noise, self.trials = ms, noise, 0
        self.bench = SimpleNamespace(check=check or (lambda kernel, call: [0.5]), time_ms=self.time_ms)

    def time_ms(self, kernels, call):
        self.trials += 1
        base = {"torch": 1.0} | {k.name: self.ms.get(k.name, 2.0) for k in kernels}
        return {name: [ms + self.noise * i / 15 for i in range(15)] for name, ms in base.items()}


@pytest.fixture(autouse=True)
def one_geglu(monkeypatch):
    """Attention stands for kernels with variants, GEGLU for those without."""
    monkeypatch.setattr(verdicts.discover()["geglu"], "variants", ())


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "cache" / "chip.json", ABOUT)


def fail(error: BaseException, *names: str):
    """A part of a bench that raises this for these kernels."""

    def part(kernel, call):
        if not names or kernel.name in names:
            raise error
        return [0.5]

    return part


# ------------------------------ One decision


@pytest.mark.parametrize(
    "ms, noise, choice",
    [
        (0.5, 0.0, "geglu"),
        (0.96, 0.0, ""),  # faster, but not by 5 %
        (0.90, 0.0, "geglu"),
        (0.90, 1.0, ""),  # within the noise
        (1.5, 0.0, ""),
    ],
)
def test_a_kernel_must_be_faster_beyond_margin_and_noise(table, ms, noise, choice):
    found = Verdicts(table, {}, bench=Fake(noise, geglu=ms).bench)
    assert found.decide(geglu()) == choice
    assert found.choices == {tuple(geglu()): choice}
    row = table.read()[verdicts.key(geglu())]
    assert (
        row["choice"] == (choice or "torch")
        and row["ms"]["torch"] >= 1.0
        and row["errors"] == {"geglu": [0.5]}
    )


def test_the_fastest_of_several_kernels():
    call = attention()
    assert Verdicts(Memory(), {}, bench=Fake(attention=0.8, attention_anchored=0.6).bench).decide(call) == (
        "attention_anchored"
    )
    assert (
        Verdicts(Memory(), {}, bench=Fake(attention=0.6, attention_anchored=0.8).bench).decide(call)
        == "attention"
    )
    half = Verdicts(Memory(), {}, bench=Fake(attention=0.8, attention_anchored=0.6).bench)
    assert half.decide(attention(torch.float16)) == "attention"  # the anchored one is for bf16 alone


class Memory(Table):
    def __init__(self):
        super().__init__(ROOT / "nowhere", ABOUT)

    def read(self):
        return {}

    def write(self, rows):
        return {k: row for k, row in rows.items() if row}


@pytest.mark.parametrize("part", ["check", "time_ms"])
@pytest.mark.parametrize(
    "error", [RuntimeError("ptxas died\nof it"), Wrong("an error of 1e-1"), AssertionError()]
)
def test_what_fails_is_torch_with_one_line_and_is_remembered(table, capsys, part, error):
    def raising(*_):
        raise error

    fake = Fake(geglu=0.5)
    found = Verdicts(table, {}, bench=SimpleNamespace(**vars(fake.bench) | {part: raising}))
    assert found.decide(geglu()) == "" and found.decide(geglu(60)) == ""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and type(error).__name__ in err and "geglu inference bfloat16 128 x64" in err
    again = Verdicts(table, {}, bench=fake.bench)  # another process, in which it would work
    assert again.decide(geglu()) == "" and fake.trials == 0


def test_one_wrong_kernel_leaves_the_other(table):
    wrong = Fake(attention=0.8, attention_anchored=0.1, check=fail(Wrong("NaN"), "attention_anchored"))
    assert Verdicts(table, {}, bench=wrong.bench).decide(attention()) == "attention"
    (row,) = table.read().values()
    assert row["reasons"] == {"attention_anchored": "Wrong: NaN"}


def test_too_little_memory_is_no_verdict(table):
    full = Fake(geglu=0.5, check=fail(torch.OutOfMemoryError("full")))
    found = Verdicts(table, {}, bench=full.bench)
    assert found.decide(geglu()) == "" and found.decide(geglu()) == ""  # in this process it is torch
    assert table.read() == {}
    assert Verdicts(table, {}, bench=Fake(geglu=0.5).bench).decide(geglu()) == "geglu"


def test_an_interruption_is_no_verdict(table):
    found = Verdicts(table, {}, bench=Fake(check=fail(KeyboardInterrupt())).bench)
    with pytest.raises(KeyboardInterrupt):
        found.decide(geglu())
    assert table.read() == {} and found.rows == {}


def test_trials_end_with_the_budget(table, monkeypatch):
    fake = Fake(geglu=0.5)
    found = Verdicts(table, {}, bench=fake.bench)
    assert found.decide(geglu()) == "geglu"
    monkeypatch.setattr(verdicts, "BUDGET", 0.0)
    assert found.decide(geglu(1000)) == "" and found.decide(geglu(1000)) == "" and fake.trials == 1
    assert len(table.read()) == 1  # the next process tries it


def test_nothing_is_tried_in_a_backward_pass(table):
    fake = Fake(geglu=0.5)
    found = Verdicts(table, {}, bench=fake.bench)
    seen = []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            seen.append(found.decide(geglu()))
            return dy

    Op.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == [""] and found.decide(geglu()) == "" and fake.trials == 0  # and so it stays
    assert table.read() == {}


def test_a_call_that_no_kernel_can_compute_is_torch_s_whatever_its_key_has(table):
    found = Verdicts(table, {}, bench=Fake(geglu=0.5).bench)
    assert found.decide(geglu()) == "geglu"
    assert found.decide(geglu(60), "an empty tensor") == "" and found.decide(geglu(61)) == "geglu"


def test_a_graph_that_is_captured_meets_what_the_eager_call_decided(table, monkeypatch):
    fake = Fake(geglu=0.5)
    found = Verdicts(table, {}, bench=fake.bench)
    assert found.decide(geglu()) == "geglu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert found.decide(geglu(60)) == "geglu"  # the same key
    assert found.decide(geglu(1000)) == "" and fake.trials == 1


# ------------------------------ Keys


def test_keys():
    x, w = spec(2, 320, 64, 64), spec(320, dtype=torch.float32, requires_grad=True)
    nhwc = x._replace(stride=(320 * 64 * 64, 1, 64 * 320, 320))
    call = Call(
        "group_norm", (nhwc, w, w, spec(2, 320), 32, 1e-5, True), grad=True, autocast=True, graph=True
    )
    key = "group_norm graph training 0110 bfloat16+float32 autocast channels_last 320/32 at 4096 x2 add silu"
    assert verdicts.key(call) == key
    changed = call._replace(
        arguments=(x, w, w, None, 32, 1e-5, False), grad=False, autocast=False, graph=False
    )
    assert verdicts.key(changed) == "group_norm inference bfloat16+float32 320/32 at 4096 x2"
    assert verdicts.key(attention()) == "attention inference bfloat16 hd40 64x64 x16"
    tokens = spec(3, 77, 768)
    call = Call("layer_norm", (tokens, tokens, w, w, 1e-5), grad=False, autocast=False, graph=False)
    assert verdicts.key(call) == "layer_norm inference bfloat16+float32 768 x256 add"


# ------------------------------ Processes and the disk


def test_the_disk_is_asked_before_a_trial(table):
    first, second = Fake(geglu=0.5), Fake(geglu=2.0)
    assert Verdicts(table, {}, bench=first.bench).decide(geglu()) == "geglu"
    assert Verdicts(table, {}, bench=second.bench).decide(geglu()) == "geglu" and second.trials == 0
    assert sorted(os.listdir(table.path.parent)) == ["chip.json", "chip.lock"]


def test_a_verdict_of_another_process_stays(table):
    """Two processes that try the same key at once end with one verdict."""
    other = Fake(geglu=2.0)

    def meanwhile(kernel, call):
        assert "trying" in table.read()[verdicts.key(geglu())]
        Verdicts(table, {}, bench=other.bench).decide(geglu())
        return [0.5]

    found = Verdicts(table, {}, bench=Fake(geglu=0.5, check=meanwhile).bench)
    # the other one takes our mark for that of a dead process, as it has the same number
    assert found.decide(geglu()) == "" and table.read()[verdicts.key(geglu())]["choice"] == "torch"


def test_two_writers_lose_nothing(table):
    def write(name):
        for i in range(20):
            Table(table.path, ABOUT).write({f"{name} {i}": dict(choice="torch")})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table.read()) == 80


WRITER = """
import sys
from pathlib import Path
from minisd.kernels.verdicts import Table
table = Table(Path(sys.argv[1]), {})
for i in range(15):
    table.write({f"{sys.argv[2]} {i}": dict(choice="torch")})
if sys.argv[2] == "killed":
    import fcntl, time
    with table.path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(sys.argv[1] + ".held").touch()
        time.sleep(600)
"""


def python(table, name) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(table.path), name], env=env)


@pytest.mark.slow
def test_two_processes_write_and_a_killed_one_leaves_no_lock(table):
    killed = python(table, "killed")
    held = table.path.with_name("chip.json.held")
    while not held.exists() and killed.poll() is None:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    others = [python(table, name) for name in "ab"]
    assert [other.wait(timeout=120) for other in others] == [0, 0]
    assert len(table.read()) == 45


def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.skipif(os.name != "posix", reason="asks the system for a process")
def test_marks_of_trials(table, capsys):
    """The mark of a process that ended, or has tried for long, is torch; a living one's decides nothing."""
    here, now = verdicts.socket.gethostname(), time.time()
    for trying, choice in [
        ([here, gone(), now], ""),
        ([here, os.getpid(), now], ""),  # an earlier process with this one's number
        (["elsewhere", 1, now - 3600], ""),
        (["elsewhere", 1, now], "geglu"),
        ([here, os.getppid(), now], "geglu"),
        ([here, os.getppid(), now - 3600], ""),
    ]:
        table.path.unlink(missing_ok=True)
        table.write({verdicts.key(geglu()): dict(trying=trying)})
        assert Verdicts(table, {}, bench=Fake(geglu=0.5).bench).decide(geglu()) == choice, trying
        assert bool(capsys.readouterr().err) == (choice == "")
        assert table.read()[verdicts.key(geglu())]["choice"] == (choice or "torch")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"verdicts": []}', '{"verdicts": {"a": 1}}', "\x00"])
def test_a_damaged_file_is_empty(table, text):
    table.path.parent.mkdir()
    table.path.write_text(text)
    assert Verdicts(table, {}, bench=Fake(geglu=0.5).bench).decide(geglu()) == "geglu"
    assert json.loads(table.path.read_text())["about"] == ABOUT


def test_a_cache_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    fake = Fake(geglu=0.5)
    found = Verdicts(Table(tmp_path / "file" / "chip.json", ABOUT), {}, bench=fake.bench)
    assert found.decide(geglu()) == found.decide(geglu()) == "geglu" and fake.trials == 1
    assert found.decide(geglu(1000)) == "geglu"
    assert capsys.readouterr().err.count("verdicts are not kept") == 1


def test_another_gpu_version_or_source_has_another_file(monkeypatch, tmp_path):
    def path(name="NVIDIA A 100", minor=0, source="a", torch_version="2.0"):
        class Properties:
            pass

        Properties.name, Properties.major, Properties.minor = name, 8, minor
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        monkeypatch.setattr(torch, "__version__", torch_version)
        (tmp_path / "geglu.py").write_text(source)
        monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
        return verdicts.of(torch.device("cuda"), {}, None).table.path

    paths = [path(), path("NVIDIA B"), path(minor=6), path(source="b"), path(torch_version="2.1")]
    assert len(set(paths)) == 5 and path() == paths[0]
    assert paths[0].parent == tmp_path / "cache" / "minisd" / "kernels" and paths[0].name.startswith(
        "NVIDIA-A-100-"
    )


def test_processes_agree(table, tmp_path):
    """The first one to ask decides, for all."""
    published = {}

    def share(key, decide):
        return published.setdefault(key, None) or published.update({key: decide()}) or published[key]

    ranks = [Verdicts(Memory(), {}, share, Fake(geglu=ms).bench) for ms in (0.5, 2.0)]
    assert [rank.decide(geglu()) for rank in ranks] == ["geglu", "geglu"]
    assert [rank.decide(geglu(1000)) for rank in reversed(ranks)] == ["", ""]
    assert ranks[0].record() == ranks[1].record()


# ------------------------------ A run that goes on


def test_a_run_goes_on_as_it_began(table):
    began = Verdicts(table, {}, bench=Fake(geglu=0.5).bench)
    began.decide(geglu())
    began.decide(geglu(1000, requires_grad=True))
    record = json.loads(json.dumps(began.record()))
    assert set(record.values()) == {"geglu"}
    record["geglu inference bfloat16 128 x64"] = "torch"
    table.path.unlink()
    slow = Fake(geglu=2.0)
    on = Verdicts(table, record, bench=slow.bench)
    assert on.decide(geglu()) == "" and on.decide(geglu(1000, requires_grad=True)) == "geglu"
    assert slow.trials == 0 and on.record() == record
    on.decide(geglu(5))
    assert on.record().keys() > record.keys()


@pytest.mark.parametrize("error", [RuntimeError("no image"), Wrong("NaN")])
def test_a_kernel_of_the_run_that_cannot_run_is_an_error(table, error, monkeypatch):
    record = {verdicts.key(geglu()): "geglu"}
    found = Verdicts(table, record, bench=Fake(check=fail(error)).bench)
    for arguments in [(geglu(),), (geglu(), "no such GPU")]:
        with pytest.raises(ValueError, match="--kernels auto: .*geglu.*--kernels torch continues"):
            found.decide(*arguments)
    gone = Verdicts(table, {verdicts.key(geglu()): "geglu_fast"}, bench=Fake().bench)
    with pytest.raises(ValueError, match="geglu_fast, which cannot run here"):
        gone.decide(geglu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert Verdicts(table, record, bench=Fake().bench).decide(geglu()) == "geglu"


def test_summary(table):
    found = Verdicts(table, {}, bench=Fake(attention=0.5).bench)
    for call in (attention(), geglu(), geglu(1000)):
        found.decide(call)
    assert found.summary().startswith("attention 1 of 1, geglu 0 of 2 on a chip (settled in ")


FIRST_TO_ASK = """
import sys
from minisd.training.distributed import Processes
processes = Processes()
answers = [processes.first_to_ask(f"a key {i}", lambda: {"rank": processes.rank}) for i in range(9)]
sys.stdout.write(f"found {answers}\\n")  # in one piece, whoever else writes
processes.close()
"""


def test_two_processes_take_the_answer_of_the_first_to_ask(tmp_path):
    (tmp_path / "ask.py").write_text(FIRST_TO_ASK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "ask.py")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert len(lines) == 2 and lines[0] == lines[1]


def test_the_verdicts_of_a_training_run(model, captioned, tmp_path, monkeypatch):
    """They are in the checkpoints and the folder, and a run that goes on begins with them."""
    monkeypatch.setattr(verdicts, "of", lambda device, pinned, share: Verdicts(Memory(), pinned, share))
    monkeypatch.setattr(ops, "_device", "cpu")
    flags = ["--model", model, "--data", captioned, "--resolution", 32, "--checkpointing_steps", 1]
    flags += ["--num_validation_images", 1, "--output_dir", tmp_path]
    try:
        assert train("text_to_image", options("text_to_image", *flags)) == 0
        state = tmp_path / "checkpoint-1" / "state.json"
        content = json.loads(state.read_text())
        found = content["conditions"]["kernels"]
        assert {key.split()[0] for key in found} > {"group_norm", "attention"} and set(found.values()) == {
            "torch"
        }
        assert json.loads((tmp_path / "kernels.json").read_text()).items() >= found.items()
        key = next(key for key in found if key.startswith("group_norm training"))
        found[key] = "group_norm"
        del content["sha256"]
        state.write_text(json.dumps(content | {"sha256": checkpoint.own_digest(content)}))
        resume = options("text_to_image", *flags, "--resume_from_checkpoint", "checkpoint-1")
        with pytest.raises(ValueError, match="--kernels auto: .*group_norm training.*the tensors are on cpu"):
            train("text_to_image", resume)
        monkeypatch.setattr(ops, "_device", "cuda")
        with pytest.raises(ValueError, match="--kernels auto: .*needs a GPU; --kernels torch"):
            train("text_to_image", resume)
        assert train("text_to_image", replace(resume, kernels="torch")) == 0
    finally:
        ops.choose("auto")


def test_a_run_on_a_cpu_has_no_verdicts(model, captioned, tmp_path):
    flags = ["--model", model, "--data", captioned, "--resolution", 32, "--checkpointing_steps", 1]
    flags += ["--num_validation_images", 1, "--output_dir", tmp_path]
    assert train("text_to_image", options("text_to_image", *flags)) == 0
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())
    assert "kernels" not in state["conditions"]
    assert not (tmp_path / "kernels.json").exists()
