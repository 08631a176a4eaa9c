"""aot and bench as far as a CPU can go: the parts around the GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernel_helpers import interpreter, ordinary

pytest.importorskip("triton")
from minisd.kernels import aot, attention, bench, cross_attention, launch  # noqa: E402


@ordinary
@pytest.mark.slow
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
    monkeypatch.setitem(attention.FWD_TILES.table, 40, {80: attention.Tile(128, 128, 4)})
    row = next(aot.measure(90, "self 4096"))
    assert row["kernel"] == "fwd_kernel"
    assert any("spills" in f for f in aot.faults(row)) and "wgmma serialised" in aot.faults(row)
    assert any("shared" in f for f in aot.faults(row | dict(shared=228 * 1024)))


def test_gpu_families():
    chips = {80: 80, 86: 86, 87: 86, 89: 86, 90: 90, 100: 100, 103: 100, 120: 86}
    assert {chip: launch.family(chip) for chip in chips} == chips


@interpreter
def test_bench_table(monkeypatch):
    """The timed half with a clock that always says 1 ms."""
    monkeypatch.setattr(bench, "quantiles", lambda call: (call(), (1.0, 0.9, 1.1))[1])
    case = attention.case("cross b1 16x77 hd40", 1, 16, 77, 8, 40)
    limits = dict(flops=1e12, bytes=1e12)
    table = bench.time_case(cross_attention.KERNEL, case, torch.float32, limits, device="cpu")
    assert [r["mode"] for r in table] == ["forward", "backward", "both"]
    assert all(r["ratio"] == 1.0 and r["best"] == "flash" for r in table)
    text = bench.markdown(table, dict(device="none"))
    assert "| cross_attention | cross b1 16x77 hd40 | forward | 1.0000 (0.9000-1.1000) |" in text
    assert "cross_attention both: geometric mean ratio 1.00" in text


@ordinary
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_the_cost_of_whole_networks_is_measured():
    script = Path(__file__).with_name("gpu_cost.py")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "| VAE, decode | torch |" in found.stdout and "aten::" in found.stdout
