"""Diffusion of pixels: the network, its folder, its training and its pictures."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minisd.formats import config_json, diffusers, parts
from minisd.models import unet2d
from minisd.models.layers import timestep_embedding
from minisd.sampling.generate import Settings, denoise
from minisd.sampling.pixel_diffusion import PixelDiffusion, scheduler_config
from minisd.sampling.stable_diffusion import StableDiffusion
from tests import method_helpers
from tests.conftest import ROOT
from tests.helpers import TINY_PIXELS, assert_close, assert_same_gradients, same_weights
from tests.method_helpers import built, options, shake, train
from tests.picture_helpers import psnr

OLD = replace(
    TINY_PIXELS, head_dim=None, pad_end_only=True, frequency_shift=1, sines_first=True, norm_eps=1e-6
)


def diffusers_unet2d(config: unet2d.UNet2DConfig):
    theirs = pytest.importorskip("diffusers")
    return theirs.UNet2DModel.from_config(config_json.to_json("unet2d", config))


# The network


def test_counts_and_names_of_the_script_s():
    theirs = pytest.importorskip("diffusers").UNet2DModel
    with torch.device("meta"), parts._NoInit():
        ours = unet2d.UNet2D(unet2d.DDPM).state_dict()
        theirs = theirs(
            sample_size=64, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        )  # fmt: skip
    assert sum(t.numel() for t in ours.values()) == 113_673_219 and len(ours) == 450
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    written = config_json.to_json("unet2d", unet2d.DDPM)
    assert {n: v for n, v in written.items() if n[0] != "_"}.items() <= {
        n: list(v) if isinstance(v, tuple) else v for n, v in theirs.config.items()
    }.items()


@pytest.mark.parity
@pytest.mark.parametrize(
    "config", [TINY_PIXELS, OLD, replace(TINY_PIXELS, layers_per_block=2)], ids=["new", "old", "deep"]
)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_it_equals_diffusers(config, size):
    torch.manual_seed(0)
    theirs, ours = diffusers_unet2d(config), unet2d.UNet2D(config)
    same_weights(ours, theirs)
    x, timesteps = torch.randn(2, 3, *size), torch.tensor([7, 981])
    out, expected = ours(x, timesteps), theirs(x, timesteps).sample
    assert_close(out, expected, 2e-5)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("shift, sines_first", [(0, False), (1, True)])
def test_sinusoids(shift, sines_first):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0, 3, 999])
    expected = embeddings.get_timestep_embedding(t, 32, not sines_first, shift)
    assert torch.equal(timestep_embedding(t, 32, shift=shift, sines_first=sines_first), expected)


def test_sides_that_do_not_halve():
    assert unet2d.UNet2D(TINY_PIXELS)(torch.randn(1, 3, 18, 13), torch.tensor([5])).shape == (1, 3, 18, 13)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    torch.manual_seed(0)
    network, calls, grads = unet2d.UNet2D(TINY_PIXELS), [], []
    network.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    for _ in range(2):
        network.zero_grad()
        network(*x).square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
        network.enable_gradient_checkpointing()
    assert len(calls) == 3 and all(map(torch.equal, *grads))


# Its folder


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = unet2d.UNet2D(TINY_PIXELS)
    shake(network)
    model = PixelDiffusion(network, scheduler_config())
    model.save(tmp_path / "ddpm")
    return model, tmp_path / "ddpm"


def assert_same(a: PixelDiffusion, b: PixelDiffusion) -> None:
    assert a.unet.config == b.unet.config
    own, others = a.unet.state_dict(), b.unet.state_dict()
    assert own.keys() == others.keys() and all(torch.equal(own[n], others[n]) for n in own)


@pytest.mark.parity
def test_folders_go_both_ways(saved, tmp_path):
    from diffusers import DDPMPipeline

    model, folder = saved
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert_same(PixelDiffusion.load(folder), model)
    DDPMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = PixelDiffusion.load(tmp_path / "theirs")
    assert_same(again, model)
    assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    with pytest.raises(ValueError, match="without text"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("config", [TINY_PIXELS, OLD], ids=["new", "old"])
def test_configs_go_both_ways(config, tmp_path):
    config_json.write(tmp_path, "unet2d", config)
    assert config_json.read(tmp_path, "unet2d") == config


def test_old_names_are_written_and_new_ones_kept(saved, tmp_path):
    """diffusers 0.16 knows none but the old ones."""
    model, folder = saved
    path = "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(folder / path)
    ends = {name.partition("attentions.0.")[2] for name in tensors if "mid_block.attentions" in name}
    old = {f"{name}.{kind}" for name in diffusers.OLD_ATTENTION for kind in ("weight", "bias")}
    assert ends == old | {"group_norm.weight", "group_norm.bias"}
    assert_same(PixelDiffusion.load(folder), model)
    renamed = {}
    for name, t in tensors.items():
        for old, new in diffusers.OLD_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.") if ".attentions." in name else name
        renamed[name] = t
    assert renamed.keys() == model.unet.state_dict().keys() != tensors.keys()
    save_file(renamed, folder / path)
    again = PixelDiffusion.load(folder)
    assert_same(again, model)
    again.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / path).keys() == renamed.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types .* needs .*'AttnUpBlock2D'"),
        ({"attention_head_dim": 5}, "cannot be divided by 5 into heads"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ],
)
def test_other_configs_are_refused(tmp_path, change, message):
    config_json.write(tmp_path, "unet2d", TINY_PIXELS)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        config_json.read(tmp_path, "unet2d")


@pytest.mark.parity
def test_the_scheduler_is_the_script_s():
    from diffusers import DDPMScheduler

    expected = dict(DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").config)
    written = {n: v for n, v in scheduler_config().items() if n[0] != "_"}
    assert written.items() <= expected.items()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
@pytest.mark.parametrize("law", ["linear", "squaredcos_cap_v2"])
def test_it_draws_the_same_as_diffusers(saved, tmp_path, kind, law):
    from diffusers import DDPMPipeline

    from minisd.data import images

    model = PixelDiffusion(
        saved[0].unet, scheduler_config(prediction_type=kind, beta_schedule=law, num_train_timesteps=100)
    )
    model.save(tmp_path / "model")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    settings = Settings(steps=20, scheduler="ddpm")
    settings.width = settings.height = model.default_size
    *_, drawn = denoise(model, ["", ""], (3, 4), settings)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    expected = pipe(batch_size=2, generator=generators, num_inference_steps=20).images
    for a, b in zip(drawn, expected, strict=True):
        assert psnr(images.to_pil(a), b) >= 50
    assert drawn.std() > 0.05


# Training


@pytest.fixture
def opts(cat, tmp_path):
    def make(*flags):
        config_json.write(tmp_path, "unet2d", TINY_PIXELS)
        common = ("--data", cat, "--resolution", 16, "--model_config_name_or_path", tmp_path / "config.json")
        common += ("--output_dir", tmp_path / "out", "--eval_batch_size", 2, "--ddpm_num_inference_steps", 3)
        return options("unconditional", *common, *flags)

    return make


def test_defaults_are_the_script_s(cat):
    o = options("unconditional", "--data", cat)
    assert (o.resolution, o.num_train_epochs, o.adam_beta1, o.adam_weight_decay) == (64, 100, 0.95, 1e-6)
    assert (o.lr_scheduler, o.lr_warmup_steps, o.learning_rate, o.ema_warmup) == ("cosine", 500, 1e-4, True)
    assert o.ema_power == 0.75 and str(o.output_dir) == "ddpm-model-64" and not o.use_ema
    with torch.device("meta"):
        assert PixelDiffusion.new(o.resolution, None).unet.config == unet2d.DDPM


def test_all_of_it_trains_and_nothing_else_is_there(opts):
    m, trained, batch = built("unconditional", opts())
    assert method_helpers.networks(m).keys() == {"unet"}
    assert trained.keys() == {f"unet.{n}" for n, _ in m.sd.unet.named_parameters()}
    shake(m.sd.unet)
    m.sd.unet.requires_grad_(True)
    method_helpers.assert_exactly_these_train(m, trained, batch)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_the_loss_is_the_field_s(opts, tmp_path, kind):
    from diffusers import DDPMScheduler, UNet2DModel

    m, trained, batch = built("unconditional", opts("--prediction_type", kind, "--random_flip"))
    shake(m.sd.unet)
    m.save(tmp_path / "saved")
    loss = m.loss(batch)
    loss.backward()

    theirs = UNet2DModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type=kind)
    clean, noise, timesteps = batch["pixels"], m.draw("noise", batch, (3, 16, 16)), m.timesteps(batch)
    pred = theirs(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
    if kind == "epsilon":
        expected = F.mse_loss(pred, noise)
    else:
        bar = scheduler.alphas_cumprod[timesteps][:, None, None, None]
        expected = (bar / (1 - bar) * F.mse_loss(pred, clean, reduction="none")).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    method_helpers.assert_gradients(trained, theirs, "unet.")


def test_min_snr_caps_the_weight_of_a_clean_picture(opts):
    m, _, batch = built("unconditional", opts("--prediction_type", "sample", "--snr_gamma", "5"))
    m.timesteps = lambda batch: torch.tensor([0, 0, 0, 0])  # SNR 9999
    pred = m.sd.unet(m.sd.schedule.add_noise(batch["pixels"], m.draw("noise", batch, (3, 16, 16)),
                                             m.timesteps(batch)), m.timesteps(batch))  # fmt: skip
    assert m.loss(batch).item() == pytest.approx(5 * F.mse_loss(pred, batch["pixels"]).item(), rel=1e-5)


def test_bf16_keeps_what_trains_in_fp32(opts):
    m, _, batch = built("unconditional", opts())
    expected = m.loss(batch).item()
    m, trained, batch = built("unconditional", opts("--mixed_precision", "bf16", "--gradient_checkpointing"))
    loss = m.loss(batch)
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())
    assert loss.item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parity
def test_a_run_counts_epochs_and_leaves_the_average(opts, monkeypatch):
    """Five pictures by two: three updates an epoch. Pictures every epoch, the model every second one."""
    from diffusers import DDPMPipeline

    o = replace(
        opts("--use_ema", "--num_epochs", "2", "--save_images_epochs", "1", "--save_model_epochs", "2"),
        max_train_steps=None, learning_rate=1e-2, lr_warmup_steps=0,
    )  # fmt: skip
    from minisd.training import loop
    from minisd.training.run_folder import RunFolder

    m = method_helpers.new("unconditional", o)
    live, saved = {}, []
    save, setup = m.save_intermediate, m.setup
    m.save_intermediate = lambda folder, step: (saved.append(step), save(folder, step))
    m.setup = lambda: live.update(setup()) or live
    assert loop.train(m, RunFolder("unconditional", o)) == 0
    assert saved == [6]
    assert sorted(p.name for p in (o.output_dir / "validation").iterdir()) == ["step-000003.png"]
    assert len((o.output_dir / "log.jsonl").read_text().splitlines()) == 6
    pipe = DDPMPipeline.from_pretrained(o.output_dir)
    state = pipe.unet.state_dict()
    assert any(not torch.equal(state[n.removeprefix("unet.")], p) for n, p in live.items())


def test_no_text_encoder_is_paid_for(cat, opts, tmp_path):
    o = opts()
    code = f"""
