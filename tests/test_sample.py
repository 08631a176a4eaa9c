"""Pictures equal those of diffusers' pipeline, depend on prompt and seed alone, carry their parameters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.adapters import token_embedding
from minisd.generate import Settings, denoise, pictures
from minisd.stable_diffusion import StableDiffusion

pytestmark = pytest.mark.parity


def psnr(a, b) -> float:
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(scope="module")
def theirs(model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_theirs(pipe, prompts, seeds, width, height, **kwargs):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompts, width=width, height=height, generator=generators, **kwargs).images


@pytest.mark.parametrize("width, height", [(32, 32), (64, 32), (40, 72), (24, 40)])
def test_same_picture_as_diffusers(model, theirs, width, height):
    ours = StableDiffusion.load(model)
    prompts, seeds = ["a photo of a cat", "an oil painting, 4k!"], [3, 4]
    settings = Settings(width=width, height=height, negative_prompt="ugly", steps=20, guidance_scale=7.5)
    drawn = list(pictures(ours, prompts, seeds, settings))
    expected = draw_theirs(
        theirs, prompts, seeds, width, height,
        negative_prompt=["ugly"] * 2, num_inference_steps=20, guidance_scale=7.5,
    )  # fmt: skip
    for a, b in zip(drawn, expected, strict=True):
        assert a.size == (width, height)
        assert np.asarray(a).std() > 3  # not a flat picture, which anything would match
        assert psnr(a, b) >= 50


def test_eta_and_no_guidance(model, theirs):
    ours = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=7, guidance_scale=1.0, eta=1.0)
    drawn = list(pictures(ours, ["a cat"], [5], settings))
    expected = draw_theirs(theirs, ["a cat"], [5], 32, 32, num_inference_steps=7, guidance_scale=1.0, eta=1.0)
    assert psnr(drawn[0], expected[0]) >= 50


def test_a_picture_does_not_depend_on_its_batch(model):
    sd = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=4)
    together = list(pictures(sd, ["a cat", "a dog", "a bird"], [1, 2, 3], settings, batch_size=3))
    alone = list(pictures(sd, ["a dog"], [2], settings))
    assert psnr(together[1], alone[0]) >= 60
    assert psnr(together[0], together[1]) < 40


def test_long_prompts_are_cut_as_clip_does(model, theirs):
    prompt = "a very long prompt about cats, " * 20
    sd = StableDiffusion.load(model)
    context = sd.encode_text([prompt, ""])
    ids = theirs.tokenizer([prompt, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(sd.tokenizer([prompt, ""]), ids)
    assert torch.allclose(context, theirs.text_encoder(ids)[0], atol=1e-5)


@pytest.mark.parametrize("vectors", [1, 3])
def test_our_embeddings_load_in_diffusers(model, tmp_path, vectors):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    rows = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(1))
    token_embedding.save(tmp_path / "learned_embeds.safetensors", "<cat-toy>", rows, {"format": "pt"})
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    sd = StableDiffusion.load(model)
    assert sd.attach(tmp_path) == [f"<cat-toy> ({vectors} vector{'s' if vectors > 1 else ''})"]
    prompt = "a photo of <cat-toy> on a table"
    drawn = list(pictures(sd, [prompt], [0], Settings(width=32, height=32, steps=10)))
    expected = draw_theirs(pipe, [prompt], [0], 32, 32, num_inference_steps=10, guidance_scale=7.5)
    assert psnr(drawn[0], expected[0]) >= 50
    plain = StableDiffusion.load(model)
    assert psnr(drawn[0], next(pictures(plain, [prompt], [0], Settings(width=32, height=32, steps=10)))) < 45


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 32)], ids=str)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_embeddings_of_diffusers_load_here(model, tmp_path, shape, suffix):
    from safetensors.torch import save_file

    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    file = tmp_path / f"learned_embeds{suffix}"
    save_file({"<toy>": rows}, file) if suffix == ".safetensors" else torch.save({"<toy>": rows}, file)
    sd = StableDiffusion.load(model)
    sd.attach(file)
    ids = sd.tokenizer.encode("a <toy>, a <TOY>")
    count = rows.numel() // 32
    assert ids == [320, *range(49408, 49408 + count), 267, 320, *range(49408, 49408 + count)]
    table = sd.text_encoder.text_model.embeddings.token_embedding
    assert torch.equal(table(torch.tensor(ids[1 : 1 + count])), rows.view(-1, 32))


def test_embedding_of_another_width_is_refused(model, tmp_path):
    token_embedding.save(tmp_path / "sd2.safetensors", "<toy>", torch.zeros(1, 1024), {})
    with pytest.raises(ValueError, match="sd2.safetensors.*1024"):
        StableDiffusion.load(model).attach(tmp_path / "sd2.safetensors")


def test_two_embeddings_at_once(model, tmp_path):
    sd = StableDiffusion.load(model)
    for token, value in (("<a>", 1.0), ("<a-b>", 2.0)):
        token_embedding.save(tmp_path / f"{token}.safetensors", token, torch.full((1, 32), value), {})
        sd.attach(tmp_path / f"{token}.safetensors")
    assert sd.tokenizer.encode("<a-b><a>") == [49409, 49408]
    table = sd.text_encoder.text_model.embeddings.token_embedding
    assert table(torch.tensor([49408, 49409])).mean(dim=1).tolist() == [1.0, 2.0]
    token_embedding.save(tmp_path / "other.safetensors", "<A>", torch.zeros(1, 32), {})
    with pytest.raises(ValueError, match="other.safetensors: placeholder '<a>' is a token already"):
        sd.attach(tmp_path / "other.safetensors")


def test_v_prediction_comes_from_the_config(tmp_path):
    from diffusers import DDIMScheduler

    from tests.conftest import make_pipeline

    pipe = make_pipeline(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = list(pictures(StableDiffusion.load(tmp_path), ["x"], [0], Settings(width=32, height=32, steps=5)))
    assert psnr(drawn[0], draw_theirs(pipe, ["x"], [0], 32, 32, num_inference_steps=5)[0]) >= 50


def test_denoise_yields_every_step(model):
    sd = StableDiffusion.load(model)
    with torch.no_grad():
        steps = list(denoise(sd, ["x"], [0], Settings(width=32, height=32, steps=6)))
    assert len(steps) == 6 and all(x.shape == (1, 4, 8, 8) for x in steps)


def test_script(model, script, tmp_path):
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
    assert all(str(f) in stdout for f in files)
    with Image.open(files[2]) as image:
        assert image.size == (64, 32)
        assert image.text["parameters"] == (
            "a cat, “quoted”\nNegative prompt: blurry\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 8, "
            f"Size: 64x32, Model: {model.name}, Version: minisd"
        )
    # Again, the same bytes under the next numbers; nothing is overwritten.
    assert script("sample.py", *flags)[0] == 0
    assert (out / "00006-seed-9.png").read_bytes() == files[3].read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "x", "--width", "30"], "--width 30"),
        (["--prompt", "x", "--scheduler", "ddimm"], "ddim"),
        (["--prompt", "x", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--prompt", "x", "--steps", "0"], "--steps"),
        (["--prompt", "x", "--eta", "0.5", "--scheduler", "ddpm"], "--eta"),
        ([], "--prompt"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input(model, script, tmp_path, flags, message):
    status, _, stderr = script("sample.py", "--model", model, "--output", tmp_path / "out", *flags)
    assert status == 2
    assert message in stderr.strip().splitlines()[-1] and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
