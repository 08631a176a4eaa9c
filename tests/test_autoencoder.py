"""The autoencoder's own training: its loss, and the scale of the latents that it leaves."""

from functools import partial

import pytest
import torch
from PIL import Image

from minisd.sampling.stable_diffusion import StableDiffusion
from tests import method_helpers


@pytest.fixture
def options(short_run):
    return partial(short_run, "autoencoder", "--center_crop", "--num_validation_images", 3)


@pytest.mark.parity
def test_the_loss_is_the_field_s(model, options):
    """By diffusers' autoencoder and its own KL, from the same draw."""
    from diffusers import AutoencoderKL

    o = options("--kl_weight", "0.01", "--gradient_weight", "0.25", "--l2_weight", "2")
    m, trained, batch = method_helpers.built("autoencoder", o, 3)
    loss = m.loss(batch)
    loss.backward()

    theirs = AutoencoderKL.from_pretrained(model, subfolder="vae")
    posterior = theirs.encode(batch["pixels"]).latent_dist
    drawn = posterior.mean + posterior.std * m.draw("posterior", batch, (4, 8, 8))
    e = theirs.decode(drawn).sample - batch["pixels"]
    across, down = e[..., 1:] - e[..., :-1], e[..., 1:, :] - e[..., :-1, :]
    expected = e.abs().mean() + 2 * e.square().mean() + 0.25 * (across.abs().mean() + down.abs().mean())
    expected = expected + 0.01 * posterior.kl().mean() / drawn[0].numel()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, gradient = trained["vae.quant_conv.weight"].grad, theirs.quant_conv.weight.grad
    assert (ours - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_it_learns_to_reconstruct(options):
    first, last = method_helpers.learn(*method_helpers.built("autoencoder", options()), steps=60, lr=3e-3)
    assert last < 0.6 * first


@pytest.mark.parametrize("rescale", [False, True])
def test_the_latents_scale(model, options, tmp_path, rescale):
    """With --rescale_latents the training pictures' latents have deviation 1; else the factor stays. What is
    encoded and decoded again is the same either way, and the other parts are as they were."""
    o = options(*(["--rescale_latents"] if rescale else []))
    assert method_helpers.train("autoencoder", o) == 0
    m = method_helpers.built("autoencoder", o)[0]
    before, after = StableDiffusion.load(model), StableDiffusion.load(tmp_path / "out")
    pixels = m.sample_pixels(100)
    mean, _ = after.encode_images(pixels)
    assert len(pixels) == 5
    if rescale:
        assert mean.square().mean().item() == pytest.approx(1, rel=1e-4)
    else:
        assert after.vae.config.scaling_factor == before.vae.config.scaling_factor
        assert mean.square().mean().item() != pytest.approx(1, rel=0.01)
    for part in ("unet", "text_encoder"):
        theirs = getattr(before, part).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in getattr(after, part).state_dict().items())
    assert any(not torch.equal(v, before.vae.state_dict()[k]) for k, v in after.vae.state_dict().items())
    assert Image.open(tmp_path / "out" / "result.png").size[0] > 256


def test_flags_of_diffusion_are_refused(options, capsys):
    for flags in (["--snr_gamma", "5"], ["--noise_offset", "0.1"], ["--prediction_type", "epsilon"]):
        with pytest.raises(SystemExit):
            options(*flags)
        assert f"{flags[0]} is not a flag of this method" in capsys.readouterr().err
