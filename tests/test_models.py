"""The networks equal diffusers' and transformers' on random weights: outputs, gradients, names and shapes."""

import pytest
import torch

from minisd.models import text, unet, vae
from tests.helpers import (
    TINY_UNET,
    TINY_VAE,
    assert_close,
    assert_same_gradients,
    diffusers_unet,
    full_size,
    same_fields,
    same_weights,
)

pytestmark = pytest.mark.parity

TINY_TEXT = text.TextConfig(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, max_positions=16
)


def diffusers_vae(config: vae.VAEConfig):
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **same_fields(config, "in_channels", "out_channels", "latent_channels", "block_out_channels"),
        **same_fields(config, "layers_per_block", "norm_num_groups", "sample_size", "scaling_factor"),
    )


def transformers_text(config: text.TextConfig):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            hidden_act=config.activation,
        )
    )


def check_unet(config: unet.UNetConfig, height: int, width: int) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers_unet(config), unet.UNet(config)
    same_weights(ours, theirs)
    x = torch.randn(2, config.in_channels, height, width)
    timesteps = torch.tensor([7, 981])
    context = torch.randn(2, 5, config.cross_attention_dim)
    ours_in, theirs_in = (context.clone().requires_grad_() for _ in range(2))
    out = ours(x, timesteps, ours_in)
    expected = theirs(x, timesteps, theirs_in).sample
    assert_close(out, expected, 2e-5)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert_close(ours_in.grad, theirs_in.grad, 1e-4)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("in_channels", [4, 8, 9])
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (9, 14)], ids=str)  # the last: odd on the way down
def test_unet_equals_diffusers(in_channels, size):
    config = unet.UNetConfig(**{**vars(TINY_UNET), "in_channels": in_channels})
    check_unet(config, *size)


@full_size
def test_unet_of_sd15_equals_diffusers():
    check_unet(unet.SD15, 16, 16)


def check_vae(config: vae.VAEConfig, height: int, width: int) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers_vae(config), vae.AutoencoderKL(config)
    same_weights(ours, theirs)
    pixels = torch.randn(1, 3, height, width)
    mean, std = ours.encode(pixels)
    posterior = theirs.encode(pixels).latent_dist
    assert_close(mean, posterior.mean * config.scaling_factor, 2e-5)
    assert_close(std, posterior.std * config.scaling_factor, 2e-5)
    decoded = ours.decode(mean)
    expected = theirs.decode(posterior.mean).sample
    assert_close(decoded, expected, 2e-5)
    (decoded.square().mean() + std.mean()).backward()
    (expected.square().mean() + config.scaling_factor * posterior.std.mean()).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_vae_equals_diffusers(size):
    check_vae(TINY_VAE, *size)


@full_size
def test_vae_of_sd15_equals_diffusers():
    check_vae(vae.SD15, 64, 64)


def check_text(config: text.TextConfig) -> None:
    torch.manual_seed(0)
    theirs, ours = transformers_text(config), text.TextEncoder(config)
    same_weights(ours, theirs, "text_model.")
    ids = torch.randint(0, config.vocab_size, (2, config.max_positions))
    out, expected = ours(ids), theirs(ids)[0]
    assert_close(out, expected, 2e-5)
    # A fixed random direction: the plain sum of squares behind a LayerNorm hardly depends on the layers.
    direction = torch.randn(out.shape)
    (out * direction).mean().backward()
    (expected * direction).mean().backward()
    assert_same_gradients(ours, theirs, "text_model.")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_equals_transformers(activation):
    check_text(text.TextConfig(**{**vars(TINY_TEXT), "activation": activation}))


@full_size
def test_text_encoder_of_sd15_equals_transformers():
    check_text(text.SD15)


@pytest.mark.parametrize(
    "build, parameters, tensors",
    [
        (lambda: unet.UNet(unet.SD15), 859_520_964, 686),
        (lambda: unet.UNet(unet.UNetConfig(**{**vars(unet.SD15), "in_channels": 9})), 859_535_364, 686),
        (lambda: vae.AutoencoderKL(vae.SD15), 83_653_863, 248),
        (lambda: text.TextEncoder(text.SD15), 123_060_480, 196),
    ],
    ids=["unet", "unet of 9 channels", "vae", "text encoder"],
)
def test_counts_of_sd15(build, parameters, tensors):
    with torch.device("meta"):
        state = build().state_dict()
    assert sum(t.numel() for t in state.values()) == parameters
    assert len(state) == tensors


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    torch.manual_seed(0)
    model = unet.UNet(TINY_UNET)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 24)
    model(*inputs).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    model.mid_block.resnets[0].register_forward_pre_hook(count)
    model.enable_gradient_checkpointing()
    model(*inputs).square().mean().backward()
    assert calls == 2  # forward, and again in backward
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
