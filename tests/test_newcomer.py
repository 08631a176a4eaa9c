"""What people run into who are new here: each time one line that says what to do."""

import importlib
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from minisd import cli, registry
from minisd.data import images, source
from minisd.options import TINY, Training, flag
from minisd.sampling import infotext, run
from minisd.training import distributed
from tests import method_helpers
from tests.conftest import ROOT

CAT = ROOT / "cat"
DRAW = ["--steps", 1, "--device", "cpu", "--prompt"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, Path]:
    """The folders of short runs by method, all of the tiny model."""
    found = {}
    words = {"custom_diffusion": ["--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>"]}
    for method in ("textual_inversion", "lora", "custom_diffusion"):
        found[method] = tmp_path_factory.mktemp("runs") / method
        argv = ["--method", method, "--data", CAT, "--max_train_steps", 1, "--num_validation_images", 1]
        argv += ["--output_dir", found[method], *words.get(method, [])]
        name, o = cli.parse_train(list(map(str, argv)))
        method_helpers.train(name, o)
    return found


# --- Prompts and adapters ----------------------------------------------------------------------------------


def test_a_token_without_its_adapter_and_an_adapter_without_its_token(learned, tmp_path, command):
    token = learned["textual_inversion"]
    for adapter, prompt, said in (
        ([], "a photo of a <cat>", ["prompt: <cat> is no token"]),
        ([], "a <lora:x:0> cat", []),
        (["--adapter", token], "a photo of a <CAT>", []),
        (["--adapter", token], "a photo of a cat", ["--adapter: its token <cat> is in no prompt"]),
    ):
        lora = ["--lora_dir", learned["lora"].parent] if "lora" in prompt else []
        prompt = prompt.replace("<lora:x", "<lora:lora")
        status, out, err = command("sample.py", *adapter, *lora, *DRAW, prompt, "--output", tmp_path / "out")
        assert status == 0, err
        about = [line for line in err.splitlines() if line.startswith(("prompt: ", "--adapter: "))]
        assert len(about) == len(said) and all(map(str.startswith, about, said)), err
        assert [Path(line).suffix for line in out.splitlines()] == [".png"]  # paths alone


@pytest.mark.parametrize(
    "words, prompts, said",
    [
        (["a", "red", "apple"], ["a red apple"], "read as 'a red apple'"),
        (["portrait", "of", "Ada"], ["portrait of Ada"], "read as"),
        (["cat", "dog"], ["cat", "dog"], "2 prompts of a word each"),
        (["a cat", "dog"], ["a cat", "dog"], None),
        (["a", "b"], ["a", "b"], "2 prompts"),
        (["apple"], ["apple"], None),
    ],
    ids=str,
)
def test_quotes_that_were_forgotten(words, prompts, said, capsys):
    cli.say.cache_clear()
    (job,) = cli.parse_sample(["--model", "m", "--prompt", *words, "--steps", "3"])
    assert job.options.prompt == prompts
    err = capsys.readouterr().err
    assert said in err if said else err == ""


def test_what_is_no_model_is_named(learned, command, tmp_path):
    nets = tmp_path / "net"
    argv = [
        "--method",
        "controlnet",
        "--data",
        method_helpers.make_pairs(tmp_path / "pairs"),
        "--resolution",
        64,
    ]
    argv += ["--max_train_steps", 1, "--num_validation_images", 1, "--output_dir", nets]
    name, o = cli.parse_train(list(map(str, argv)))
    method_helpers.train(name, o)
    file = learned["lora"] / "pytorch_lora_weights.safetensors"
    for model, flags in ((learned["lora"], "--adapter"), (file, "--adapter"), (nets, "--controlnet")):
        status, _, err = command("sample.py", "--model", model, *DRAW, "x")
        assert status == 2 and err.splitlines()[-1] == (
            f"sample.py: error: {model} is no model: sample.py takes it by {flags}, beside the --model"
        )
    err = command("sample.py", "--adapter", nets, *DRAW, "x")[2]
    assert "is a ControlNet: give it as --controlnet, with its --control_image" in err
    other = tmp_path / "other"
    other.mkdir()
    assert "is none of the formats" in command("sample.py", "--model", other, *DRAW, "x")[2]


# --- Data --------------------------------------------------------------------------------------------------


