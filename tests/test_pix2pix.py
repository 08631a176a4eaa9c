"""InstructPix2Pix: the widened UNet, what is left out, its loss, and the three branches of guidance."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minisd.data import images
from minisd.models import unet
from minisd.sampling.generate import Denoiser, Settings, image_branches, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests import method_helpers
from tests.helpers import TINY_UNET, assert_close
from tests.method_helpers import built, pipeline, shake, train
from tests.picture_helpers import psnr


@pytest.fixture
def opts(short_run):
    return partial(short_run, "instruct_pix2pix")


def test_a_widened_unet_sees_nothing_new_at_first():
    torch.manual_seed(0)
    network = unet.UNet(TINY_UNET)
    shake(network)
    x, more, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    timesteps = torch.tensor([3, 700])
    before, bias = network(x, timesteps, context), network.conv_in.bias.clone()
    network.widen(8)
    assert network.config.in_channels == 8 and TINY_UNET.in_channels == 4
    assert network.conv_in.weight[:, 4:].abs().max() == 0 and torch.equal(network.conv_in.bias, bias)
    for original in (torch.zeros_like(more), more):
        after = network(torch.cat([x, original], dim=1), timesteps, context)
        assert_close(after, before, 1e-5)


def test_the_widened_unet_trains(opts):
    _, trained, _ = built("instruct_pix2pix", opts("--conditioning_dropout_prob", "0.05"))
    assert {n.partition(".")[0] for n in trained} == {"unet"}
    assert trained["unet.conv_in.weight"].shape[1] == 8


def test_it_starts_from_the_model_and_its_bias(model, opts):
    m, _, batch = built("instruct_pix2pix", opts("--conditioning_dropout_prob", "0"))
    base = StableDiffusion.load(model).unet
    assert torch.equal(m.sd.unet.conv_in.bias, base.conv_in.bias)
    assert torch.equal(m.sd.unet.conv_in.weight[:, :4], base.conv_in.weight)
    noisy, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 999])
    pred = m.predict(noisy, timesteps, m.inputs(batch))
    expected = base(noisy, timesteps, m.sd.encode_text(batch["prompt"]))
    assert_close(pred, expected, 1e-5)


def test_what_is_left_out(opts):
    """Below p the prompt alone, to 2p both, to 3p the original alone, and else nothing."""
    m, _, batch = built("instruct_pix2pix", opts("--conditioning_dropout_prob", "0.1"))
    numbers = {"number": list(range(2000))}
    text, picture = m.dropped(numbers)
    for which, share in ((text & ~picture, 0.1), (text & picture, 0.1), (picture & ~text, 0.1)):
        assert which.float().mean().item() == pytest.approx(share, abs=0.03)
    again = m.dropped({"number": [7, 3]})
    assert [again[0][1], again[1][0]] == [text[3], picture[7]]  # of the sample, not of the batch

    seen = {}
    m.sd.unet.forward = lambda x, t, context: seen.update(x=x, context=context) or x[:, :4]
    batch = batch | {"number": [next(k for k in range(2000) if (text[k], picture[k]) == case) for case in
                                ((True, False), (True, True), (False, True), (False, False))]}  # fmt: skip
    m.predict(torch.zeros(4, 4, 8, 8), torch.zeros(4, dtype=torch.long), m.inputs(batch))
    nothing = m.sd.encode_text([""])[0]
    assert [torch.allclose(c, nothing, atol=1e-6) for c in seen["context"]] == [True, True, False, False]
    assert [x[4:].abs().max().item() == 0 for x in seen["x"]] == [False, True, True, False]
    mean = m.sd.vae.encode(batch["original"])[0] / m.sd.vae.config.scaling_factor
    assert torch.allclose(seen["x"][[0, 3], 4:], mean[[0, 3]], atol=1e-5)

    m, _, _ = built("instruct_pix2pix", opts())
    assert not any(d.any() for d in m.dropped(numbers))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_field_s(model, opts, kind):
    from diffusers import UNet2DConditionModel

    o = opts("--prediction_type", kind, "--conditioning_dropout_prob", "0.2", "--random_flip")
    m, trained, batch = built("instruct_pix2pix", o, count=6)
    shake(m.sd.unet)
    loss = m.loss(batch)
    loss.backward()

    pipe = pipeline(model)
    theirs = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=8)
    theirs.load_state_dict({n.removeprefix("unet."): p for n, p in trained.items()})
    expected = method_helpers.theirs_of(pipe, m, batch)
    originals = pipe.vae.encode(batch["original"]).latent_dist.mode().detach()
    text, picture = m.dropped(batch)
    assert text.any() and picture.any() and not text.all()
    context = torch.where(text[:, None, None], method_helpers.encode(pipe, [""]), expected.context).detach()
    originals = (1 - picture.float())[:, None, None, None] * originals
    pred = theirs(torch.cat([expected.noisy, originals], dim=1), expected.timesteps, context).sample
    expected = F.mse_loss(pred, expected.target)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    method_helpers.assert_gradients(trained, theirs, "unet.")


def test_three_branches_are_the_formula():
    x, original = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    text, none = torch.full((1, 3, 5), 2.0), torch.full((1, 3, 5), 0.5)

    branches = image_branches(text, none, original, 7.0, 1.5)
    assert [b.weight for b in branches] == [-0.5, -5.5, 7.0] and sum(b.weight for b in branches) == 1
    assert [b.weight for b in image_branches(text, none, original, 1.0, 1.5)] == [1.0]
    unet = torch.nn.Module()
    unet.forward = lambda x, t, c: (x[:, 4:] + 1) * c.states.mean(dim=(1, 2))[:, None, None, None]
    pred = Denoiser(unet, branches)(x, 5)
    zero, image, full = 0.5 * torch.ones_like(x), 0.5 * (original + 1), 2.0 * (original + 1)
    assert torch.allclose(pred, zero + 1.5 * (image - zero) + 7 * (full - image), atol=1e-5)


@pytest.mark.parity
def test_what_it_leaves_draws_the_same_in_diffusers(opts):
    from diffusers import DDIMScheduler, DiffusionPipeline

    o = opts("--learning_rate", "1e-2", "--use_ema", "--validation_prompt", "x", "--val_image_url", "none")
    picture = o.data / "source0.png"
    o = replace(o, val_image_url=str(picture), max_train_steps=3, validation_epochs=1)
    assert train("instruct_pix2pix", o) == 0
    assert (o.output_dir / "validation" / "step-000002.png").exists()

    theirs = DiffusionPipeline.from_pretrained(o.output_dir, safety_checker=None)
    assert type(theirs).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert theirs.unet.config.in_channels == 8
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    sd = StableDiffusion.load(o.output_dir)
    shown = [images.open_image(o.data / f"target{i}.png").resize((32, 32)) for i in range(2)]
    originals = torch.stack([images.to_tensor(i) for i in shown])
    settings = Settings(width=32, height=32, steps=6, guidance_scale=5.0, image_guidance_scale=2.0)
    prompts = ["make it red", "at night"]
    drawn = list(pictures(sd, prompts, [3, 4], settings, init_images=originals))
    expected = theirs(
        prompts, shown, num_inference_steps=6, guidance_scale=5.0, image_guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    assert all(psnr(a, b) >= 50 for a, b in zip(drawn, expected, strict=True))
    without = replace(settings, guidance_scale=1.0)
    drawn = list(pictures(sd, prompts, [3, 4], without, init_images=originals, batch_size=1))
    expected = theirs(
        prompts, shown, num_inference_steps=6, guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    assert all(psnr(a, b) >= 50 for a, b in zip(drawn, expected, strict=True))
    with pytest.raises(ValueError, match="needs a picture"):
        next(pictures(sd, ["x"], [0], settings))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--validation_prompt", "x"], "--val_image_url and --validation_prompt go together"),
        (["--conditioning_dropout_prob", "0.4"], "--conditioning_dropout_prob must be from 0 to 1/3"),
    ],
)
def test_mistakes(opts, capsys, flags, message):
    with pytest.raises(SystemExit):
        opts(*flags)
    assert message in capsys.readouterr().err


def test_a_picture_that_is_not_there_is_said_first(opts):
    o = opts("--val_image_url", "nowhere.png", "--validation_prompt", "x")
    with pytest.raises(ValueError, match="nowhere.png"):
        train("instruct_pix2pix", o)
    assert not o.output_dir.exists()
