"""A picture's way through the project is short, and nothing on it is done twice."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from minisd import cli
from minisd.data import images
from minisd.sampling import prompt, run
from tests.conftest import ROOT


def test_a_picture_passes_few_files():
    """As tests/trace_picture.py counts: in all, and without what the command line and the networks call."""
    command = [sys.executable, str(ROOT / "tests" / "trace_picture.py"), str(ROOT)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = [list(map(int, pair)) for pair in re.findall(r": (\d+) files, (\d+) hops", out)]
    most = [(28, 106), (18, 33)]
    assert len(counts) == 2
    assert all(
        c <= m for pair, bounds in zip(counts, most, strict=True) for c, m in zip(pair, bounds, strict=True)
    )


def test_prompts_are_parsed_and_files_read_once(tmp_path, monkeypatch):
    """Each text, however many pictures and batches it is for, the negative prompt too."""
    (tmp_path / "prompts.txt").write_text("a (cat:1.2)\na dog\na (cat:1.2)\n")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    parsed, opened, read = [], [], []
    parse, open_image, read_text = prompt.parse, images.open_image, Path.read_text
    monkeypatch.setattr(prompt, "parse", lambda text, plain=False: parsed.append(text) or parse(text, plain))
    monkeypatch.setattr(
        images, "open_image", lambda path, **o: opened.append(path.name) or open_image(path, **o)
    )
    monkeypatch.setattr(Path, "read_text", lambda path, **o: read.append(path.name) or read_text(path, **o))
    flags = ["--prompt_file", tmp_path / "prompts.txt", "--negative_prompt", "[ugly]", "--num_images", 2]
    flags += ["--steps", 2, "--image", tmp_path / "photo.png", "--output", tmp_path, "--device", "cpu"]
    assert len(run.run(cli.parse_sample(list(map(str, flags))))) == 7
    assert sorted(parsed) == ["[ugly]", "a (cat:1.2)", "a dog"]
    assert opened == ["photo.png"] and read.count("prompts.txt") == 1
