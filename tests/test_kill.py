"""A run that is killed at any moment goes on to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_like_one_that_was_not(model, cat, tmp_path, count):
    command = [sys.executable, str(HERE / "kill_runs.py"), str(model), str(cat), str(tmp_path), str(count)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert report["killed"] >= 0.75 * count - 1  # most runs had not ended by themselves
    assert len(set(report["at"])) >= (3 if count == 20 else 2)  # and different ones
