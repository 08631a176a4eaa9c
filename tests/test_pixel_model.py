"""The model of pixels, drawn by the command and in Python: no text, all else as for Stable Diffusion."""

import json
import shutil

import pytest
import torch
from PIL import Image

import minisd
from minisd import cli
from minisd.formats import diffusers, hub
from minisd.models import unet2d
from minisd.sampling import infotext, run
from minisd.sampling.pixel_diffusion import PixelDiffusion, scheduler_config
from tests.helpers import TINY_PIXELS, seeded
from tests.method_helpers import shake
from tests.picture_helpers import psnr


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """The folder of a model of 16x16 pixels with random weights."""
    torch.manual_seed(0)
    network = unet2d.UNet2D(TINY_PIXELS)
    shake(network)
    folder = tmp_path_factory.mktemp("pixels") / "ddpm-tiny"
    PixelDiffusion(network, scheduler_config()).save(folder)
    return folder


def sample(*flags) -> list:
    """The images that sample.py writes, and the paths of all its files."""
    paths = run.run(cli.parse_sample(["--device", "cpu", *map(str, flags)]))
    return [Image.open(path) for path in paths]


def at_the_top(folder, target):
    """The layout of google/ddpm-*: no folders."""
    target.mkdir()
    for path in [*folder.glob("unet/*"), *folder.glob("scheduler/*"), folder / "model_index.json"]:
        shutil.copy(path, target / path.name)
    return target


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["folders", "top"])
@pytest.mark.parametrize(
    "kind, flags, call",
    [
        ("DDPMPipeline", ["--scheduler", "ddpm"], {}),
        ("DDIMPipeline", [], {}),
        ("DDIMPipeline", ["--eta", 0.6], {"eta": 0.6}),
    ],
    ids=["ddpm", "ddim", "eta"],
)
def test_it_draws_as_diffusers_pipelines(pixels, tmp_path, layout, kind, flags, call):
    import diffusers as theirs

    folder = pixels if layout == "folders" else at_the_top(pixels, tmp_path / "top")
    pipe = getattr(theirs, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch_size=2, generator=seeded(5, 6), num_inference_steps=12, **call).images
    flags = ["--model", folder, "--steps", 12, "--seed", 5, "--num_images", 2, *flags]
    drawn = sample(*flags, "--output", tmp_path / "x.png")
    for a, b in zip(drawn, expected, strict=False):
        assert a.size == (16, 16) and psnr(a, b) >= 50
    assert psnr(drawn[0], drawn[1]) < 40


@pytest.mark.parity
def test_its_own_folder_of_ddim_opens(pixels, tmp_path):
    import diffusers as theirs

    theirs.DDIMPipeline.from_pretrained(pixels).save_pretrained(tmp_path / "ddim")
    assert json.loads((tmp_path / "ddim/model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    old, new = (minisd.load(f, device="cpu").generate(steps=3, seed=2) for f in (pixels, tmp_path / "ddim"))
    assert old == new


def test_the_command_and_python_draw_the_same(pixels, tmp_path):
    """A picture depends on its seed alone; progress, previews and steps are those of any model."""
    model = minisd.load(pixels, device="cpu")
    heard, seen = [], []
    flags = {"steps": 4, "scheduler": "euler", "width": 24}
    drawn = model.generate(seed=7, num_images=3, on_step=heard.append, on_preview=seen.append, **flags)
    assert sum(heard) == 12 and len(seen) == 12 and drawn[0].size == seen[0][0].size == (24, 16)
    assert drawn[2] == model.generate(seed=9, **flags)[0]
    together = model.generate(seed=7, num_images=3, batch_size=3, **flags)
    assert all(psnr(a, b) >= 55 for a, b in zip(together, drawn, strict=True))
    steps = list(model.steps(seed=8, **flags))
    assert [x.shape for x in steps] == [(1, 3, 16, 24)] * 4 and model.pictures(steps[-1]) == [drawn[1]]
    command = ["--model", pixels, "--steps", 4, "--scheduler", "Euler", "--width", 24, "--seed", 7]
    *written, sheet = sample(*command, "--num_images", 3, "--output", tmp_path, "--preview", 2)
    assert [image.tobytes() for image in written] == [image.tobytes() for image in drawn]
    assert sheet.width >= 2 * 24 and (tmp_path / "preview.png").is_file()


def test_again_and_in_tables(pixels, tmp_path):
    command = ["--model", pixels, "--steps", 5, "--eta", 0.5, "--seed", 3, "--height", 32]
    (first,) = sample(*command, "--output", tmp_path / "a.png")
    text = infotext.read(tmp_path / "a.png")
    assert "CFG" not in text and "Sampler: DDIM" in text and "Size: 16x32" in text and "Eta: 0.5" in text
    (again,) = sample("--like", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert again.tobytes() == first.tobytes()
    (other,) = sample("--like", tmp_path / "a.png", "--seed", 4, "--output", tmp_path / "c.png")
    assert other.tobytes() != first.tobytes()
    (tmp_path / "t.csv").write_text("seed,height\n3,32\n4,32\n")
    table = sample(*command[:6], "--csv", tmp_path / "t.csv", "--output", tmp_path / "t")
    assert [image.tobytes() for image in table[:2]] == [first.tobytes(), other.tobytes()] and len(table) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "a flower"], ["--guidance_scale", 3], ["--negative_prompt", "x"], ["--clip_skip", 2],
        ["--adapter", "x.safetensors"], ["--plain_prompt"], ["--load_ema"], ["--tokenizer_name", "x"],
        ["--image", "cat.png"], ["--export", "x.safetensors"], ["--lora_dir", "x"],
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_flags_about_text_are_refused(pixels, cat, tmp_path, flags):
    flags = [cat / "0.png" if flag == "cat.png" else flag for flag in flags]
    flags += [] if "--export" in flags else ["--output", tmp_path / "out"]
    with pytest.raises(ValueError, match=f"{flags[0]} has no effect: .*ddpm-tiny is a model of pixels"):
        sample("--model", pixels, *flags)
    assert not (tmp_path / "out").exists()


def test_python_refuses_them_too_and_others_need_a_prompt(pixels, model):
    with pytest.raises(ValueError, match="--prompt has no effect"):
        minisd.load(pixels, device="cpu").generate("a flower")
    with pytest.raises(ValueError, match="give --prompt"):
        minisd.load(model, device="cpu").generate(steps=2)
    with pytest.raises(SystemExit):
        cli.parse_sample(["--model", str(model)])


def test_a_model_with_more_parts_is_none(pixels, tmp_path):
    """Latent diffusion without text has a VAE beside the same network."""
    folder = shutil.copytree(pixels, tmp_path / "ldm")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    assert diffusers.is_pixels(pixels) and not diffusers.is_pixels(folder)
    with pytest.raises(ValueError, match="text_encoder|vae"):
        minisd.load(folder, device="cpu")


def test_what_is_fetched_from_the_hub():
    needed = ["config.json", "diffusion_pytorch_model.safetensors"]
    files = [*needed, "diffusion_pytorch_model.bin", "README.md"]
    top = ["scheduler_config.json", "model_index.json"]
    assert set(hub.needed([*files, *top], None, "google/ddpm-cat-256")) == {*needed, *top}
    inside = ["scheduler/scheduler_config.json", "model_index.json"]
    found = hub.needed([*(f"unet/{name}" for name in files), *inside, "x.png"], None, "x/y")
    assert set(found) == {*(f"unet/{name}" for name in needed), *inside}
