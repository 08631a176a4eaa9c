"""What the networks leave out: products computed once, layouts never changed; the results stay the same."""

import torch

from minisd.adapters import lora
from minisd.guidance import Control, Denoiser, text_branches
from minisd.models import controlnet, unet
from tests.test_models import TINY_UNET

TINY_CONTROL = controlnet.ControlNetConfig(**controlnet._of_encoder(TINY_UNET), hint_channels=(4, 8, 12, 16))


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Frozen, with no zero bias and no unit norm."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network.eval().requires_grad_(False)


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
    denoise = Denoiser(net, text_branches(context, negative, 3.0), steered)
    preds = [denoise(x, t) for t in (900, 500, 1)]
    assert len(calls) == 2 * (11 + 5) and set(calls.values()) == {1}

    both, twice = torch.cat([negative, context]), torch.cat([x, x])
    for pred, t in zip(preds, (900, 500, 1), strict=True):
        timesteps = torch.full((4,), t)
        residuals = control(twice, timesteps, both, torch.cat([hint, hint]), 0.7)
        without, with_text = net(twice, timesteps, both, **residuals).chunk(2)
        assert torch.equal(pred, -2 * without + 3 * with_text)
