"""A run that is killed at any moment goes on to the same bytes, by every method and in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill_runs import KINDS

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "count, kinds",
    [
        (3, ["textual_inversion-1", "lora-2"]),
        pytest.param(20, KINDS, marks=pytest.mark.slow),
    ],
    ids=["3", "20"],
)
def test_killed_runs_end_like_one_that_was_not(tmp_path, count, kinds):
    command = [sys.executable, str(HERE / "kill_runs.py"), str(tmp_path), str(count), *kinds]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert report["kinds"] == len(kinds) and report["kills"] == count
    assert report["killed"] >= 0.75 * count - 1  # most runs had not ended by themselves
    assert report["moments"] >= (4 if count == 20 else 2)  # and were at different updates
