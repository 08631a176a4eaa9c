"""Flags, values and paths as users of the field's other programs write them."""

import json
import sys
from dataclasses import fields

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from minisd import cli, registry
from minisd.sampling.options import Sample
from minisd.spelling import ELSEWHERE, as_written
from minisd.training import run_folder

# Errors and notices


def test_errors_name_every_flag_as_it_was_written(tmp_path, monkeypatch, command):
    """From the command line, and from the reading of the data."""
    monkeypatch.chdir(tmp_path)
    for flag in ("--data", "--train_data_dir", "--instance_data_dir"):
        for argv in ([flag, "kat"], [f"{flag}=kat"]):
            status, _, err = command("train.py", "--method", "textual_inversion", *argv)
            assert (status, err) == (2, f"train.py: error: {flag}: there is no kat\n")
    captioned = ["train.py", "--method", "text_to_image", "--dataset_name", "x"]
    for flag in ("--num_train_epochs", "--num_epochs"):
        assert command(*captioned, flag, 0)[2].endswith(f"error: {flag} must be positive\n")
        assert command(*captioned, flag, "x")[2].endswith(f"argument {flag}: invalid int value: 'x'\n")
    for flag in ("--steps", "--num_inference_steps"):
        assert f"error: {flag} must be positive" in command("sample.py", "--prompt", "x", flag, 0)[2]


def test_every_other_spelling_of_a_flag_is_named():
    """Every flag of every command that has several: the one that was given stands in the message."""
    for cls in [Sample, *(cli.options_of(m) for m in registry.names("methods"))]:
        parser = cli.parser_of(cls, "x", "")
        for spelling, f in cli.names_of(cls).items():
            cli.SPELLED.clear()
            action = parser._option_string_actions[f"--{spelling}"]
            value = [] if action.nargs == 0 else [str((action.choices or ["1"])[0])]
            required = [f"--{n}=1" for n in (f.name for f in fields(cls) if cli.default_of(f) is cli.MISSING)]
            parser.read([*required, f"--{spelling}", *value])
            message = as_written(f"--{f.name} is bad: /a--{f.name}, {f.name}")
            assert message == f"--{spelling} is bad: /a--{f.name}, {f.name}"


def test_notices_too(model, captioned, tmp_path, monkeypatch, command):
    for tracker in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, tracker, None)
    argv = ["--method", "lora", "--model", model, "--data", captioned, "--output_dir", tmp_path / "out"]
    argv += "--resolution 32 --max_train_steps 1 --train_batch_size 1 --num_validation_images 1".split()
    out = command("train.py", *argv, "--logger", "comet_ml")[1]
    assert "--logger comet_ml: minisd does not log there; log.jsonl is kept" in out
    out = command("train.py", *argv, "--report_to", "all", "--overwrite")[1]
    assert "--report_to tensorboard: not installed" in out and "--report_to wandb: not installed" in out


def test_the_data_is_looked_at_first(model, cat, tmp_path, command, monkeypatch):
    """Before the model is read, before class images are drawn, and before a word for the token is sought."""
    monkeypatch.chdir(tmp_path)  # where no earlier run has left a result
    read = []
    monkeypatch.setattr(
        "minisd.sampling.stable_diffusion.StableDiffusion.load", lambda *a, **k: read.append(1) or 1 / 0
    )
    prior = ["--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", tmp_path / "class"]
    methods = {m for m in registry.names("methods") if "data" in cli.options_of(m).__dataclass_fields__}
    for method in methods - {"unconditional"}:
        needs = {
            "dreambooth": ["--instance_prompt", "x", *prior],
            "custom_diffusion": ["--instance_prompt", "x"],
        }
        argv = ["--method", method, "--model", model, "--data", tmp_path / "kat", *needs.get(method, [])]
        status, _, err = command("train.py", *argv)
        assert (status, err) == (2, f"train.py: error: --data: there is no {tmp_path / 'kat'}\n")
    assert not read and not (tmp_path / "class").exists()


# Names of other programs


