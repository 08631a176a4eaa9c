"""aot, bench and tune as far as a CPU can go: the parts around the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from minisd.kernels import aot, bench, geglu, launch, tune  # noqa: E402

interpreter = pytest.mark.skipif(not launch.INTERPRET, reason="test_kernels.py runs it in the interpreter")
ordinary = pytest.mark.skipif(launch.INTERPRET, reason="the interpreter compiles nothing")


@ordinary
def test_aot_finds_a_sound_kernel_sound():
    found = subprocess.run(
        [sys.executable, "-m", "minisd.kernels.aot", "--arch", "sm_90", "--only", "self 4096"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    assert "3 compilations" in found.stdout and "wgmma" in found.stdout


@ordinary
def test_aot_finds_spills_and_serial_wgmma(monkeypatch):
    """A tile that is known to be too large for its registers is reported, for both reasons."""
    monkeypatch.setitem(launch.TILES["attention_fwd"], 40, {80: launch.T(128, 128, 4)})
    call = next(c for c in aot.calls(90, "self 4096") if c[0] == "fwd_kernel")
    row = aot.measure(*call, 90)
    assert any("spills" in f for f in aot.faults(row)) and "wgmma serialised" in aot.faults(row)
    assert any("shared" in f for f in aot.faults(row | dict(shared=228 * 1024)))


def test_every_family_has_a_tile():
    for op, classes in launch.TILES.items():
        for shape_class, families in classes.items():
            assert 80 in families and set(families) <= {80, 86, 90, 100}, (op, shape_class)
    assert [launch.family(c) for c in (80, 86, 87, 89, 90, 100, 103, 120)] == [
        80,
        86,
        86,
        86,
        90,
        100,
        100,
        86,
    ]


@ordinary
def test_bench_table(monkeypatch):
    """The timed half with a clock that always says 1 ms, on the CPU references."""
    monkeypatch.setattr(bench, "quantiles", lambda call: (call(), (1.0, 0.9, 1.1))[1])
    row = bench.attention_row(1, 16, 77, 40)
    table = bench.time_row(row, torch.float32, dict(flops=1e12, bytes=1e12), device="cpu")
    assert [r["mode"] for r in table] == ["forward", "backward", "both"]
    assert all(r["ratio"] == 1.0 and r["best"] == "flash" for r in table)
    text = bench.markdown(table, dict(device="none"))
    assert "| attention | cross b1 16x77 hd40 | forward | 1.0000 (0.9000-1.1000) |" in text
    assert "attention both: geometric mean ratio 1.00" in text


@interpreter
def test_tuning_keeps_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setenv("MINISD_TILES", str(tmp_path / "sub" / "tiles.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tune.stored.cache_clear()
    small = torch.zeros(2, 64)
    monkeypatch.setattr(tune, "sample", lambda *_: lambda: geglu.forward(small))
    seen, run = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **meta: (seen.append(meta["BLOCK_N"]), run(*a, **meta)))
    monkeypatch.setattr(tune, "milliseconds", lambda call: (call(), abs(seen[-1] - 512))[1])
    table = dict(launch.TILES["geglu"]["any"])
    assert tune.winner("geglu", "any", torch.device("cpu")) == dict(BLOCK_N=512, num_warps=2)
    assert launch.TILES["geglu"]["any"] == table and set(seen) == {512, 1024, 2048}
    tune.stored.cache_clear()  # another process
    monkeypatch.setattr(tune, "search", lambda *_: pytest.fail("searched again"))
    assert tune.winner("geglu", "any", torch.device("cpu")) == dict(BLOCK_N=512, num_warps=2)
    assert list(json.loads((tmp_path / "sub" / "tiles.json").read_text())) == ["a chip/geglu/any"]
    assert os.listdir(tmp_path / "sub") == ["tiles.json"]
    tune.stored.cache_clear()


@ordinary
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_the_cost_of_whole_networks_is_measured():
    script = Path(__file__).with_name("gpu_cost.py")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "| VAE, decode | torch |" in found.stdout and "aten::" in found.stdout
