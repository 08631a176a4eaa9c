"""What the networks leave out: products computed once, layouts never changed; the results stay the same."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisd.adapters import lora
from minisd.models import controlnet, layers, unet, unet2d, vae
from minisd.models.layers import TransformerBlock, to_channels_last
from minisd.sampling.generate import Control, Denoiser, text_branches
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.training import checkpoint, optim
from minisd.training.averaging import Averaging
from minisd.training.distributed import Processes
from tests.helpers import TINY_UNET, TINY_VAE

TINY_CONTROL = controlnet.ControlNetConfig.of(TINY_UNET, (4, 8, 12, 16))
TINY_PIXELS = unet2d.UNet2DConfig(
    in_channels=3, out_channels=3, block_out_channels=(16, 32), attention=(False, True), head_dim=8,
    layers_per_block=1, norm_num_groups=8, norm_eps=1e-5, sample_size=16,
)  # fmt: skip


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Frozen, with no zero bias and no unit norm."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network.eval().requires_grad_(False)


# 1x1 convolutions


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [True, False])
def test_a_1x1_convolution_is_a_product_in_the_layout_of_its_input(memory, biased):
    torch.manual_seed(0)
    x, g = (torch.randn(3, c, 4, 6).to(memory_format=memory) for c in (8, 12))
    bias = torch.randn(12) if biased else None
    weight = torch.randn(12, 8, 1, 1)
    results = []
    for f, dtype in ((layers.conv1x1, torch.float32), (torch.nn.functional.conv2d, torch.float64)):
        leaves = [t if t is None else t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)]
        y = f(*leaves)
        y.backward(g.to(dtype))
        results.append([y, *(t.grad for t in leaves if t is not None)])
    assert results[0][0].is_contiguous(memory_format=memory)
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_a_1x1_convolution_that_may_carry_a_lora_is_the_same_product(monkeypatch):
    """To the bit: at scale 0 nothing changes."""
    layer, x = layers.Conv1x1(64, 96), torch.randn(2, 64, 16, 16)
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    before = layer(x)
    lora.insert(torch.nn.ModuleDict({"layer": layer}), ["layer"], 2, 2.0)["layer"].scale = 0.0
    assert isinstance(layer, lora.UpdatedConv2d) and torch.equal(layer(x), before)


# The text, once a picture


def test_keys_and_values_of_the_text_are_made_once():
    """Over three steps with guidance, in the UNet and in a ControlNet, one layer of them with a LoRA."""
    torch.manual_seed(0)
    net, control = shaken(unet.UNet(TINY_UNET)), shaken(controlnet.ControlNet(TINY_CONTROL))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    shaken(lora.insert(net, [name], 2, 2.0)[name])
    calls = {}
    for network in (net, control):
        for name, layer in network.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                calls[layer] = 0
                layer.register_forward_hook(lambda m, *_: calls.__setitem__(m, calls[m] + 1))
    context, negative, hint = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.rand(2, 3, 64, 64)
    x = torch.randn(2, 4, 8, 8)

    steered = Control(network=control, hint=hint, scale=0.7)
    denoise = Denoiser(net, text_branches(context, negative, 3.0), [steered])
    preds = [denoise(x, t) for t in (900, 500, 1)]
    assert len(calls) == 2 * (11 + 5) and set(calls.values()) == {1}

    both, twice = torch.cat([negative, context]), torch.cat([x, x])
    for pred, t in zip(preds, (900, 500, 1), strict=True):
        timesteps = torch.full((4,), t)
        residuals = control(twice, timesteps, both, torch.cat([hint, hint]), 0.7)
        without, with_text = net(twice, timesteps, both, **residuals).chunk(2)
        assert torch.equal(pred, -2 * without + 3 * with_text)


# Self-attention in one product


def packed(heads: int = 2) -> TransformerBlock:
    torch.manual_seed(0)
    return to_channels_last(shaken(TransformerBlock(16, heads, 24)))


class Ops(TorchDispatchMode):
    """Writes down (name, arguments, result) of what torch runs inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op.__name__.partition(".")[0], args, out))
        return out


def widths(attention, x) -> list[int]:
    """How wide the products of a self-attention are."""
    with Ops() as ops:
        attention(x)
    return [out.shape[-1] for name, _, out in ops.calls if name in ("mm", "addmm")]


def test_one_product_for_self_attention():
    block, x = packed(), torch.randn(2, 9, 16)
    assert widths(block.attn1, x) == [48, 16]
    ours = block.attn1(x)
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        layer.weight.data = layer.weight.data.clone()
    assert widths(block.attn1, x) == [16, 16, 16, 16]
    torch.testing.assert_close(ours, block.attn1(x), atol=1e-6, rtol=1e-6)


def test_one_product_follows_the_weights():
    block, other, x = packed(), shaken(TransformerBlock(16, 2, 24)), torch.randn(2, 9, 16)
    block.load_state_dict(other.state_dict())
    assert list(block.state_dict()) == list(other.state_dict())
    assert widths(block.attn1, x) == [48, 16]
    torch.testing.assert_close(block.attn1(x), other.attn1(x), atol=1e-6, rtol=1e-6)


