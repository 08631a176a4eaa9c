"""Losses, gradients and files of the methods against diffusers and the published scripts' formulas."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minisd import files
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.training import loop
from minisd.training.run_folder import RunFolder
from tests import method_helpers
from tests.method_helpers import assert_gradients, built, pipeline, theirs_of, train
from tests.picture_helpers import draw_theirs, psnr

pytestmark = pytest.mark.parity


@pytest.fixture
def options(short_run):
    return lambda method, *flags: short_run(method, "--learning_rate", "1e-2", *flags)


@pytest.fixture
def classes(cat, tmp_path):
    """Four pictures of a class, of other shapes than the instances."""
    from PIL import Image

    folder = tmp_path / "classes"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (36, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_text_to_image(model, options, prediction_type, gamma):
    flags = ["--prediction_type", prediction_type, "--noise_offset", "0.1", "--no-cache_latents"]
    flags += ["--snr_gamma", gamma] if gamma else []
    m, trained, batch = built("text_to_image", options("text_to_image", *flags), count=2)
    loss = m.loss(batch)
    loss.backward()
    pipe = pipeline(model)
    theirs = theirs_of(pipe, m, batch)
    expected = theirs.mse(pipe.unet(theirs.noisy, theirs.timesteps, theirs.context).sample, gamma).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(trained, pipe.unet, "unet.")


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_dream(model, options, p):
    """Also by the formula of arXiv 2312.00210 written out."""
    from diffusers.training_utils import compute_dream_and_update_latents

    flags = ["--dream_training", "--dream_detail_preservation", p, "--no-cache_latents"]
    m, trained, batch = built("text_to_image", options("text_to_image", *flags), count=2)
    loss = m.loss(batch)
    loss.backward()
    pipe = pipeline(model)
    theirs = theirs_of(pipe, m, batch)
    noisy, timesteps, context, target = theirs.noisy, theirs.timesteps, theirs.context, theirs.target
    pred = pipe.unet(noisy, timesteps, context).sample
    new, aim = compute_dream_and_update_latents(
        pipe.unet, theirs.scheduler, timesteps, target.clone(), noisy, target, context, p
    )
    sigma = (1 - theirs.scheduler.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    error = sigma**p * (target - pred.detach())
    assert torch.allclose(new, noisy + sigma * error, atol=1e-5) and torch.allclose(
        aim, target + error, atol=1e-5
    )
    expected = F.mse_loss(pipe.unet(new, timesteps, context).sample, aim)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(trained, pipe.unet, "unet.")
    plain = built("text_to_image", options("text_to_image", "--no-cache_latents"), count=2)[0].loss(batch)
    assert abs(plain.item() - loss.item()) > 1e-3 * loss.item()


def test_dream_is_for_noise(options):
    flags = ["--dream_training", "--prediction_type", "v_prediction"]
    with pytest.raises(ValueError, match="--dream_training: this model predicts v_prediction"):
        built("text_to_image", options("text_to_image", *flags), count=2)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_dreambooth(model, options, classes, weight):
    flags = ["--instance_prompt", "a sks cat", "--train_text_encoder"]
    if weight:
        flags += ["--with_prior_preservation", "--class_data_dir", classes, "--class_prompt", "a cat"]
        flags += ["--prior_loss_weight", weight, "--num_class_images", 4]
    m, trained, batch = built("dreambooth", options("dreambooth", *flags), count=2)
    assert batch["prompt"] == ["a sks cat"] * 2 + ["a cat"] * (2 if weight else 0)
    loss = m.loss(batch)
    loss.backward()
    pipe = pipeline(model)
    theirs = theirs_of(pipe, m, batch)
    pred, target = pipe.unet(theirs.noisy, theirs.timesteps, theirs.context).sample, theirs.target
    if weight:
        (pred, prior), (target, prior_target) = pred.chunk(2), target.chunk(2)
        expected = F.mse_loss(pred, target) + weight * F.mse_loss(prior, prior_target)
    else:
        expected = F.mse_loss(pred, target)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(trained, pipe.unet, "unet.")
    first = next(iter(n for n in trained if n.startswith("text_encoder.")))
    assert trained[first].grad.abs().max() > 0


def custom_processors(unet):
    """diffusers' own Custom Diffusion, its matrices those of the model."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    processors = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        cross = name.endswith("attn2.processor")
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=cross,
            train_q_out=False,
            hidden_size=attention.to_q.in_features,
            cross_attention_dim=unet.config.cross_attention_dim if cross else None,
        )
        if cross:
            processors[name].to_k_custom_diffusion.load_state_dict(attention.to_k.state_dict())
            processors[name].to_v_custom_diffusion.load_state_dict(attention.to_v.state_dict())
    unet.set_attn_processor(processors)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_custom_diffusion(model, options, classes, weight):
    flags = ["--instance_prompt", "a cat", "--cd_loss", "reference", "--hflip"]
    if weight:
        flags += [
            "--with_prior_preservation",
            "--class_data_dir",
            classes,
            "--class_prompt",
            "cat",
            "--real_prior",
        ]
        flags += ["--prior_loss_weight", weight, "--num_class_images", 4]
    m, trained, batch = built("custom_diffusion", options("custom_diffusion", *flags), count=4)
    loss = m.loss(batch)
    loss.backward()
    pipe = pipeline(model)
    pipe.unet.requires_grad_(False)
    custom_processors(pipe.unet)
    theirs = theirs_of(pipe, m, batch)
    pred, target = pipe.unet(theirs.noisy, theirs.timesteps, theirs.context).sample, theirs.target
    mask = batch["mask"]
    prior = 0.0
    if weight:
        (pred, p), (target, t), (mask, _) = pred.chunk(2), target.chunk(2), mask.chunk(2)
        prior = weight * F.mse_loss(p, t)
    squares = F.mse_loss(pred, target, reduction="none")
    expected = ((squares * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean() + prior
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(trained, pipe.unet, "")
    assert len(trained) == 2 * sum(n.endswith("attn2.processor") for n in pipe.unet.attn_processors)


@pytest.mark.parametrize(
    "method, flags", [("text_to_image", ["--use_ema"]), ("dreambooth", ["--instance_prompt", "x"])]
)
def test_pipelines_that_open_in_diffusers(options, method, flags):
    o = options(method, *flags)
    assert train(method, o) == 0
    pipe = pipeline(o.output_dir)
    ours = next(
        pictures(StableDiffusion.load(o.output_dir), ["a cat"], [1], Settings(width=32, height=32, steps=8))
    )
    expected = draw_theirs(pipe, ["a cat"], [1], 32, 32, num_inference_steps=8)[0]
    assert psnr(ours, expected) >= 50
    before = next(
        pictures(StableDiffusion.load(o.model), ["a cat"], [1], Settings(width=32, height=32, steps=8))
    )
    assert psnr(ours, before) < 40  # it did train


@pytest.mark.parametrize("freeze_model, extension", [("crossattn_kv", ".bin"), ("crossattn", ".safetensors")])
def test_custom_diffusion_opens_in_diffusers(
    model, options, freeze_model, extension, tmp_path, monkeypatch, capsys
):
    """By the calls that the run prints, and by those in the model card."""
    flags = ["--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>", "--initializer_token", "dog"]
    flags += ["--no_safe_serialization"] if extension == ".bin" else []
    o = options("custom_diffusion", *flags, "--freeze_model", freeze_model)
    m = method_helpers.new("custom_diffusion", o)
    assert loop.train(m, RunFolder("custom_diffusion", o)) == 0
    file = o.output_dir / f"pytorch_custom_diffusion_weights{extension}"
    names = {name for name, t in files.read(file).items() if t.numel()}
    expected = {"to_k_custom_diffusion.weight", "to_v_custom_diffusion.weight"}
    if freeze_model == "crossattn":
        expected |= {"to_q_custom_diffusion.weight"}
        expected |= {"to_out_custom_diffusion.0.weight", "to_out_custom_diffusion.0.bias"}
    assert {n.partition(".processor.")[2] for n in names} == expected
    prompt, size = "a <new1> cat", Settings(width=32, height=32, steps=8)
    pipe = pipeline(model)
    line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("in diffusers: "))
    printed = pipeline(model)
    for call in line.removeprefix("in diffusers: ").split("; "):
        eval(call, {"pipe": printed})
    monkeypatch.chdir(o.output_dir.parent)
    calls = re.findall(r"^pipe\..*", (o.output_dir / "README.md").read_text(), re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        eval(call, {"pipe": pipe})
    expected, alike = (
        draw_theirs(p, [prompt], [1], 32, 32, num_inference_steps=8)[0] for p in (pipe, printed)
    )
    assert psnr(alike, expected) >= 50
    sd = StableDiffusion.load(model)
    assert any("Custom Diffusion of" in line for line in sd.attach(o.output_dir))
    assert psnr(next(pictures(sd, [prompt], [1], size)), expected) >= 50
    sd = StableDiffusion.load(model)
    sd.attach(o.output_dir / f"<new1>{extension}")
    assert psnr(next(pictures(sd, [prompt], [1], size)), expected) < 40  # the matrices do count
    # And what diffusers saves of it opens here.
    kinds = {f"{n}.{k}": t for n, p in pipe.unet.attn_processors.items() for k, t in p.state_dict().items()}
    empty = {n: {} for n, p in pipe.unet.attn_processors.items() if not p.state_dict()}
    torch.save(kinds | empty, tmp_path / "theirs.bin")
    sd.attach(tmp_path / "theirs.bin")
    assert psnr(next(pictures(sd, [prompt], [1], size)), expected) >= 50


def test_frozen_parts_are_saved_as_they_were(options, model):
    """In mixed precision the VAE runs in bf16; what is saved of it is what was read."""
    o = options("text_to_image", "--mixed_precision", "bf16")
    assert train("text_to_image", o) == 0
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(f / f"{part}.safetensors") for f in (model, o.output_dir))
        b = {k if k in a else k.removeprefix("text_model."): v for k, v in b.items()}
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