@pytest.mark.parametrize(
    "script, wrong, ours",
    [
        ("sample.py", "--cfg", "--guidance_scale"), ("sample.py", "--sampler", "--scheduler"),
        ("sample.py", "--denoising_strength=0.5", "--strength"), ("sample.py", "--H", "--height"),
        ("lora", "--network_dim", "--rank"), ("lora", "--min_snr_gamma", "--snr_gamma"),
        ("textual_inversion", "--init_word", "--initializer_token"), ("lora", "--steps", "--max_train_steps"),
    ],
)  # fmt: skip
def test_names_of_other_programs(script, wrong, ours, command):
    argv = ["sample.py"] if script == "sample.py" else ["train.py", "--method", script]
    status, _, err = command(*argv, wrong)
    assert status == 2 and err.endswith(f"unknown flag {wrong.partition('=')[0]}; did you mean {ours}?\n")


def test_a_name_of_another_program_for_a_flag_of_another_method(command):
    err = command("train.py", "--method", "text_to_image", "--network_dim", 8)[2]
    theirs = "it belongs to: dpo, lcm, lora, reward, sliders\n"
    assert err.endswith(f"--network_dim, here --rank, is not a flag of this method; {theirs}")


def test_the_names_of_other_programs_lead_somewhere():
    """Each to a flag that exists, and none hides a flag of a command that has both."""
    classes = [Sample, *(cli.options_of(m) for m in registry.names("methods"))]
    known = [cli.names_of(cls).keys() for cls in classes]
    for theirs, ours in ELSEWHERE.items():
        assert any(ours in names for names in known), ours
        assert not any({theirs, ours} <= names for names in known), theirs


def test_schedulers_by_their_names_in_diffusers(model, command, tmp_path):
    """The same bytes by either name, but for what says how; and the classes are there."""
    diffusers = pytest.importorskip("diffusers")
    for name in registry.names("schedulers"):
        module = registry.load("schedulers", name)
        cls = getattr(module, "DIFFUSERS", None)
        assert cls is None or hasattr(diffusers, cls)
        assert registry.find("schedulers", cls or module.A1111) == name
    flags = ["--model", model, "--prompt", "x", "--steps", 2, "--width", 32, "--height", 32]
    pictures = {}
    for name in ("DPMSolverMultistepScheduler", "dpmpp_2m", "DDPMScheduler", "ddpm", "DPM++ 2M Karras",
                 "DPMSolverMultistepScheduler Karras"):  # fmt: skip
        out = tmp_path / f"{name}.png"
        assert command("sample.py", *flags, "--scheduler", name, "--output", out)[0] == 0
        pictures[name] = out.read_bytes()
    karras = tmp_path / "flag.png"
    assert command("sample.py", *flags, "--scheduler", "dpmpp_2m", "--karras", "--output", karras)[0] == 0
    assert pictures["DPMSolverMultistepScheduler"] == pictures["dpmpp_2m"] != pictures["ddpm"]
    assert pictures["DDPMScheduler"] == pictures["ddpm"]
    assert (
        pictures["DPM++ 2M Karras"] == pictures["DPMSolverMultistepScheduler Karras"] == karras.read_bytes()
    )
    assert karras.read_bytes() != pictures["dpmpp_2m"]
    contrary = command("sample.py", *flags, "--scheduler", "DPM++ 2M Karras", "--no-karras")
    assert contrary[0] == 2 and "--no-karras excludes" in contrary[2]


def test_the_scheduler_of_validation_images(short_run, tmp_path):
    """By the classes that the field's flag takes: each draws what its module draws, not what another does."""
    from tests.method_helpers import built

    drawn = {}
    for name in ("DPMSolverMultistepScheduler", "dpmpp_2m", "DDPMScheduler", "dpmpp_2m karras"):
        m, _, _ = built("dreambooth", short_run("dreambooth", "--instance_prompt", "x",
                                                "--validation_scheduler", name))  # fmt: skip
        drawn[name] = m.samples("x")[0].tobytes()
    assert drawn["DPMSolverMultistepScheduler"] == drawn["dpmpp_2m"]
    assert len(set(drawn.values())) == 3


# Seeds, paths, files


