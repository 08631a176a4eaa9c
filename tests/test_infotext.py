"""How a picture was made, written and read: our own texts and A1111's."""

from dataclasses import fields

import pytest
from PIL import Image, PngImagePlugin

from minisd import cli
from minisd.data import images
from minisd.sampling import infotext
from minisd.sampling.options import Sample, Settings

PROMPTS = [
    ("a cat", ""),
    ("", ""),
    ("", "ugly"),
    ('a "cat", sitting: 4k, (best:1.2) [b] \\(c\\)', 'low "quality": bad, worse'),
    ("two\nlines\n\nand more", "not\nthis"),
    ("a cat, Steps: 20, Sampler: x, CFG scale: 7", "Steps: 20, Sampler: x, CFG scale: 7"),
    ("猫と犬、“quoted” – ёлка 🐈", "ünschön, 悪い"),
    (" blanks around \n", "  too "),
    ("x\nNegative prompt: y", "z\nNegative prompt: w"),
    ("Negative prompt: y", ""),
    ("back\\slash, \"\\\" and ,,::", "tab\tand \r\n"),
]  # fmt: skip


NAMES = [f.name for f in fields(Sample) if infotext.key_of(f)]


@pytest.mark.parametrize("prompt, negative", PROMPTS)
def test_prompts_come_back(tmp_path, prompt, negative):
    settings = Settings(width=64, height=32, negative_prompt=negative)
    images.save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", infotext.write(prompt, 3, "m", settings))
    text = infotext.read(tmp_path / "x.png")
    assert infotext.parse(text)[:2] == (prompt, negative)
    found, about, ignored = infotext.flags(text)
    assert (found["prompt"], found["negative_prompt"]) == ([prompt], [negative])
    assert about["Version"] == "minisd" and not ignored


VALUES = {
    str: ["a: \"b\", c\n'd' = 猫", "-x", " y "],
    int: [7],
    float: [0.1, 1 / 3, 12.5, 1e-7],
    bool: [True, False],
}


def values_of(f):
    """Something to write for a field, and of what is to come back."""
    kind = str(f.type)
    if f.name == "scheduler":
        return ["ddpm"]
    if "Literal" in kind:
        return []
    if kind.startswith("list"):
        return [["a b:0.5", "c,d", '"e": f'], ["only one"]] if "str" in kind else []
    found = [v for name, v in ((t.__name__, v) for t, v in VALUES.items()) if name in kind]
    return found[0] if found else []


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_that_shapes_a_picture_comes_back(name):
    """A flag that is added to sample.py is written and read without another line."""
    (f,) = [f for f in fields(Sample) if f.name == name]
    for value in values_of(f):
        options = object.__new__(Sample)
        for other in fields(Sample):
            default = other.default_factory() if callable(other.default_factory) else other.default
            setattr(options, other.name, default)
        options.width, options.height = 64, 64
        setattr(options, name, value)
        seed = value if name == "seed" else 0
        found, _, ignored = infotext.flags(infotext.write("p", seed, "m", options))
        default = f.default_factory() if callable(f.default_factory) else f.default
        written = value if isinstance(value, list) else [value]
        if value != default or name in found:
            read = {bool: lambda text: text == "True", str: str, int: int, float: float}
            got = [read[type(w)](text) for w, text in zip(written, found[name], strict=True)]
            assert got == (["DDPM"] if name == "scheduler" else written)
        assert not ignored


A1111 = """masterpiece, (a cat:1.2), <lora:toy:0.8>,
sitting
Negative prompt: lowres, bad anatomy
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3517023455, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.55, Clip skip: 2, \
Hires upscale: 1.5, Lora hashes: "toy: 4c9bb6a4e9f5, other: 123456789abc", Version: v1.9.4"""


def test_a1111_texts_are_read():
    found, about, ignored = infotext.flags(A1111)
    assert found == {
        "prompt": ["masterpiece, (a cat:1.2), <lora:toy:0.8>,\nsitting"],
        "negative_prompt": ["lowres, bad anatomy"],
        "steps": ["28"], "scheduler": ["DPM++ 2M"], "schedule_type": ["karras"], "guidance_scale": ["6.5"],
        "seed": ["3517023455"], "width": ["512"], "height": ["768"], "strength": ["0.55"],
        "clip_skip": ["2"], "rng": ["nv"],
    }  # fmt: skip
    assert about["Lora hashes"] == "toy: 4c9bb6a4e9f5, other: 123456789abc"
    assert ignored == ["Model hash", "Hires upscale", "Lora hashes"]


