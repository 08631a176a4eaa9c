"""The kernels' own tests need Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this is the session that it would start"
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(which):
    """Every test_kernel_*.py again, in a process of its own where the kernels run in the interpreter."""
    files = sorted(str(f) for f in HERE.glob("test_kernel_*.py"))
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, "--durations=5", *files]
    found = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