def test_a_layer_that_is_more_than_its_weights_has_its_own_product():
    """An adapter, a gradient, a hook, another type: each is heard."""
    x = torch.randn(2, 9, 16)
    block = packed()
    shaken(lora.insert(block, ["attn1.to_k"], 2, 2.0)["attn1.to_k"])
    k = lora.merged(block)["attn1.to_k.weight"]
    ours = block.attn1(x)
    block = packed()
    block.attn1.to_k.weight.copy_(k)
    torch.testing.assert_close(ours, block.attn1(x), atol=1e-6, rtol=1e-6)

    block = packed()
    block.attn1.to_v.weight.requires_grad_(True)
    block.attn1(x).sum().backward()
    assert block.attn1.to_v.weight.grad.abs().sum() > 0

    block, heard = packed(), []
    block.attn1.to_q.register_forward_hook(lambda m, inputs, out: heard.append(out))
    block.attn1(x)
    assert len(heard) == 1

    assert packed().double().attn1(x.double()).dtype == torch.float64


# Channels-last from end to end

COPIES = {"clone", "copy_", "_to_copy", "contiguous"}
SPATIAL = {"convolution", "native_group_norm", "cat", "upsample_nearest2d", "constant_pad_nd", "silu"}


def is_nhwc(t) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def images_of(call) -> list[torch.Tensor]:
    """The images (b, c, h, w) that an op gave, and those that it took but for latents and pictures."""
    _, args, out = call
    found = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, torch.Tensor)]
    return [t for t in found if t.ndim == 4 and t.shape[-1] > 1 and t.shape[1] > 4]


def forwards():
    """name -> (network, what to run); a feature map of 24 by 16, so that no two sides are alike."""
    torch.manual_seed(0)
    net, control = shaken(unet.UNet(TINY_UNET)), shaken(controlnet.ControlNet(TINY_CONTROL))
    pixels, autoencoder = shaken(unet2d.UNet2D(TINY_PIXELS)), shaken(vae.AutoencoderKL(TINY_VAE))
    x, timesteps, context = torch.randn(2, 4, 24, 16), torch.tensor([7, 981]), torch.randn(2, 5, 24)
    hint, picture = torch.rand(2, 3, 192, 128), torch.randn(2, 3, 24, 16)
    return {
        "unet": (net, lambda: net(x, timesteps, context)),
        "controlnet": (control, lambda: control(x, timesteps, context, hint)["mid_residual"]),
        "pixel unet": (pixels, lambda: pixels(picture, timesteps)),
        "vae encoder": (autoencoder, lambda: autoencoder.encode(picture)[0]),
        "vae decoder": (autoencoder, lambda: autoencoder.decode(x)),
    }


@pytest.mark.parametrize("name", forwards())
def test_no_layout_ever_changes(name):
    """Every image from the first convolution to the last is channels-last, pixels become tokens and tokens
    pixels without a copy, and the result is that of the contiguous network."""
    network, run = forwards()[name]
    expected = run()
    to_channels_last(network)
    with Ops() as ops:
        ours = run()
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    spatial = [call for call in ops.calls if call[0] in SPATIAL and images_of(call)]
    assert len(spatial) > 20
    for call in spatial:
        wrong = [t for t in images_of(call) if not is_nhwc(t)]
        assert not wrong, (call[0], [(t.shape, t.stride()) for t in wrong])
    copied = [(n, args[0].shape) for n, args, _ in ops.calls if n in COPIES and args[0].numel() > 100]
    assert not copied


def test_a_loaded_model_is_laid_out_for_its_device(model, tmp_path, monkeypatch):
    """And what it leaves is the same file."""
    plain = StableDiffusion.load(model)
    monkeypatch.setattr(layers, "is_fast_in_channels_last", lambda weight: True)
    sd = StableDiffusion.load(model)
    convolutions = [m for part in sd.parts.values() for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) > 50 and all(is_nhwc(m.weight) for m in convolutions)
    attention = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert widths(attention, torch.randn(1, 4, 32)) == [96, 32]
    written = []
    for each in (plain, sd):
        each.save(tmp_path / str(each is sd))
        written.append([f.read_bytes() for f in sorted((tmp_path / str(each is sd)).rglob("*.safetensors"))])
    assert written[0] == written[1] and len(written[0]) == 3

    sd.unet.widen(8)
    assert is_nhwc(sd.unet.conv_in.weight) and not is_nhwc(torch.empty(32, 8, 3, 3))
    control = controlnet.ControlNet.from_unet(plain.unet, 4)
    assert is_nhwc(control.controlnet_cond_embedding.conv_in.weight)
    assert torch.equal(control.conv_in.weight, plain.unet.conv_in.weight)


def test_a_resumed_optimizer_has_the_layout_of_its_parameters(tmp_path):
    """AdamW's fast path wants parameters, gradients and its own tensors alike in memory."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 6, 3).to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trained = {"weight": layer.weight, "bias": layer.bias}

    def step(optimizer):
        layer(torch.ones(1, 5, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    optimizer = optim.AdamW([*layer.parameters()], **settings)
    step(optimizer)
    numbers = {"step": 1, "samples": 1, "ema": None, "method": SimpleNamespace(kept={})}
    numbers["averaging"] = Averaging([*trained.values()], Processes(), torch.float32)
    trainer = SimpleNamespace(trained=trained, optimizer=optimizer, scaler=scaler, **numbers)
    checkpoint.State.of(trainer, copied=True).save(tmp_path, {})
    step(optimizer)
    expected = layer.weight.detach().clone()

    optimizer = trainer.optimizer = optim.AdamW([*layer.parameters()], **settings)
    checkpoint.restore(trainer, tmp_path)
    assert optimizer.state[layer.weight]["exp_avg"].stride() == layer.weight.stride()
    step(optimizer)
    assert torch.equal(layer.weight, expected)
