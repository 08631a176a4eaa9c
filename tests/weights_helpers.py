"""A Stable Diffusion of toy size, and how tests of files compare and change such models."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minisd import files
from minisd.formats import parts
from minisd.formats.parts import PARTS, PipelineParts
from minisd.models import text, unet, vae

UNET = unet.UNetConfig(
    in_channels=4, out_channels=4, block_out_channels=(32, 64), attention=(True, False), num_heads=(2, 4),
    layers_per_block=2, cross_attention_dim=32, norm_num_groups=8, norm_eps=1e-5, sample_size=8,
)  # fmt: skip
VAE = vae.VAEConfig(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
    norm_num_groups=8, sample_size=16, scaling_factor=0.18215,
)  # fmt: skip
TEXT = text.TextConfig(
    vocab_size=49408, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_positions=77,
    activation="quick_gelu", eps=1e-5,
)  # fmt: skip


def tiny(unet_config=UNET, dtype=torch.float32) -> PipelineParts:
    configs = {"unet": unet_config, "vae": VAE, "text_encoder": TEXT}
    generator = torch.Generator().manual_seed(0)
    networks = {}
    for part, config in configs.items():
        network = parts.build(part, config, "tiny")
        tensors = {
            name: torch.randn(t.shape, generator=generator).to(dtype)
            for name, t in network.state_dict().items()
        }
        networks[part] = parts.fill(network, tensors, "tiny")
    return PipelineParts(
        **networks, scheduler=dict(parts.SD1_SCHEDULER), tokenizer=parts.TOKENIZER,
        pipeline_class="StableDiffusionPipeline",
    )  # fmt: skip


def assert_equal(a: PipelineParts, b: PipelineParts) -> None:
    for part in PARTS:
        assert a.networks[part].config == b.networks[part].config
        ours, theirs = a.networks[part].state_dict(), b.networks[part].state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert (a.scheduler, a.pipeline_class) == (b.scheduler, b.pipeline_class)


def listing(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def rewrite(source: Path, target: Path, change) -> Path:
    tensors = change(dict(load_file(source)))
    if target.suffix == ".safetensors":
        save_file(tensors, target, metadata=files.read_with_metadata(source)[1])
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, target)
    return target
