"""A checkpoint of toy size, and what the tests of weights ask of checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minisd import files
from minisd.formats import parts as ck
from minisd.formats.parts import PARTS, Checkpoint
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


def tiny(unet_config=UNET, dtype=torch.float32) -> Checkpoint:
    config = {"unet": unet_config, "vae": VAE, "text_encoder": TEXT}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        part: {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in ck.native_shapes(part, config[part], "tiny").items()
        }
        for part in PARTS
    }
    return Checkpoint(
        **config, tensors=tensors, scheduler=dict(ck.SD1_SCHEDULER), tokenizer=ck.TOKENIZER,
        pipeline="StableDiffusionPipeline",
    )  # fmt: skip


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    for part in PARTS:
        assert getattr(a, part) == getattr(b, part)
        assert a.tensors[part].keys() == b.tensors[part].keys()
        for name, tensor in a.tensors[part].items():
            assert tensor.dtype == b.tensors[part][name].dtype, name
            assert torch.equal(tensor, b.tensors[part][name]), name
    assert (a.scheduler, a.pipeline) == (b.scheduler, b.pipeline)


def listing(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def rewrite(source: Path, target: Path, change) -> Path:
    tensors = change(dict(load_file(source)))
    if target.suffix == ".safetensors":
        save_file(tensors, target, metadata=files.metadata(source))
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, target)
    return target
