"""Pictures equal those of diffusers' pipeline, and depend on prompt and seed alone."""

import numpy as np
import pytest
import torch

from minisd.sampling.generate import Settings, denoise, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.conftest import make_pipeline
from tests.picture_helpers import draw_theirs, psnr

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("width, height", [(32, 32), (64, 32), (40, 72), (24, 40)])
def test_same_picture_as_diffusers(model, pipe, width, height):
    ours = StableDiffusion.load(model)
    prompts, seeds = ["a photo of a cat", "an oil painting, 4k!"], [3, 4]
    settings = Settings(width=width, height=height, negative_prompt="ugly", steps=20, guidance_scale=7.5)
    drawn = list(pictures(ours, prompts, seeds, settings))
    expected = draw_theirs(
        pipe, prompts, seeds, width, height,
        negative_prompt=["ugly"] * 2, num_inference_steps=20, guidance_scale=7.5,
    )  # fmt: skip
    for a, b in zip(drawn, expected, strict=True):
        assert a.size == (width, height)
        assert np.asarray(a).std() > 3  # not a flat picture, which anything would match
        assert psnr(a, b) >= 50


def test_eta_and_no_guidance(model, pipe):
    ours = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=7, guidance_scale=1.0, eta=1.0)
    drawn = list(pictures(ours, ["a cat"], [5], settings))
    expected = draw_theirs(pipe, ["a cat"], [5], 32, 32, num_inference_steps=7, guidance_scale=1.0, eta=1.0)
    assert psnr(drawn[0], expected[0]) >= 50


def test_a_picture_does_not_depend_on_its_batch(model):
    sd = StableDiffusion.load(model)
    settings = Settings(width=32, height=32, steps=4)
    together = list(pictures(sd, ["a cat", "a dog", "a bird"], [1, 2, 3], settings, batch_size=3))
    alone = list(pictures(sd, ["a dog"], [2], settings))
    assert psnr(together[1], alone[0]) >= 60
    assert psnr(together[0], together[1]) < 40


def test_long_prompts_are_cut_as_clip_does(model, pipe):
    prompt = "a very long prompt about cats, " * 20
    sd = StableDiffusion.load(model)
    context = sd.encode_text([prompt, ""])
    ids = pipe.tokenizer([prompt, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(sd.tokenizer([prompt, ""]), ids)
    assert torch.allclose(context, pipe.text_encoder(ids)[0], atol=1e-5)


def test_v_prediction_comes_from_the_config(tmp_path):
    from diffusers import DDIMScheduler

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
