"""ControlNet: the network, its files, its training, and the pictures it steers."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minisd.adapters import controlnet as adapter
from minisd.formats import config_json, hub, parts, single_file
from minisd.formats.diffusers import save_part
from minisd.models import controlnet, unet
from minisd.sampling.generate import Control, Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests import method_helpers
from tests.helpers import TINY_UNET, assert_close, assert_same_gradients, diffusers_unet, same_weights
from tests.method_helpers import built, pipeline, shake, train
from tests.picture_helpers import psnr

TINY = controlnet.ControlNetConfig.of(TINY_UNET, (4, 8, 12, 16))


def diffusers_controlnet(config: controlnet.ControlNetConfig):
    diffusers = pytest.importorskip("diffusers")
    kind = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    return diffusers.ControlNetModel(
        in_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=[kind[a] for a in config.attention],
        attention_head_dim=config.num_heads,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        conditioning_embedding_out_channels=config.hint_channels,
    )


def inputs(size=(16, 24)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=g)
    hint = torch.rand(2, 3, 8 * size[0], 8 * size[1], generator=g)
    return x, torch.tensor([7, 981]), torch.randn(2, 5, 24, generator=g), hint


# The network


def test_counts_and_names_of_sd15():
    pytest.importorskip("diffusers")
    with torch.device("meta"), parts._NoInit():
        ours = controlnet.ControlNet(controlnet.SD15).state_dict()
        theirs = diffusers_controlnet(controlnet.SD15).state_dict()
    assert sum(t.numel() for t in ours.values()) == 361_279_120 and len(ours) == 340
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parity
@pytest.mark.parametrize("size", [(16, 24), (9, 14)], ids=str)
def test_it_and_the_unet_equal_diffusers(size):
    """Residuals, prediction and gradients, through both networks and at a scale of its own."""
    torch.manual_seed(0)
    theirs, their_unet = diffusers_controlnet(TINY), diffusers_unet(TINY_UNET)
    ours, our_unet = controlnet.ControlNet(TINY), unet.UNet(TINY_UNET)
    same_weights(ours, theirs)
    same_weights(our_unet, their_unet)
    x, timesteps, context, hint = inputs(size)
    residuals = ours(x, timesteps, context, hint, 0.7)
    down, mid = theirs(x, timesteps, context, hint, conditioning_scale=0.7, return_dict=False)
    assert len(residuals["down_residuals"]) == len(down)
    for a, b in zip([*residuals["down_residuals"], residuals["mid_residual"]], [*down, mid], strict=True):
        assert_close(a, b, 2e-5)
    pred = our_unet(x, timesteps, context, **residuals)
    expected = their_unet(
        x, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    assert_close(pred, expected, 2e-5)
    pred.square().mean().backward()
    expected.square().mean().backward()
    assert_same_gradients(ours, theirs)


def test_a_fresh_one_is_a_copy_that_changes_nothing():
    torch.manual_seed(0)
    base = unet.UNet(TINY_UNET)
    shake(base)
    fresh = controlnet.ControlNet.from_unet(base)
    own, copied = base.state_dict(), fresh.state_dict()
    assert all(torch.equal(copied[n], own[n]) for n in copied if not n.startswith("controlnet_"))
    assert sum(not n.startswith("controlnet_") for n in copied) == sum(
        n.startswith(("conv_in", "time_", "down_", "mid_")) for n in own
    )
    x, timesteps, context, hint = inputs()
    residuals = fresh(x, timesteps, context, hint)
    assert all(r.abs().max() == 0 for r in [*residuals["down_residuals"], residuals["mid_residual"]])
    assert torch.equal(base(x, timesteps, context, **residuals), base(x, timesteps, context))
    with pytest.raises(ValueError, match="a conditioning image of"):
        fresh(x, timesteps, context, hint[..., :64])
    with pytest.raises(ValueError, match="16 times smaller"):
        controlnet.ControlNet.from_unet(base, 16)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    torch.manual_seed(0)
    network = controlnet.ControlNet(TINY)
    calls, grads = [], []
    network.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        network.zero_grad()
        network(*inputs())["mid_residual"].square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.enable_gradient_checkpointing()
    assert len(calls) == 3 and all(map(torch.equal, *grads))


# Its files


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = controlnet.ControlNet(TINY)
    shake(network)
    return network


def assert_same(a, b):
    assert a.config == b.config
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parity
def test_folders_go_both_ways(network, tmp_path):
    from diffusers import ControlNetModel

    save_part(tmp_path / "ours", network)
    assert_same(adapter.load(tmp_path / "ours"), network)
    theirs = ControlNetModel.from_pretrained(tmp_path / "ours")
    x = inputs()
    mid = theirs(*x, return_dict=False)[1]
    assert_close(network(*x)["mid_residual"], mid, 2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(adapter.load(tmp_path / "theirs"), network)


def save_single_file(path, network):
    names, tensors = single_file.table("controlnet", network), network.state_dict()
    config = json.dumps(config_json.to_json("controlnet", network.config))
    save_file({names[n]: t for n, t in tensors.items()}, path, metadata={single_file.CONFIG: config})


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_single_files_are_read(network, tmp_path, prefix):
    """Written, then as if the base model were in the same file."""
    file = tmp_path / "control.safetensors"
    save_single_file(file, network)
    tensors = {prefix + n: t for n, t in load_file(file).items()}
    if prefix:
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)
    written = json.dumps(config_json.to_json("controlnet", network.config))
    save_file(tensors, file, metadata={single_file.CONFIG: written})
    assert_same(adapter.load(file), network)


def test_the_single_file_s_names_are_the_published_ones():
    names = single_file.table("controlnet", parts.build("controlnet", controlnet.SD15, "sd15"))
    assert len(names) == len(set(names.values())) == 340
    for ours, theirs in {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "controlnet_down_blocks.0.weight": "zero_convs.0.0.weight",
        "controlnet_down_blocks.11.bias": "zero_convs.11.0.bias",
        "controlnet_mid_block.weight": "middle_block_out.0.weight",
        "controlnet_cond_embedding.conv_in.weight": "input_hint_block.0.weight",
        "controlnet_cond_embedding.blocks.0.weight": "input_hint_block.2.weight",
        "controlnet_cond_embedding.blocks.5.bias": "input_hint_block.12.bias",
        "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
    }.items():
        assert names[ours] == theirs


@pytest.mark.parity
def test_diffusers_reads_the_single_file_alike(tmp_path):
    """The field's own converter, on a network of SD v1.5's shape but a twentieth of its size."""
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_controlnet_checkpoint
    config = replace(controlnet.SD15, block_out_channels=(32, 64, 128, 128), hint_channels=(16, 32, 96, 256))
    torch.manual_seed(0)
    network = controlnet.ControlNet(config)
    save_single_file(tmp_path / "c.safetensors", network)
    found = convert(load_file(tmp_path / "c.safetensors"), diffusers_controlnet(config).config)
    own = network.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)


def test_one_is_not_attached(model, network, tmp_path):
    """Neither a folder nor a single file: it needs an image, and so a flag of its own."""
    save_part(tmp_path / "folder", network)
    save_single_file(tmp_path / "one.safetensors", network)
    sd = StableDiffusion.load(model)
    for path, file in (("folder", "diffusion_pytorch_model"), ("one.safetensors", "one")):
        with pytest.raises(ValueError, match=f"{file}.safetensors is a ControlNet.*--control_image"):
            sd.attach(tmp_path / path)


def test_a_repository_that_is_one_part():
    names = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    assert hub.needed(names, None, "org/control") == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {"difference": torch.zeros(1)} | t, "holds differences"),
        (lambda t: {n: v for n, v in t.items() if "zero_convs" not in n}, "holds no ControlNet"),
        (lambda t: {n: v for n, v in t.items() if n != "zero_convs.3.0.bias"}, "1 missing .*zero_convs.3.0"),
        (lambda t: t | {"more": torch.zeros(1)}, r"1 unknown \(more\)"),
    ],
)
def test_other_files_are_refused(network, tmp_path, change, message):
    file = tmp_path / "control.safetensors"
    save_single_file(file, network)
    written = json.dumps(config_json.to_json("controlnet", network.config))
    save_file(change(load_file(file)), file, metadata={single_file.CONFIG: written})
    with pytest.raises(ValueError, match=f"control.safetensors.*{message}"):
        adapter.load(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross_attention_dim": 1024}, "a ControlNet of SD2"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr'"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
    ],
)
def test_other_configs_are_refused(network, tmp_path, change, message):
    save_part(tmp_path, network)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        adapter.load(tmp_path)


# Training


@pytest.fixture
def opts(short_run):
    return partial(short_run, "controlnet")


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_field_s(model, opts, tmp_path, kind):
    from diffusers import ControlNetModel

    m, trained, batch = built("controlnet", opts("--prediction_type", kind))
    shake(m.controlnet)
    m.save(tmp_path / "control")
    loss = m.loss(batch)
    loss.backward()

    pipe = pipeline(model)
    theirs, step = (
        ControlNetModel.from_pretrained(tmp_path / "control"),
        method_helpers.theirs_of(pipe, m, batch),
    )
    inputs = step.noisy, step.timesteps, step.context.detach()
    down, mid = theirs(*inputs, batch["conditioning"], return_dict=False)
    pred = pipe.unet(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    expected = F.mse_loss(pred, step.target)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    method_helpers.assert_gradients(trained, theirs, "controlnet.")


def test_it_goes_on_from_a_controlnet(opts, network, tmp_path):
    config = replace(network.config, cross_attention_dim=32, num_heads=(4, 4, 4), layers_per_block=1)
    before = controlnet.ControlNet(replace(config, hint_channels=(4, 8, 12)))
    save_part(tmp_path / "before", before)
    m, trained, batch = built("controlnet", opts("--controlnet_model_name_or_path", tmp_path / "before"))
    assert_same(m.controlnet, before)
    m.loss(batch).backward()
    assert all(p.grad is not None for p in trained.values())


def test_captions_are_left_out_as_asked(opts):
    m, _, batch = built("controlnet", opts("--proportion_empty_prompts", "0.5"), count=200)
    assert 70 <= batch["prompt"].count("") <= 130
    m, _, batch = built("controlnet", opts(), count=20)
    assert "" not in batch["prompt"] and batch["conditioning"].shape == (20, 3, 32, 32)
    assert 0 <= batch["conditioning"].min() and batch["conditioning"].max() <= 1


@pytest.mark.parity
def test_what_it_leaves_draws_the_same_in_diffusers(model, opts, tmp_path):
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
    from PIL import Image

    picture = tmp_path / "pairs" / "source0.png"
    o = opts("--learning_rate", "1e-2", "--validation_steps", 1)
    o = replace(o, validation_image=[str(picture)], validation_prompt=["a"])
    assert train("controlnet", o) == 0
    assert (o.output_dir / "validation" / "step-000001.png").exists()
    assert {p.name for p in o.output_dir.iterdir()} >= {"config.json", "diffusion_pytorch_model.safetensors"}
    ControlNetModel.from_pretrained(o.output_dir)
    network = adapter.load(o.output_dir)
    shake(network, 0.1)  # two updates are not enough to tell one picture from another
    save_part(tmp_path / "shaken", network)
    theirs = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=ControlNetModel.from_pretrained(tmp_path / "shaken"), safety_checker=None
    )
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    sd = StableDiffusion.load(model)
    shown = [Image.open(picture).convert("RGB").resize((32, 32)), Image.new("RGB", (32, 32), "white")]
    from minisd.data import images

    hint = torch.stack([images.to_tensor(i) for i in shown]) / 2 + 0.5
    settings = Settings(width=32, height=32, steps=6, negative_prompt="ugly")
    steered = Control(network=network, hint=hint, scale=0.8)
    drawn = list(pictures(sd, ["a cat", "a dog"], [3, 4], settings, controls=[steered]))
    expected = theirs(
        ["a cat", "a dog"], shown, negative_prompt=["ugly"] * 2, num_inference_steps=6, guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)], controlnet_conditioning_scale=0.8,
    ).images  # fmt: skip
    assert all(psnr(a, b) >= 50 for a, b in zip(drawn, expected, strict=True))
    plain = list(pictures(sd, ["a cat", "a dog"], [3, 4], settings))
    assert psnr(drawn[0], plain[0]) < 45  # it does steer
    singly = list(pictures(sd, ["a cat", "a dog"], [3, 4], settings, controls=[steered], batch_size=1))
    assert all(psnr(a, b) >= 50 for a, b in zip(singly, drawn, strict=True))  # each by its own
    same = Control(network=network, hint=hint[:1].expand(2, -1, -1, -1), scale=0.8)
    assert psnr(list(pictures(sd, ["a cat", "a dog"], [3, 4], settings, controls=[same]))[1], drawn[1]) < 50


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--validation_image", "a.png"], "--validation_image has 1 and --validation_prompt 0"),
        (["--validation_image", "a", "b", "--validation_prompt", "x", "y", "z"], "as many of each"),
        (["--proportion_empty_prompts", "1.5"], "--proportion_empty_prompts"),
    ],
)
def test_mistakes(opts, capsys, flags, message):
    with pytest.raises(SystemExit):
        opts(*flags)
    assert message in capsys.readouterr().err
