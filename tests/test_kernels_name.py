"""The folder `kernels/` is importable as `minisd.kernels` alone, whatever else is called `kernels`."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def python(code: str, cwd: Path, path: str) -> str:
    env = {"PYTHONPATH": path, "PATH": "", "HOME": str(cwd)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_imports_from_the_repository_root():
    out = python("from transformers import CLIPTextModel; print(CLIPTextModel.__name__)", ROOT, str(ROOT))
    assert out == "CLIPTextModel"


def test_an_installed_package_named_kernels_stays_importable(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    code = "import kernels, minisd.kernels; print(kernels.OWNER, minisd.kernels.__path__)"
    out = python(code, ROOT, f"{ROOT}:{tmp_path}")
    assert out == f"somebody else {[str(ROOT / 'kernels')]}"