def test_older_a1111_texts_name_the_schedule_with_the_sampler():
    for name, kind in (("Karras", "karras"), ("Exponential", "exponential")):
        text = f"x\nSteps: 20, Sampler: DPM++ 2M SDE {name}, CFG scale: 7, Seed: 1, Size: 512x512"
        found = infotext.flags(text)[0]
        assert (found["scheduler"], found["schedule_type"]) == (["DPM++ 2M SDE"], [kind])


@pytest.mark.parametrize(
    "kind, word", [("karras", "Karras"), ("exponential", "Exponential"), ("sgm_uniform", "SGM Uniform")]
)
@pytest.mark.parametrize(
    "name, sampler", [("dpmpp_3m_sde", "DPM++ 3M SDE"), ("unipc", "UniPC"), ("heun", "Heun")]
)
def test_samplers_and_levels_go_by_a1111_s_names(name, sampler, kind, word):
    settings = Settings(width=64, height=64, scheduler=name, schedule_type=kind)
    text = infotext.write("x", 1, "m", settings)
    assert f"Sampler: {sampler}, Schedule type: {word}," in text
    found, _, ignored = infotext.flags(text)
    again = Settings(scheduler=found["scheduler"][0], schedule_type=found["schedule_type"][0])
    assert (again.scheduler, again.schedule_type, ignored) == (name, kind, [])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"scheduler": "DPM++ 2M Karras", "schedule_type": "uniform"}, "uniform excludes --scheduler, whose"),
        ({"use_karras_sigmas": True, "schedule_type": "exponential"}, "--use_karras_sigmas excludes"),
        ({"use_karras_sigmas": False, "schedule_type": "karras"}, "--no-use_karras_sigmas excludes"),
    ],
)
def test_flags_that_say_two_things(flags, message):
    with pytest.raises(ValueError, match=message):
        Settings(**flags)


def test_a_text_without_a_last_line_is_a_prompt():
    assert infotext.parse("a cat: red, dog: blue\nmore") == ("a cat: red, dog: blue\nmore", "", [])


def save(path, text, **more):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)  # as A1111 writes it: Latin-1 where that will do
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_like_takes_what_the_command_line_leaves_open(tmp_path, capsys):
    file = save(tmp_path / "a.png", A1111.replace("DPM++ 2M", "DDIM").replace("Schedule type: Karras, ", ""))
    (job,) = cli.parse_sample(["--like", str(file), "--model", "m", "--steps=5", "--lora_dir", "l"])
    o = job.options
    assert (o.steps, o.seed, o.guidance_scale, o.clip_skip) == (5, 3517023455, 6.5, 2)
    assert (o.width, o.height, o.model, o.scheduler.lower()) == (512, 768, "m", "ddim")
    assert o.prompt == ["masterpiece, (a cat:1.2), <lora:toy:0.8>,\nsitting"]
    out = capsys.readouterr().err.splitlines()
    assert [line for line in out if "Hires upscale, Lora hashes" in line and str(file) in line]
    assert [line for line in out if "Lora hashes, Denoising strength" in line]  # no picture to begin with
    assert job.options.rng == "nv" and [line for line in out if "--rng cpu" in line]
    other = save(
        tmp_path / "b.png", A1111.replace("DPM++ 2M", "DDIM").replace(", Version", ", RNG: CPU, Version")
    )
    argv = ["--like", str(other), "--model", "m", "--schedule_type", "uniform"]
    assert cli.parse_sample(argv)[0].options.rng == "cpu"
    (job,) = cli.parse_sample(["--like", str(file), "--model", "m", "--prompt", "b", "c"])
    assert job.options.prompt == ["b", "c"] and job.options.negative_prompt == "lowres, bad anatomy"


@pytest.mark.parametrize(
    "text, message",
    [
        (A1111, "by --model"),
        (A1111.replace("DPM++ 2M", "DPM++ 2N"), "did you mean 'dpmpp_2m'?; or choose one by --scheduler"),
        (A1111.replace("Steps: 28", "Steps: many"), "invalid int value: 'many'"),
        (None, "no `parameters`"),
        (b"no picture", "cannot be read"),
    ],
)
def test_like_that_cannot(tmp_path, capsys, text, message):
    file = tmp_path / "a.png"
    if isinstance(text, bytes):
        file.write_bytes(text)
    elif text is None:
        Image.new("RGB", (8, 8)).save(file)
    else:
        save(file, text)
    argv = ["--like", str(file)] + ([] if "--model" in message else ["--model", "m"])
    with pytest.raises(SystemExit) as e:
        cli.parse_sample(argv)
    assert e.value.code == 2
    err = capsys.readouterr().err.strip()
    assert message in err and str(file) in err and len(err.splitlines()) == 1
