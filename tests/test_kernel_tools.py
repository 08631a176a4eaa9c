"""aot and bench as far as a CPU can go: the parts around the GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import wraps

import pytest
import torch
from PIL import Image

from minisd import graph, ops
from tests.kernel_helpers import interpreter, ordinary

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from minisd.kernels import (  # noqa: E402
    aot,
    attention,
    bench,
    cross_attention,
    geglu,
    group_norm,
    launch,
    report,
    trial,
)
from tests import gpu_cost  # noqa: E402
from tests.test_graph import StandIn  # noqa: E402


@ordinary
@pytest.mark.slow
def test_aot_finds_a_sound_kernel_sound():
    found = subprocess.run(
        [sys.executable, "-m", "minisd.kernels.aot", "--arch", "sm_90", "--only", "self b2 4096"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    assert "3 compilations" in found.stdout and "wgmma" in found.stdout


@ordinary
def test_aot_finds_spills_and_serial_wgmma(monkeypatch):
    """A tile that is known to be too large for its registers is reported, for both reasons."""
    monkeypatch.setitem(attention.FWD_TILES, 40, {80: (128, 128, 4)})
    row = aot.measure(90, "self b2 4096")[0]
    assert row["kernel"] == "fwd_kernel"
    assert any("spills" in f for f in aot.faults(row)) and "wgmma serialised" in aot.faults(row)
    assert any("shared" in f for f in aot.faults(row | dict(shared=228 * 1024)))


def picked(row: dict[int, tuple], chip: int) -> tuple:
    with launch.record(chip):
        return launch.pick({64: row}, 40, torch.device("cpu"))


def test_gpu_families():
    chips = {80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 100, 103: 100, 120: 86}
    row = {family: (family,) for family in (80, 86, 90, 100)}
    assert {chip: picked(row, chip) for chip in chips} == {chip: (family,) for chip, family in chips.items()}


def test_a_row_of_12_x_is_for_12_x_alone():
    for chip, expected in {80: (80, 80), 89: (80, 86), 90: (90, 90), 103: (90, 90), 120: (120, 86)}.items():
        rows = [{80: (80,), 90: (90,), 120: (120,)}, {80: (80,), 86: (86,), 90: (90,)}]
        assert tuple(picked(row, chip)[0] for row in rows) == expected


REACH = dict(flops=1e12, bytes=1e12, exps=1e9)


def one_ms(runs, rounds=3):
    """A clock that always says 1 ms, and runs everything."""
    return {name: (run(), [0.9, 1.0, 1.1])[1] for name, run in runs.items()}


@interpreter
@pytest.mark.slow
def test_bench_writes_a_table(monkeypatch, tmp_path, capsys):
    """The whole benchmark at tiny shapes, with a kernel that raises and a version that is not installed."""
    monkeypatch.setattr(bench, "interleaved", one_ms)
    monkeypatch.setattr(bench, "limits", lambda dtype: REACH)
    monkeypatch.setattr(torch, "compile", lambda run, **kwargs: run)  # takes minutes on a CPU

    @wraps(geglu.KERNEL.forward)
    def broken(x):
        raise OutOfResources(300000, 232448, "shared memory")

    norm = next(case for case in group_norm.KERNEL.cases if case.layout == torch.channels_last)
    failing = replace(geglu.KERNEL, name="failing", forward=broken)
    chosen = [
        (cross_attention.KERNEL, attention.case("cross b2 16x77 hd40", 2, 16, 77, 1, 40)),
        (group_norm.KERNEL, norm),
        (failing, geglu.KERNEL.cases[0]),
    ]
    assert bench.run(chosen, torch.float32, "cpu", tmp_path) == 1  # because of the one that fails
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == 3 * ["forward", "backward", "both"]
    cross, back, *_ = rows
    assert cross["ratio"] == cross["ms"] == 1.0 and cross["limit"] == "exps" and back["limit"] == "exps"
    assert cross["of_limit"] == pytest.approx(2 * 16 * 77 / 1e9 / 1e-3)
    assert 0 < cross["error"] < 1e-5 and {"eager", "flash", "cudnn"} <= {*cross["all"], *cross["failed"]}
    assert "ModuleNotFoundError" in cross["failed"]["xformers"] and cross["failed"]["FA3"]
    assert rows[3]["limit"] == "bytes" and rows[3]["rate"].endswith("GB/s")
    assert {"eager", "eager NCHW", "compiled", "max-autotune"} <= {*rows[3]["all"], *rows[3]["failed"]}
    assert {"eager", "eager NCHW"} <= {*rows[3]["all"]}
    for row in rows[6:]:
        assert row["reason"].startswith("OutOfResources: ") and "ms" not in row and row["best_ms"] == 1.0
    text = (tmp_path / "kernels.md").read_text()
    assert "| cross_attention | cross b2 16x77 hd40 | forward | ok | 1.0000 (0.9000-1.1000) |" in text
    assert "| failing | " in text and "OutOfResources: out of resource: shared memory" in text
    assert "torch: " in text
    assert "failed: OutOfResources" in capsys.readouterr().out
    with Image.open(tmp_path / "kernels.png") as image:
        assert len(image.convert("RGB").getcolors(100000)) > 5


@interpreter
def test_bench_says_what_it_did_not_check(monkeypatch):
    kernel, case = geglu.KERNEL, geglu.KERNEL.cases[0]
    found = bench.check(kernel, case, torch.float32, "cpu")
    assert found["check"] == "ok" and set(found) == {"check", "error", "torch_error"}

    @wraps(kernel.forward)
    def off(x):
        return 1.01 * kernel.forward(x)

    wrong = replace(kernel, name="wrong", forward=off)
    assert bench.check(wrong, case, torch.float32, "cpu")["check"] == "wrong: y"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "errors", full)
    found = bench.check(kernel, case, torch.float32, "cpu")
    assert found == {"check": "not checked: float64 does not fit"}


@interpreter
def test_exponentials_are_counted_on_a_kernel_that_computes_them():
    y, x = torch.empty(16), torch.arange(8) / 8
    bench.exp_kernel[(2,)](y, 3, 8)
    for _ in range(3):
        x = torch.exp2(-x)
    assert torch.allclose(y, x.repeat(2), atol=1e-6)


@ordinary
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks without a GPU")
def test_bench_without_a_gpu(tmp_path):
    """It checks in the interpreter by itself, and says so; and it writes the shapes."""
    bench_of = [sys.executable, "-m", "minisd.kernels.bench", "--only", "geglu", "--out", str(tmp_path)]
    found = subprocess.run(bench_of, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert (
        "no CUDA device: Triton's interpreter, and nothing is timed" in found.stdout
        and "| ok |" in found.stdout
    )
    assert not list(tmp_path.iterdir())
    assert subprocess.run([*bench_of, "--dump"]).returncode == 0
    shapes = json.loads((tmp_path / "shapes.json").read_text())
    assert {shape["op"] for shape in shapes} == {"geglu"} and all(s["tensors"]["x"]["shape"] for s in shapes)


@ordinary
@pytest.mark.slow
@pytest.mark.skipif(gpu_cost.GPU, reason="takes minutes on a GPU")
def test_the_cost_of_whole_networks_is_measured(monkeypatch):
    """Every row, on a tiny network with a clock that always says 2 ms; on a CPU the kernels fail, and a
    stand-in is the graphs'."""
    monkeypatch.setattr(gpu_cost, "milliseconds", lambda call: ([call() for _ in range(3)], [2.0])[1])
    monkeypatch.setattr(graph, "backend", stand_in := StandIn())
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **kwargs: None)  # takes minutes on a CPU
    found = list(gpu_cost.rows(torch.float32, [1, 2], REACH, gpu_cost.VERSIONS))
    ops.choose("auto")
    graph.choose("auto")
    assert stand_in.recorded == 2 * 2 and stand_in.replays > stand_in.recorded
    assert len([row for row in found if row["step"] == "sampling"]) == 2 * len(gpu_cost.VERSIONS)
    for row in found:
        if "kernels" in row["how"]:
            assert row["reason"].startswith("ValueError: --kernels triton: ") and "ms" not in row
            assert "| ValueError: --kernels triton: " in report.line(gpu_cost.COLUMNS, row)
        else:
            assert row["step"] != "sampling" or "diffusers" in row["how"] or 0 < row["error"] < 1e-4
            assert row["rate"] == 500 and row["images"] == 500 * row["batch"] and row["of_floor"] > 0, row
    by_step = {(row["step"], row["batch"]): row for row in found if row["how"] == "minisd, torch"}
    one, two = by_step["sampling", 1], by_step["sampling", 2]
    assert two["flops"] == 2 * one["flops"] > 1e7 and two["bytes"] == one["bytes"]
    assert by_step["training", 2]["flops"] == pytest.approx(
        3 * one["flops"], rel=0.05
    )  # one has two branches
    assert by_step["training", 1]["bytes"] == 7 * one["bytes"]


@ordinary
@pytest.mark.slow
@pytest.mark.skipif(gpu_cost.GPU, reason="takes minutes on a GPU")
def test_the_cost_is_written(tmp_path):
    command = [sys.executable, gpu_cost.__file__, "--out", str(tmp_path), "--deterministic"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "| decoding | 1 | minisd, torch |" in found.stdout and "aten::" in found.stdout
    assert "no CUDA device: a tiny network, of which the errors mean something" in found.stdout
    assert "| sampling | 1 | diffusers |" in (tmp_path / "cost.md").read_text()
    assert json.loads((tmp_path / "cost.json").read_text())["about"]["deterministic"] is True
