"""A model written with its adapters merged into its weights."""

import pytest
import torch
from safetensors.torch import save_file

from minisd import cli, files
from minisd.adapters import lora
from minisd.sampling import run
from minisd.sampling.options import Sample
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.lora_helpers import custom, draw, draw_plain, draw_with, fresh, new
from tests.picture_helpers import psnr

pytestmark = pytest.mark.parity
ROWS = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def shared_tokenizer(model):
    """It keeps no words of the test before."""
    yield
    fresh(model).tokenizer.placeholders.clear()


@pytest.fixture
def attached(model, tmp_path):
    """attached(dtype): a model with two LoRAs at their scales, and Custom Diffusion's matrices."""
    lora.save(tmp_path / "a.safetensors", new(model, ["attention", "resnet"], 2, 3.0, seed=9)[1], "kohya")
    lora.save(tmp_path / "b.safetensors", new(model, ["q_proj", "to_q"], 4, 2.0, seed=8)[1])
    (tmp_path / "c").mkdir()
    custom("custom.safetensors", model, tmp_path / "c")

    def make(dtype=torch.float32):
        sd = StableDiffusion.load(model, dtype=dtype)
        sd.attach(tmp_path / "a.safetensors", 0.7, text_scale=0.4)
        sd.attach(tmp_path / "b.safetensors", -0.5)
        sd.attach(tmp_path / "c", 0.5)
        return sd

    return make


def test_export(model, attached, tmp_path):
    """A folder and a single file draw the same in diffusers, and are the same again here."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd = attached()
    expected = draw(sd)
    sd.export(tmp_path / "out")
    sd.export(tmp_path / "out.safetensors")
    for path in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert psnr(draw(StableDiffusion.load(path)), expected) >= 60
        if path.is_dir():
            pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        else:
            kwargs = {"config": str(model), "local_files_only": True, "safety_checker": None}
            pipe = StableDiffusionPipeline.from_single_file(str(path), **kwargs)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        pipe.set_progress_bar_config(disable=True)
        assert psnr(draw_with(pipe), expected) >= 50 and psnr(expected, draw_plain(model)) < 45
    # Whatever precision it runs in: merged from what the files have, and rounded once.
    low = attached(torch.bfloat16)
    low.export(tmp_path / "low")
    low.export(tmp_path / "half", torch.float16)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        whole, same, half = (files.read(tmp_path / n / f"{part}.safetensors") for n in ("out", "low", "half"))
        for name, tensor in whole.items():
            assert tensor.dtype == same[name].dtype and torch.allclose(same[name], tensor, atol=1e-6)
            assert half[name].dtype == torch.float16
            assert torch.allclose(half[name].float(), tensor, atol=1e-6, rtol=1e-3)


def test_export_has_the_tokens(model, tmp_path):
    save_file({"<zw>": ROWS}, tmp_path / "word.safetensors")
    sd = fresh(model)
    sd.attach(tmp_path / "word.safetensors")
    sd.export(tmp_path / "out")
    prompt = "a photo of <zw> <zw>_1 here"
    assert draw(StableDiffusion.load(tmp_path / "out"), prompt) == draw(sd, "a photo of <zw> here")
    with pytest.raises(ValueError, match="word.safetensors: it is one of the adapters"):
        sd.export(tmp_path / "word.safetensors")
    with pytest.raises(
        ValueError, match="out.safetensors: a single file has no place for <zw>; a folder has"
    ):
        sd.export(tmp_path / "out.safetensors")


def test_where_an_export_may_go(model, tmp_path):
    sd = StableDiffusion.load(model)
    before = sorted((p, p.stat().st_mtime_ns) for p in model.rglob("*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for path, message in [
        (model, "it is the model itself"),
        (tmp_path / "mine", "it holds other things"),
        (tmp_path / "x.ckpt", "a model is a .safetensors file, or a folder"),
    ]:
        with pytest.raises(ValueError, match=f"cannot write {path}: {message}"):
            sd.export(path)
    assert sorted((p, p.stat().st_mtime_ns) for p in model.rglob("*")) == before
    for _ in range(2):  # over its own
        sd.export(tmp_path / "out")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"] and not (
        tmp_path / "x.ckpt"
    ).exists()


def test_the_command_exports(model, command, tmp_path):
    lora.save(tmp_path / "a.safetensors", new(model, ["attention"], 2, 3.0, seed=9)[1], "kohya")
    save_file({"<zw>": ROWS}, tmp_path / "word.safetensors")
    base = ["--model", model, "--device", "cpu", "--adapter", f"{tmp_path / 'a.safetensors'}:0.7"]
    sd, out = fresh(model), tmp_path / "out.safetensors"
    sd.attach(tmp_path / "a.safetensors", 0.7)
    status, stdout, stderr = command("sample.py", *base, "--export", out)
    assert status == 0 and stdout.splitlines()[-1] == str(out), stderr
    assert not (tmp_path / "samples").exists()
    assert psnr(draw(StableDiffusion.load(out)), draw(sd)) >= 60

    def sample(*flags):
        return run.run(cli.parse_sample(list(map(str, [*base, *flags]))))

    draws = ["--prompt", "x", "--steps", 1, "--output", tmp_path / "x.png", "--dtype", "bf16"]
    assert sample(*draws, "--export", tmp_path / "half") == [tmp_path / "half", tmp_path / "x.png"]
    half = files.read(tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="--num_images draws nothing without --prompt"):
        Sample(model=str(model), export=out, num_images=2)
    with pytest.raises(ValueError, match="cannot go with --csv"):
        Sample(model=str(model), export=out, csv=tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x.safetensors: a single file has no place for <zw>"):
        sample("--adapter", tmp_path / "word.safetensors", "--export", tmp_path / "x.safetensors")
