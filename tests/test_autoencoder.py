"""The autoencoder's own training: its loss, and the scale of the latents that it leaves."""

import pytest
import torch
from PIL import Image

from minisd import cli, registry
from minisd.data.order import Stream, collate
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.training import loop
from minisd.training.run_folder import Run


@pytest.fixture
def options(model, cat, tmp_path):
    def make(*flags):
        argv = ["--method", "autoencoder", "--model", str(model), "--data", str(cat), "--resolution", "32"]
        argv += ["--report_to", "none", "--output_dir", str(tmp_path / "out"), "--center_crop"]
        return cli.parse_train([*argv, "--train_batch_size", "2", "--max_train_steps", "2", *flags])[1]

    return make


def method(o):
    return registry.load("methods", "autoencoder").Method(o)


@pytest.mark.parity
def test_the_loss_is_the_field_s(model, options):
    """By diffusers' autoencoder and its own KL, from the same draw."""
    from diffusers import AutoencoderKL

    m = method(options("--kl_weight", "0.01", "--gradient_weight", "0.25", "--l2_weight", "2"))
    trained = m.build()
    stream = Stream(m.dataset(), 0)
    batch = collate([stream[k] for k in range(3)])
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
    m = method(options())
    trained = m.build()
    stream = Stream(m.dataset(), 0)
    batch = collate([stream[k] for k in range(4)])
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    first = m.loss(batch).item()
    for _ in range(60):
        loss = m.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


@pytest.mark.parametrize("rescale", [False, True])
def test_the_latents_scale(model, options, tmp_path, rescale):
    """With --rescale_latents the training pictures' latents have deviation 1; else the factor stays. What is
    encoded and decoded again is the same either way, and the other parts are as they were."""
    o = options(*(["--rescale_latents"] if rescale else []))
    m = method(o)
    assert loop.train(m, Run("autoencoder", o)) == 0
    before, after = StableDiffusion.load(model), StableDiffusion.load(tmp_path / "out")
    pixels = m.some(100)
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
        assert f"{flags[0]} is of diffusion" in capsys.readouterr().err
