"""What stands in a terminal of 80 columns, and what in a log file, while something goes on."""

import io
import os
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from minisd import cli, registry, terminal
from minisd.training.run_folder import BAR
from tests.conftest import ROOT


class Live(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str, columns: int = 80) -> list[str]:
    """The lines of a terminal after this was written."""
    lines, row, at = [""], 0, 0
    for c in written:
        if c == "\r":
            at = 0
        elif c == "\n":
            row, at = row + 1, 0
            lines.append("")
        else:
            if at == columns:
                lines.append("")
                row, at = row + 1, 0
            lines[row] = lines[row][:at].ljust(at) + c + lines[row][at + 1 :]
            at += 1
    return [line.rstrip() for line in lines]


def work(stream: io.StringIO, monkeypatch) -> str:
    """Two bars, the second within the first, with lines from several places meanwhile."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.shared():
        with tqdm(total=3, desc="outer", bar_format=BAR, ncols=80, mininterval=0) as bar:
            bar.update()
            print("kernels: a line", file=sys.stderr)
            bar.update()
            for _ in tqdm(range(2), desc="inner", mininterval=0, **terminal.BRIEF):
                sys.stdout.write("in two ")
                sys.stdout.write("parts\n")
            bar.update()
        print("the end")
    return stream.getvalue()


def test_lines_go_above_a_bar(monkeypatch):
    lines = screen(work(Live(), monkeypatch))
    assert [line for line in lines if "outer" not in line] == [
        "kernels: a line", "in two parts", "in two parts", "the end", "",
    ]  # fmt: skip
    (bar,) = [line for line in lines if "outer" in line]
    assert bar.startswith("outer 3/3 ") and lines[-3] == bar


def test_a_file_gets_lines(monkeypatch):
    """The end of each bar that stays, and others only if they take long."""
    text = work(io.StringIO(), monkeypatch)
    assert "\r" not in text
    assert [re.sub(r"(?<=3/3).*", "", line) for line in text.splitlines()] == [
        "kernels: a line", "in two parts", "in two parts", "outer 3/3", "the end",
    ]  # fmt: skip
    monkeypatch.setattr(terminal, "SECONDS", 0.0)
    slow = work(io.StringIO(), monkeypatch).splitlines()
    assert [i for i, line in enumerate(slow) if line.startswith("outer 1/3")] == [1]
    assert any(line.startswith("inner:  50%") for line in slow)


@pytest.mark.parametrize("method", registry.names("methods"))
def test_a_training_bar_within_80_columns(method):
    """Long runs too: nothing of loss, learning rate, speed, time left and memory is cut off."""
    looks = {"ncols": 80, "prefix": method, "bar_format": BAR, "postfix": "loss 0.123 lr 1.2e-05 13.4G"}
    for done, seconds in ((1, 4), (5000, 400), (15000, 1200)):
        line = tqdm.format_meter(done, 15000, seconds, **looks)
        assert len(line) <= 80 and "13.4G" in line and "it/s" in line and " left" in line, line


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_run_in_a_terminal(tmp_path):
    """In 80 columns: every line whole, the bar among them, and none broken by another."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    flags = ["--method", "lora", "--data", ROOT / "cat", "--max_train_steps", 3, "--num_validation_images", 1]
    command = [sys.executable, ROOT / "train.py", *flags, "--output_dir", tmp_path / "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}
    run = subprocess.Popen(list(map(str, command)), stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the other end is closed
        pass
    assert run.wait() == 0, written.decode()
    lines = screen(written.decode().replace("\r\n", "\n"), 10**6)
    assert "kernels: torch, the tensors are on cpu" in lines
    (bar,) = [line for line in lines if line.startswith("lora 3/3 ")]
    assert len(bar) <= 80 and "loss" in bar and "lr" in bar and bar.count("G") == 1, bar
    assert [line for line in lines if "drawing" in line or "encoding" in line] == []


def test_closed_streams(monkeypatch):
    """As of `sample.py >&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with terminal.shared():
        print("nobody hears this")
        assert list(tqdm(range(2))) == [0, 1]  # whose bar goes to stderr
    assert sys.stdout is None and sys.stderr is None


def test_an_error_that_nobody_can_hear(monkeypatch):
    """A full disk or a closed pipe does not change the status."""
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert terminal.complain("sample.py", "x") == 2
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_help_fits_the_terminal(monkeypatch):
    for columns in (80, 100, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = cli.parser_of(cli.Sample, "sample.py", "").format_help()
        widest = max(len(line) for line in text.splitlines())
        assert 0.9 * min(columns, 110) < widest <= min(columns, 110)


def test_where_only_unix_s_modules_are_missing():
    """As on Windows: all commands are there, and the bar says that it does not know the memory."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'termios', 'pwd', 'grp']))\n"
        "import minisd.__main__, minisd.testing, minisd.sampling.run, minisd.tiny.judge\n"
        "from minisd.training.run_folder import peak_memory; print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "?\n", done.stderr