def photos(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        if name.lower().endswith("heic"):
            (folder / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        else:
            Image.new("RGB", (64, 64), "red").save(folder / name)
    return folder


def test_photos_without_captions(tmp_path, command):
    data = photos(tmp_path / "photos", "1.jpg", "2.jpg")
    status, _, err = command("train.py", "--method", "lora", "--data", data, "--output_dir", tmp_path / "out")
    assert status == 2 and "give all of them one by --instance_prompt" in err and len(err.splitlines()) == 1
    err = command("train.py", "--method", "text_to_image", "--data", data)[2]
    assert "captions come from" in err and "--instance_prompt" not in err  # which it does not have


@pytest.fixture
def no_heic(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(images, "SUFFIXES", tuple(s for s in images.SUFFIXES if s not in images.HEIC))
    images.read_heic.cache_clear()


def test_heic_without_its_package(tmp_path, no_heic, command, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no earlier run has left a result
    data = photos(tmp_path / "phone", "IMG_1.HEIC", "IMG_2.heic")
    err = command("train.py", "--method", "textual_inversion", "--data", data)[2]
    assert err == (
        f"train.py: error: --data: no picture in {data} (2 of 2 other entries are photos: HEIC needs pip "
        "install 'minisd[heic]')\n"
    )
    mixed = photos(tmp_path / "mixed", "IMG_1.HEIC", "2.png")
    found = source.read(mixed, flag="--data")
    assert len(found) == 1 and found.skipped == ("IMG_1.HEIC: HEIC needs pip install 'minisd[heic]'",)
    err = command("sample.py", *DRAW, "x", "--image", data / "IMG_1.HEIC")[2]
    assert "HEIC needs pip install" in err.splitlines()[-1]


def test_heic_with_its_package(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="pillow_heif reads and writes HEIC")
    heif.register_heif_opener()
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    (tmp_path / "phone").mkdir()
    picture.save(tmp_path / "phone" / "a.HEIC", quality=-1)
    found = source.read(tmp_path / "phone", flag="--data")
    assert found.records[0].sizes == {"image": (64, 48)}
    difference = np.asarray(found.open(0, "image"), float) - np.asarray(picture, float)
    assert np.abs(difference).mean() < 4


# --- Before training ---------------------------------------------------------------------------------------


def test_a_short_run_is_told_so(model, cat, tmp_path, command):
    """With another model than the tiny one, whose runs are short by its own defaults."""
    argv = ["--method", "dreambooth", "--data", cat, "--instance_prompt", "x", "--num_validation_images", 1]
    argv += ["--report_to", "none", "--resolution", 32, "--output_dir", tmp_path / "out"]
    out = command("train.py", *argv, "--model", model)[1]
    assert "so few updates teach hardly anything: --max_train_steps 200, or more" in out
    assert out.index("so few") < out.index("saved to")
    tiny = ["--max_train_steps", 1, "--resolution", 64, "--overwrite"]
    assert "so few" not in command("train.py", *argv, *tiny)[1]


def test_a_new_method_gets_the_tiny_model_s_defaults(monkeypatch):
    """A method that defaults.json does not know, with flags of its own."""

    class Options(Training):
        strange: int = flag(1, "a flag of its own")

    values = {"data": Path("d")}
    parser = cli.parser_of(Options, "x", "")
    o = parser.build(Options, values, "a_new_method")
    assert (o.model, o.resolution, o.report_to) == (str(TINY), 64, "none") and o.max_train_steps <= 500
    assert parser.build(Options, values | {"model": "m"}, "a_new_method").resolution == 512


def test_the_guide_s_token_of_custom_diffusion_trains_on_the_tiny_model(learned):
    assert (learned["custom_diffusion"] / "<new1>.safetensors").is_file()


def test_a_folder_whose_name_is_no_token(tmp_path, command):
    data = photos(tmp_path / "Our Kats", "1.png")
    argv = ["--method", "textual_inversion", "--data", data, "--placeholder_token", "<k>"]
    status, _, err = command("train.py", *argv, "--output_dir", tmp_path / "out")
    said = "'our kats', to start from, is 5 tokens of this model; give a word that is one token"
    assert (status, err) == (2, f"train.py: error: --initializer_token: {said}\n")
    assert not (tmp_path / "out").exists()


def test_what_to_do_when_memory_runs_out(tmp_path, command, monkeypatch):
    """The flags that are not used yet are named, and those alone."""
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ]
    argv = ["--method", "text_to_image", "--data", photos(tmp_path / "photos", "1.png")]
    (tmp_path / "photos" / "1.txt").write_text("a cat")
    argv += ["--output_dir", tmp_path / "out", "--overwrite", "--num_validation_images", 1]
    saving = ["--mixed_precision bf16", "--use_8bit_adam", "--offload_ema"]
    saving += ["--train_batch_size 1 --gradient_accumulation_steps 16", "--gradient_checkpointing"]
    used = ["--gradient_checkpointing", "--mixed_precision", "bf16", "--train_batch_size", 1]
    for error in errors:
        monkeypatch.setattr("minisd.training.loop.run", lambda *rest, e=error: (_ for _ in ()).throw(e))
        for further, left in ((["--use_ema"], saving), (used, saving[1:2])):
            status, _, err = command("train.py", *argv, *further)
            line = err.splitlines()[-1]
            assert status == 2 and line.startswith("train.py: error: not enough memory: ")
            assert line.endswith(f"(what saves memory and is not used: {', '.join(left)})"), line
    monkeypatch.setattr("minisd.training.loop.run", lambda *rest: (_ for _ in ()).throw(RuntimeError("x")))
    assert command("train.py", *argv)[2].splitlines()[-1].startswith("train.py: error: RuntimeError: x")


def test_a_scheduler_of_one_s_own_is_tried_first(tmp_path, command):
    """Before a model is loaded, and before a bar."""
    bad, flags = tmp_path / "bad.py", ["--model", "nowhere", "--scheduler", tmp_path / "bad.py"]
    for code, said in (("1 / 0", "bad.py line 1: ZeroDivisionError"), ("", "has no SETTINGS")):
        bad.write_text(code)
        status, _, err = command("sample.py", *DRAW, "x", *flags)
        assert status == 2 and said in err and len(err.splitlines()) == 1
        registry._run.cache_clear()
    argv = [
        "--method",
        "textual_inversion",
        "--data",
        CAT,
        "--model",
        "nowhere",
        "--validation_scheduler",
        bad,
    ]
    status, _, err = command("train.py", *argv, "--output_dir", tmp_path / "out")
    assert status == 2 and "has no SETTINGS" in err and not (tmp_path / "out").exists()


def test_a_folder_for_latents_that_can_be_none(tmp_path, command):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    for name in ("loop", "loop/below", "file", "file/below"):
        argv = ["--method", "textual_inversion", "--data", CAT, "--latents_dir", tmp_path / name]
        status, _, err = command("train.py", *argv, "--output_dir", tmp_path / "out")
        assert status == 2 and "--latents_dir" in err and "is not a folder" in err and "\n" not in err.strip()
        assert not (tmp_path / "out").exists()


def test_devices(tmp_path, command, monkeypatch):
    """One that is not there is one line, in training too; a run says which it used."""
    for name, at in (("gpu", "--device gpu: "), ("mps", "--device mps: ")):
        argv = ["--method", "textual_inversion", "--data", CAT, "--device", name]
        status, _, err = command("train.py", *argv, "--output_dir", tmp_path / "out")
        assert status == 2 and at in err and len(err.splitlines()) == 1
        assert "torch can use cpu here (" in err or torch.accelerator.is_available()
        assert len(err) < 200
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.device("cpu").type == "cpu"
    monkeypatch.setattr(distributed, "usable", torch.device)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [distributed.device(n) for n in (None, "cuda", "cuda:1")] == [
        torch.device(f"cuda:{i}") for i in (2, 2, 1)
    ]


# --- Images ------------------------------------------------------------------------------------------------


def test_a_phone_s_photo_is_drawn_at_the_model_s_size(tmp_path, command):
    Image.new("RGB", (4032, 3024), "red").save(tmp_path / "photo.jpg")
    Image.new("RGB", (96, 72), "red").save(tmp_path / "small.png")
    flags = [*DRAW, "x", "--steps", 2, "--output", tmp_path / "out.png", "--overwrite", "--image"]
    for name, sizes in (
        ("photo.jpg", {(): (72, 48), ("--width", 80, "--height", 64): (80, 64)}),
        ("small.png", {(): (96, 72)}),
    ):
        for further, size in sizes.items():
            status, _, err = command("sample.py", *flags, tmp_path / name, *further)
            assert status == 0, err
            assert Image.open(tmp_path / "out.png").size == size
            line = (
                f"{tmp_path / name}: 4032x3024, resized to {size[0]}x{size[1]} (--width and --height choose)"
            )
            assert (line in err) == (name == "photo.jpg")


def test_a_sheet_has_a_row_for_each_prompt(tmp_path):
    def sheet(*prompts: str, count: int) -> tuple[Image.Image, list[Image.Image]]:
        flags = [*DRAW, *prompts, "--num_images", count, "--output", tmp_path / "-".join(prompts)]
        *drawn, path = run.run(cli.parse_sample(list(map(str, flags))))
        assert [infotext.parse(infotext.read(p))[0] for p in drawn] == [
            p for p in prompts for _ in range(count)
        ]
        return Image.open(path).convert("RGB"), [Image.open(p).convert("RGB") for p in drawn]

    def at(picture: Image.Image, drawn: Image.Image, x: int, y: int) -> bool:
        return picture.crop((x, y, x + 64, y + 64)).tobytes() == drawn.tobytes()

    high = images.label("cat face", 64 * 3 + 8).height
    picture, drawn = sheet("cat face", "red fish", count=3)
    assert picture.size == (64 * 3 + 8, 2 * (high + 64))
    for i, image in enumerate(drawn):
        assert at(picture, image, i % 3 * 68, high + i // 3 * (high + 64))
    assert (
        picture.crop((0, 0, 200, high)).tobytes()
        != picture.crop((0, high + 64, 200, 2 * high + 64)).tobytes()
    )
    picture, drawn = sheet("cat face", "red fish", count=1)  # a cell for each
    assert picture.width == 64 and all(
        at(picture, d, 0, high + i * (high + 64 + 4)) for i, d in enumerate(drawn)
    )
    picture, _ = sheet("one prompt", count=4)
    assert picture.size == (132, 132)  # no label: there is nothing to tell apart


def letters(picture: Image.Image) -> int:
    """How much ink there is."""
    return int((255 - np.asarray(picture.convert("L"), int)).sum())


@pytest.mark.parametrize("text", ["supercalifragilistic", "a supercalifragilistic word", "x" * 300, "a b"])
def test_no_word_of_a_label_is_lost(text):
    """In lines as narrow as a small picture there is as much ink as in a wide one."""
    wide, narrow = images.label(text, 4000), images.label(text, 64)
    assert narrow.width == 64 and letters(narrow) == pytest.approx(letters(wide), rel=0.05)
    assert np.asarray(narrow)[:, 61:].min() == 255  # the margin
    long = f"{text} and {text} and {text} and {text}"
    sheet = images.table([[Image.new("RGB", (64, 64), "white")]] * 2, [long, "b"], ["c"])
    most = letters(images.label(long, 9000)) + letters(images.label("b", 99)) + letters(images.label("c", 99))
    assert letters(sheet) == pytest.approx(most, rel=0.05)


def test_labels_in_other_scripts(monkeypatch, capsys):
    """By a font of the system where there is one; else a line says which characters are boxes."""
    images.font_for.cache_clear()
    assert images.font_for("") is images.font_for("")
    plain = ImageFont.load_default(12)
    word, box = "кот", bytes(plain.getmask("\U0010ffff"))
    font = images.font_for(word)
    lacking = [c for c in word if bytes(font.getmask(c)) == bytes(font.getmask("\U0010ffff"))]
    assert bool(lacking) == ("labels show boxes" in capsys.readouterr().err)
    if not lacking:
        assert len({bytes(font.getmask(c)) for c in word}) == 3
        assert images.label(word, 64).tobytes() != images.label("\U0010ffff" * 3, 64).tobytes()
    monkeypatch.setattr(images, "FONTS", ())
    images.font_for.cache_clear()
    capsys.readouterr()
    images.label("猫 cat", 64)
    assert capsys.readouterr().err == "labels show boxes for 猫: no font of this system has them\n"
    assert box  # the test of a missing character rests on it
    images.font_for.cache_clear()


def test_home_folders_everywhere(tmp_path, monkeypatch):
    """In every flag that is a path, in each of its spellings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for cls in [cli.Sample, *(cli.options_of(m) for m in registry.names("methods"))]:
        parser = cli.parser_of(cls, "x", "")
        required = [f"--{f.name}=1" for f in fields(cls) if cli.default_of(f) is cli.MISSING]
        paths = [f for f in fields(cls) if "Path" in str(f.type)]
        assert paths
        for f in paths:
            for name in (f.name, *f.metadata.get("also", ())):
                value = parser.read([*required, f"--{name}=~/x y"])[f.name]
                assert value == (tmp_path / "x y" if isinstance(value, Path) else [tmp_path / "x y"])


def test_nothing_is_registered_by_an_import():
    """Pillow learns HEIC when such a file is read, not before."""
    assert importlib.reload(images).read_heic.cache_info().currsize == 0
