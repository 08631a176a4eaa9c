"""The commands of the installed package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import minisd
from tests.conftest import ROOT

PATHS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words, cwd, path=ROOT) -> subprocess.CompletedProcess:
    """`minisd WORDS` in a folder where nothing of the repository is."""
    env = os.environ | PATHS | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "minisd", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)


@pytest.mark.parametrize(
    "words, status, said",
    [
        ([], 0, "usage: minisd COMMAND"),
        (["--version"], 0, f"minisd {minisd.__version__}\n"),
        (["train", "--help"], 0, "usage: minisd train --method METHOD"),
        (["sample", "--promt", "x"], 2, "minisd sample: error: unknown flag --promt; did you mean --prompt?"),
        (["paint"], 2, "minisd: error: no command paint; there are train, sample, bench, judge"),
        (["compare"], 2, "minisd compare: error: the following arguments are required: RUN"),
        (["check", "--method", "erase", "--erase", "x"], 2, "--check_data is not a flag of this method"),
        (["compare", "nowhere"], 2, "minisd compare: error: nowhere/options.json does not exist"),
    ],
    ids=str,
)
def test_commands(tmp_path, words, status, said):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == status and said in done.stdout + done.stderr


def test_the_bench_without_triton(tmp_path):
    """As on Windows and macOS."""
    code = "import sys; sys.modules['triton'] = None; from minisd import __main__; __main__.main()"
    command = [sys.executable, "-c", code, "bench"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | PATHS)
    assert done.returncode == 2
    assert done.stderr == "minisd bench: error: it needs the package triton, which is missing\n"


def test_check(tmp_path, cat):
    """It reports, leaves nothing behind, and fails as the run would."""
    flags = ["--method", "lora", "--data", cat]
    done = run("check", *flags, "--instance_prompt", "x", cwd=tmp_path)
    assert done.returncode == 0 and "the same content: 0" in done.stdout and not [*tmp_path.iterdir()]
    done = run("check", *flags, cwd=tmp_path)
    assert done.returncode == 2 and "captions come from" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_is_whole(tmp_path):
    """Each command runs from an unpacked wheel in an empty folder, which has all that is not code too."""
    source = tmp_path / "source"  # where building leaves its folders
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    drawn = run("sample", "--prompt", "3d emoji of a cat", "--steps", 2, cwd=here, path=installed)
    assert drawn.returncode == 0 and (here / "samples" / "00000-seed-0.png").exists(), drawn.stderr
    flags = ["--method", "textual_inversion", "--data", ROOT / "cat", "--max_train_steps", 2]
    trained = run("train", *flags, cwd=here, path=installed)
    assert (here / "text-inversion-model" / "learned_embeds.safetensors").exists(), trained.stderr
    for words in (["bench", "--only", "geglu"], ["judge", "--help"]):
        done = run(*words, cwd=here, path=installed)
        assert done.returncode == 0, done.stderr


def test_a_source_distribution_is_whole(tmp_path):
    """It has every file of the repository, the two commands and the pictures to try them with among them."""
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(*tmp_path.glob("*.tar.gz")) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"train.py", "sample.py", "cat/1.png", "docs/Containerfile"} <= files <= packed


@pytest.mark.parametrize("command", ["--help", "train --method lora --help", "sample --prompt x --steps 1"])
@pytest.mark.parametrize("streams", ["", "2>&1"])
def test_who_reads_the_output_may_end(command, streams, tmp_path):
    """As head does: the command ends without a word, as one that SIGPIPE ends; help may as well end well."""
    line = f"{sys.executable} -m minisd {command} 2>err {streams} | true; echo ${{PIPESTATUS[0]}} > status"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, timeout=100, check=True)
    assert (tmp_path / "status").read_text() in ("141\n", "0\n" if "method" in command else "")
    assert "rror" not in (tmp_path / "err").read_text()
