"""A run that is killed at any moment goes on to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_killed_runs_end_like_one_that_was_not(model, cat, tmp_path):
    command = [sys.executable, str(HERE / "kill_runs.py"), str(model), str(cat), str(tmp_path), "20"]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert report["killed"] >= 15  # the moments were real ones: most runs had not ended by themselves
    assert len(set(report["at"])) >= 3  # and different ones