import sys
sys.argv = ["train.py", "--method", "unconditional", "--data", {str(cat)!r}, "--resolution", "16",
            "--model_config_name_or_path", {str(o.model_config_name_or_path)!r}, "--max_train_steps", "1",
            "--ddpm_num_inference_steps", "2", "--report_to", "none", "--output_dir", {str(tmp_path / "o")!r}]
import runpy
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as e:
    print("STATUS", e.code)
print("LOADED", [n for n in ("transformers", "diffusers", "accelerate") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "STATUS 0" in done.stdout and "LOADED []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preserve_input_precision"], "--preserve_input_precision"),
        (["--ddpm_num_steps", "2"], "--ddpm_num_inference_steps must not be more"),
        (["--save_model_epochs", "0"], "--save_model_epochs must be positive"),
        (["--validation_prompt", "x"], "--validation_prompt is not a flag of this method"),
        (["--pretrained_model_name_or_path", "x"], "is not a flag of this method"),
    ],
)
def test_mistakes(opts, capsys, flags, message):
    with pytest.raises(SystemExit):
        opts(*flags)
    assert message in capsys.readouterr().err


def test_a_resolution_that_does_not_halve_is_said_first(opts):
    o = replace(opts(), model_config_name_or_path=None, resolution=72)
    with pytest.raises(ValueError, match="--resolution 72: this network needs a multiple of 32"):
        train("unconditional", o)