def test_a_seed_of_minus_one_is_drawn(model, command, tmp_path):
    flags = ["--model", model, "--prompt", "x", "--steps", 1, "--width", 32, "--height", 32]
    for out in ("one", "two", "again"):
        seed = -1
        if out == "again":
            (drawn,) = (tmp_path / "two").glob("*.png")
            seed = drawn.stem.rpartition("-")[2]
        assert command("sample.py", *flags, "--seed", seed, "--output", tmp_path / out)[0] == 0
    one, two, again = (next((tmp_path / out).iterdir()) for out in ("one", "two", "again"))
    assert one.name != two.name and two.name == again.name and two.read_bytes() == again.read_bytes()
    with Image.open(two) as image:
        assert f"Seed: {two.stem.rpartition('-')[2]}," in image.text["parameters"]
    err = command("train.py", "--method", "lora", "--data", "x", "--seed", -1)[2]
    assert "--seed must not be negative" in err


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--method", "lora", "--data=~/photos", "--model=~/m", "--output_dir", "~", "--init_lora=~/l"]
    o = cli.parse_train([*argv, "--instance_prompt", "~a photo"])[1]
    assert (o.data, o.model, o.output_dir) == (tmp_path / "photos", f"{tmp_path}/m", tmp_path)
    assert o.init_lora == tmp_path / "l" and o.instance_prompt == "~a photo"
    (tmp_path / "rows.csv").write_text("image\n~/a.png\n")
    argv = ["--model", "m", "--prompt", "x", "--adapter", "~/l:0.5", "b", "--csv", "~/rows.csv"]
    (job,) = cli.parse_sample(argv)
    assert job.options.adapter == [f"{tmp_path}/l:0.5", "b"] and job.options.image == [tmp_path / "a.png"]
    from minisd.data import concepts

    (tmp_path / "c.json").write_text(json.dumps([{"instance_prompt": "x", "instance_data_dir": "~/i"}]))
    assert concepts.read_concepts(tmp_path / "c.json")[0].instance_data_dir == tmp_path / "i"


def test_a_controlnet_s_file_of_weights(tmp_path):
    """Taken with the config.json beside it, under any name."""
    from minisd.adapters import controlnet as adapter
    from minisd.formats.diffusers import save_part
    from minisd.models import controlnet
    from tests.helpers import TINY_UNET

    torch.manual_seed(0)
    network = controlnet.ControlNet(controlnet.ControlNetConfig.of(TINY_UNET, (4, 8, 12, 16)))
    save_part(tmp_path, network)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    for name in (file.name, "canny.safetensors"):
        file = file.rename(tmp_path / name)
        read = adapter.load(file)
        assert read.config == network.config
        assert all(t.equal(read.state_dict()[n]) for n, t in network.state_dict().items())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist"):
        adapter.load(file)


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "unconditional"])
def test_a_run_goes_on_in_another_folder(method, short_run, tmp_path):
    """Its tensors are those of a run that was not stopped; in the metadata, the folder's name differs."""
    from dataclasses import replace

    from tests.method_helpers import train

    flags = ["--caption_column", "text", "--instance_prompt", "x"] if method == "lora" else []
    if method == "unconditional":
        flags = ["--ddpm_num_inference_steps", 1, "--eval_batch_size", 1]
    o = short_run(method, *flags, max_train_steps=3, checkpointing_steps=2)
    assert train(method, replace(o, output_dir=tmp_path / "whole")) == 0
    source = str(tmp_path / "whole" / "checkpoint-2")
    assert train(method, replace(o, output_dir=tmp_path / "other", resume_from_checkpoint=source)) == 0
    results = [sorted(p for p in (tmp_path / out).rglob("*.safetensors") if "checkpoint" not in str(p))
               for out in ("whole", "other")]  # fmt: skip
    assert results[0] and len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        tensors = load_file(one), load_file(other)
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
        with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
            differing = {k for k, v in (a.metadata() or {}).items() if b.metadata()[k] != v}
        assert differing == ({"ss_output_name", "modelspec.title"} if method == "lora" else set())


def test_memory_without_the_module_resource(monkeypatch):
    """As on Windows; and in the unit of each system."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    linux = run_folder.peak_memory()
    assert 0.05 < float(linux.removesuffix("G")) < 50
    monkeypatch.setattr(sys, "platform", "darwin")
    assert float(run_folder.peak_memory().removesuffix("G")) < 0.05
    monkeypatch.setitem(sys.modules, "resource", None)
    assert run_folder.peak_memory() == "?"
