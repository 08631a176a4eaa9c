"""The model in Python: it draws what the command draws, by the same flags."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from PIL import Image

import minisd
from minisd import cli
from minisd.adapters import lora
from minisd.sampling import run
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.options import Drawing, Loading, Sample
from tests.conftest import ROOT
from tests.lora_helpers import new

SIZE = {"width": 32, "height": 32, "steps": 3}


@pytest.fixture(scope="module")
def sd(model):
    return minisd.load(model, device="cpu")


def test_pictures_steps_and_progress(sd):
    heard = []
    drawn = sd.generate(["a cat", "a dog"], seed=7, num_images=2, on_step=heard.append, **SIZE)
    prompts, seeds = ["a cat", "a cat", "a dog", "a dog"], [7, 8, 9, 10]
    assert drawn == list(pictures(sd, prompts, seeds, Settings(**SIZE), batch_size=1))
    assert sum(heard) == 4 * 3
    steps = list(sd.steps("a dog", seed=9, **SIZE))
    assert [x.shape for x in steps] == [(1, 4, 8, 8)] * 3 and not any(x.requires_grad for x in steps)
    assert sd.pictures(steps[-1]) == [drawn[2]] and sd.pictures(steps[0]) != [drawn[2]]
    seen = []
    sd.generate("a cat", on_preview=seen.append, **SIZE)
    assert len(seen) == 3 and seen[0][0].size == (32, 32)


def test_the_command_draws_the_same(model, sd, tmp_path):
    flags = ["--seed", 3, "--negative_prompt", "ugly", "--scheduler", "euler", "--guidance_scale", 4]
    flags += [part for name, value in SIZE.items() for part in (f"--{name}", value)]
    flags += ["--model", model, "--device", "cpu", "--prompt", "a (cat:1.3)", "--output", tmp_path / "x.png"]
    run.run(cli.parse_sample(list(map(str, flags))))
    options = {"seed": 3, "negative_prompt": "ugly", "scheduler": "euler", "guidance_scale": 4.0}
    with Image.open(tmp_path / "x.png") as image:
        assert image.tobytes() == sd.generate("a (cat:1.3)", **options, **SIZE)[0].tobytes()


def test_pictures_in_and_loras_in_prompts(model, tmp_path):
    """A picture as a path, as text or as it is; a LoRA's scales are what they were afterwards."""
    sd = minisd.load(model, device="cpu")
    lora.save(tmp_path / "x.safetensors", new(model, ["attention"])[1])
    plain = sd.generate("a cat", **SIZE)[0]
    plain.save(tmp_path / "plain.png")
    files = tmp_path / "plain.png", str(tmp_path / "plain.png"), [tmp_path / "plain.png"], plain
    options = {"strength": 0.7, "steps": 3}
    redrawn = [sd.generate("a dog", image=file, **options)[0] for file in files]
    assert all(image == redrawn[0] for image in redrawn) and redrawn[0] not in (
        plain,
        *sd.generate("a dog", **SIZE),
    )
    sd.attach(tmp_path / "x.safetensors", 0.8)
    with_it = sd.generate("a cat", **SIZE)[0]
    sd.rescale("x", 0)
    assert sd.generate("a cat", **SIZE)[0] == plain != with_it
    assert sd.generate("a cat <lora:x:0.8>", lora_dir=str(tmp_path), **SIZE)[0] == with_it
    *_, last = sd.steps("a cat <lora:x:0.8>", lora_dir=tmp_path, **SIZE)
    assert sd.pictures(last) == [with_it] and sd.generate("a cat", **SIZE)[0] == plain


def test_keywords_have_the_names_of_flags(sd):
    ours = {"num_inference_steps": 3, "karras": True, "scheduler": "Euler", "width": 32, "height": 32}
    theirs = {**SIZE, "use_karras_sigmas": True, "scheduler": "euler"}
    assert sd.generate("a cat", **ours) == sd.generate("a cat", **theirs)


def test_mistakes(sd):
    for flags, error, message in [
        ({"stepps": 3}, TypeError, "there is no 'stepps'; did you mean 'steps'"),
        ({"device": "cpu"}, TypeError, "there is no 'device'"),
        ({"steps": 0}, ValueError, "--steps must be positive"),
        ({"width": 30}, ValueError, "--width must be a positive multiple of 8"),
        ({"mask": "x.png"}, ValueError, "--mask needs --image"),
        ({"image": "nowhere.png"}, ValueError, "nowhere.png"),
    ]:
        with pytest.raises(error, match=message):
            sd.generate("a cat", **flags)


def test_loading_is_as_said(model):
    """Every flag is for loading, for drawing, or about files; and importing minisd imports nothing heavy."""
    loading = {*inspect.signature(minisd.sampling.api.Model.load).parameters}
    assert {"model", "device", "dtype", "revision", "variant", "cache_dir"} <= loading
    elsewhere = {f.name for f in fields(Sample)} - {f.name for f in [*fields(Drawing), *fields(Loading)]}
    files = {"prompt_file", "like", "csv", "export", "output", "overwrite", "heatmap", "preview"}
    assert elsewhere == files
    assert minisd.load(model, device="cpu", dtype=torch.bfloat16).unet.conv_in.weight.dtype == torch.bfloat16
    code = "import sys, minisd; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"
