"""The command sample.py: pictures with their parameters, drawn again, in tables, with LoRAs."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from minisd import cli, ops
from minisd.adapters import lora, token_embedding
from minisd.data import images
from minisd.sampling import infotext, run
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.picture_helpers import psnr

pytestmark = pytest.mark.parity


def test_script(model, script, command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat, “quoted”\n\na dog: #2\n")
    out = tmp_path / "drawn"
    flags = ["--model", model, "--prompt_file", prompts, "--num_images", 2, "--steps", 3, "--seed", 7]
    flags += ["--negative_prompt", "blurry", "--width", 64, "--height", 32, "--output", out]
    status, stdout, stderr = script("sample.py", *flags)
    assert status == 0, stderr
    assert "12/12" in stderr  # 4 pictures of 3 steps
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [
        "00000-grid.png", "00000-seed-7.png", "00001-seed-8.png", "00002-seed-9.png", "00003-seed-10.png",
    ]  # fmt: skip
    assert sorted(stdout.splitlines()) == [str(f) for f in files]  # and nothing else
    with Image.open(files[2]) as image:
        assert image.size == (64, 32)
        assert image.text["parameters"] == (
            "a cat, “quoted”\nNegative prompt: blurry\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 8, "
            f"Size: 64x32, Model: {model.name}, Model path: {model}, RNG: CPU, Version: minisd"
        )
    # Again, the same bytes under the next numbers; nothing is overwritten.
    assert command("sample.py", *flags)[0] == 0
    assert (out / "00006-seed-9.png").read_bytes() == files[3].read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "x", "--width", "30"], "--width must"),
        (["--prompt", "x", "--scheduler", "ddimm"], "ddim"),
        (["--prompt", "x", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--prompt", "x", "--steps", "0"], "--steps"),
        (["--prompt", "x", "--eta", "0.5", "--scheduler", "ddpm"], "--eta"),
        ([], "--prompt"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input(model, command, tmp_path, flags, message):
    status, _, stderr = command("sample.py", "--model", model, "--output", tmp_path / "out", *flags)
    assert status == 2
    assert message in stderr.strip().splitlines()[-1] and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


# --- One command, and the next from what it wrote ---------------------------------------------------------


def sample(*argv) -> list:
    """What sample.py does, in this process: paths of the pictures, and of the sheet if there are several."""
    return run.run(cli.parse_sample([str(a) for a in argv]))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory):
    """A folder with two LoRAs of both networks that do much: a file, and a run's folder one level below."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, path in enumerate(
        [folder / "fur v1.5.safetensors", folder / "mine/hat/pytorch_lora_weights.bin"]
    ):
        sd = StableDiffusion.load(model)
        torch.manual_seed(seed)
        updates = lora.insert(lora.networks(sd), ["attention"], 2, 2)
        for update in updates.values():
            torch.nn.init.normal_(update.lora_B, std=0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors, metadata = lora.state_dict(updates)
        if path.suffix == ".bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata)
    return folder


SMALL = ["--steps", 3, "--width", 32, "--height", 32]


def test_like_redraws_the_same_pixels(model, loras, tmp_path):
    prompt = 'a (cat:1.3), "quoted": 猫\nnext line <lora:fur v1.5:0.7:0.4>'
    flags = ["--model", model, "--lora_dir", loras, *SMALL, "--seed", 5, "--guidance_scale", 6.123456789]
    flags += ["--negative_prompt", "[ugly]: bad, worse", "--clip_skip", 2, "--scheduler", "euler_ancestral"]
    flags += ["--karras", "--eta", 0.8, "--adapter", f"{loras / 'mine/hat'}:0.3"]
    drawn = sample(*flags, "--prompt", prompt, "a dog", "--num_images", 2, "--output", tmp_path / "a")
    assert len(drawn) == 5  # with a sheet
    for i, path in enumerate(drawn[:4]):
        (again,) = sample("--like", path, "--output", tmp_path / f"again-{i}.png")
        assert np.array_equal(pixels(again), pixels(path))
        assert infotext.read(again) == infotext.read(path)
    assert not np.array_equal(pixels(drawn[0]), pixels(drawn[1]))
    (other,) = sample("--like", drawn[0], "--seed", 6, "--output", tmp_path / "b.png")
    assert np.array_equal(pixels(other), pixels(drawn[1]))
    with pytest.raises(ValueError, match="parameters"):
        infotext.read(drawn[4])


def test_like_says_if_other_kernels_compute(model, tmp_path, capsys, monkeypatch):
    flags = ["--model", model, "--prompt", "a cat", "--steps", 1, "--output"]
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(ops, "digest", lambda: "12345678")
        (path,) = sample(*flags, tmp_path / "gpu.png")
    assert "Kernels: 12345678" in infotext.read(path)
    (again,) = sample("--like", path, "--model", model, "--output", tmp_path / "cpu.png")
    assert "Kernels" not in infotext.read(again)
    assert "other kernels" in capsys.readouterr().err
    sample("--like", again, "--model", model, "--output", tmp_path / "cpu2.png")
    out = capsys.readouterr().err
    assert "other kernels" not in out and "ignored" not in out


def test_like_needs_the_pictures_again(model, tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(file)
    flags = ["--model", model, "--prompt", "a cat", "--steps", 4, "--image", *files]
    drawn = sample(*flags, "--output", tmp_path / "out")
    assert "Denoising strength: 0.8" in infotext.read(drawn[0])
    for path in drawn[:2]:
        (again,) = sample("--like", path, "--output", tmp_path / "again.png", "--overwrite")
        assert np.array_equal(pixels(again), pixels(path))
    files[1].unlink()
    with pytest.raises((ValueError, OSError), match="2.png"):
        sample("--like", drawn[1], "--output", tmp_path / "again.png", "--overwrite")


def test_loras_in_prompts_equal_adapters(model, loras, tmp_path):
    """Each picture with its own, the same ones at other scales, and none left over."""
    sd = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=3, lora_dir=loras)
    texts = ["a cat <lora:fur v1.5:0.7:0.4>", "a cat", "a cat <lora:hat:1><lora:fur v1.5:0.5>"]
    drawn = list(pictures(sd, texts, [1, 1, 1], settings, batch_size=3))
    attached = [
        [("fur v1.5.safetensors", 0.4, 0.7)],
        [],
        [("fur v1.5.safetensors", 0.5, 0.5), ("mine/hat", 1, 1)],
    ]
    for image, adapters in zip(drawn, attached, strict=True):
        other = StableDiffusion.load(model)
        for path, unet, text in adapters:
            other.attach(loras / path, unet, text)
        expected = next(pictures(other, ["a cat"], [1], settings))
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert min(psnr(drawn[0], drawn[1]), psnr(drawn[2], drawn[1])) < 45
    # On top of what is attached for good, which stays.
    sd = StableDiffusion.load(model)
    sd.attach(loras / "fur v1.5.safetensors", 0.25)
    both = next(pictures(sd, ["a cat <lora:fur v1.5:0.25>"], [1], settings))
    alone = next(pictures(sd, ["a cat"], [1], settings))
    other = StableDiffusion.load(model)
    other.attach(loras / "fur v1.5.safetensors", 0.5)
    assert psnr(both, next(pictures(other, ["a cat"], [1], settings))) >= 60 > psnr(both, alone)
    plain = Settings(width=32, height=32, steps=1, plain_prompt=True)
    assert next(pictures(sd, ["a <lora:nowhere:1>"], [1], plain))


@pytest.mark.parametrize(
    "text, negative, message",
    [
        ("a <lora:fur:1>", "", "<lora:fur> is not in --lora_dir .*'fur v1.5'"),
        ("a", "<lora:hat:1>", "--negative_prompt"),
        ("a <lora:toy:1>", "", "toy"),
    ],
)
def test_wrong_loras(model, loras, text, negative, message):
    token_embedding.save(loras / "toy.safetensors", "<toy>", torch.zeros(1, 32), {})
    settings = Settings(width=32, height=32, steps=1, lora_dir=loras, negative_prompt=negative)
    with pytest.raises(ValueError, match=message):
        next(pictures(StableDiffusion.load(model), [text], [0], settings))


def table(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_csv_draws_a_table(model, tmp_path):
    file = table(tmp_path / "x.csv", "seed,steps", "1,2", "1,3", "2,2", '"2",3', "")
    flags = ["--model", model, "--prompt", "a cat", "--width", 32, "--height", 32, "--steps", 9]
    drawn = sample(*flags, "--csv", file, "--output", tmp_path / "out")
    assert [path.name[:5] for path in drawn] == ["00000", "00001", "00002", "00003", "00000"]
    for path, (seed, steps) in zip(drawn, [(1, 2), (1, 3), (2, 2), (2, 3)], strict=False):
        more = ["--seed", seed, "--steps", steps, "--output", tmp_path / "alone.png", "--overwrite"]
        (alone,) = sample(*flags, *more)
        assert np.array_equal(pixels(path), pixels(alone))
    sheet = pixels(drawn[4])
    rows, columns = range(2), range(2)
    above = images.label("steps: 2", 32).height
    assert sheet.shape == (above + 2 * 32 + 4, 64 + 2 * 32 + 4, 3)
    for y in rows:
        for x in columns:
            top, left = above + 36 * y, 64 + 36 * x
            assert np.array_equal(sheet[top : top + 32, left : left + 32], pixels(drawn[2 * y + x]))
    assert (sheet[above : above + 32, :64] < 128).any() and (sheet[:above, 64:96] < 128).any()  # words


def test_csv_of_other_flags_is_a_list(model, loras, tmp_path):
    file = table(
        tmp_path / "x.csv",
        "prompt,adapter,adapter,scheduler,plain_prompt",
        f'"a cat, (big:1.2)",{loras / "mine/hat"}:0.5,{loras / "fur v1.5.safetensors"}:0.5,,',
        "(b),,,DPM++ 2M,yes",
    )
    drawn = sample("--model", model, "--prompt", "x", *SMALL, "--csv", file, "--output", tmp_path / "o.png")
    assert [path.name for path in drawn] == ["o-0.png", "o-1.png", "o.png"]
    first, second = (infotext.parse(infotext.read(path)) for path in drawn[:2])
    assert first[0] == "a cat, (big:1.2)" and second[0] == "(b)"
    adapters = [value for key, value in first[2] if key == "adapter"]
    assert [value.rpartition("/")[2] for value in adapters] == ["hat:0.5", "fur v1.5.safetensors:0.5"]
    assert {"Sampler": "DPM++ 2M", "Emphasis": "None"}.items() <= dict(second[2]).items()
    assert "adapter" not in dict(second[2])


@pytest.mark.parametrize(
    "lines, message",
    [
        (["seed,stepz", "1,2"], "line 2: unknown flag --stepz; did you mean --steps?"),
        (["seed", "1", "x"], "line 3: argument --seed: invalid int value: 'x'"),
        (["seed,steps", "1,2", "", "3"], "line 4: 1 cells, and 2 in the header"),
        (["scheduler", "ddmi"], "line 2: "),
        (["plain_prompt", "perhaps"], "line 2: --plain_prompt is yes or no"),
        (["output", "x"], "line 2: --output is for all rows"),
        (["config", "x"], "line 2: --config is for all rows"),
        (["output=x", "1"], "line 2: --output=x is for all rows"),
        (["overwrite", "yes"], "line 2: --overwrite is for all rows"),
        (["seed"], "a row for each picture"),
    ],
)
def test_broken_rows_name_their_line(model, tmp_path, capsys, lines, message):
    file = table(tmp_path / "x.csv", *lines)
    with pytest.raises(SystemExit) as e:
        sample("--model", model, "--prompt", "a", "--csv", file, "--output", tmp_path / "out")
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and message in err and str(file) in err and len(err.splitlines()) == 1


def test_rows_that_cannot_be_drawn_name_their_line(model, tmp_path):
    file = table(tmp_path / "x.csv", "clip_skip", "1", "9")
    with pytest.raises(ValueError, match="x.csv line 3: --clip_skip 9"):
        sample("--model", model, "--prompt", "a", *SMALL, "--csv", file, "--output", tmp_path / "out")


def test_preview(model, tmp_path):
    seen = []
    sd = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=6, scheduler="euler")
    further = {"on_preview": seen.append, "preview": 2}
    drawn = list(pictures(sd, ["a cat", "a dog"], [1, 2], settings, **further))
    assert [len(shown) for shown in seen] == [2, 2, 2]
    for image, plain in zip(drawn, pictures(sd, ["a cat", "a dog"], [1, 2], settings), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(plain))
    # What it is about to be comes nearer, and Euler's last step ends there.
    errors = [psnr(shown[0], drawn[0]) for shown in seen]
    assert errors[0] < errors[1] < errors[2] and errors[2] > 45
    (path,) = sample(
        "--model", model, "--prompt", "a", *SMALL, "--preview", 3, "--output", tmp_path / "a.png"
    )
    assert np.abs(pixels(tmp_path / "preview.png").astype(int) - pixels(path)).mean() < 3
