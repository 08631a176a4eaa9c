"""Adapters of every format draw what diffusers draws with them, or with the weights that they amount to."""

import itertools

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from minisd import cli, files
from minisd.adapters import lora
from minisd.formats import lora_names
from minisd.models import layers
from minisd.sampling import run
from tests.lora_helpers import (
    PROJECTIONS,
    PROMPT,
    custom,
    draw,
    draw_plain,
    draw_with,
    fresh,
    named,
    new,
    peft_adapters,
    save_peft,
    weights,
)
from tests.picture_helpers import psnr

pytestmark = pytest.mark.parity
ATTENTION = "mid_block.attentions.0.transformer_blocks.0."


@pytest.fixture(autouse=True)
def shared_tokenizer(model):
    """It keeps no words of the test before."""
    yield
    fresh(model).tokenizer.placeholders.clear()


# --- A matrix of formats, scales and sums ----------------------------------------------------------------


def generation(name, model, folder):
    """By the published names of a generation of the diffusers format, PEFT's or kohya's."""
    targets = ["attn1.to_q", "attn2.to_k", "attn2.to_v", "to_out.0", *(PROJECTIONS if name != "g0" else ())]
    updates = new(model, targets, 4, 4.0)[1]
    save_file(named(updates, name), folder / "x.safetensors")
    if name in ("g0", "g1"):  # which diffusers no longer reads
        return {f"{layer}.weight": update.delta() for layer, update in updates.items()}


def by_diffusers(name, model, folder):
    """By save_lora_weights, and from there by diffusers' own conversion to kohya's names."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_kohya

    other = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    peft_adapters(other, rank=3, alpha=6)
    save_peft(other, folder, metadata=True)
    file = folder / "pytorch_lora_weights.safetensors"
    if name == "convert_to_kohya":
        state = {
            key.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B")
            .replace(".lora_linear_layer.down", ".lora_A").replace(".lora_linear_layer.up", ".lora_B"): tensor
            for key, tensor in files.read(file).items()
        }  # fmt: skip
        tensors = {k: v.contiguous() for k, v in convert_state_dict_to_kohya(state).items()}
        stems = {lora_names.split(k)[0] for k in tensors}
        # It writes alpha = rank, having read none.
        tensors |= {f"{stem}.alpha": torch.tensor(6.0) for stem in stems}
        file.unlink()
        save_file(tensors, folder / "x.safetensors")


def sd_scripts(name, model, folder):
    """As sd-scripts writes a LoCon: linear layers and convolutions of two ranks, halves, alphas."""
    attention = new(model, ["attention", "feed_forward", "projections"], 4, 1.0)[1]
    tensors = {}
    for updates in (attention, new(model, ["resnet", "conv_in"], 2, 3.0, seed=1)[1]):
        tensors |= lora.state_dict(updates, "kohya")[0]
    save_file({k: v.half() for k, v in tensors.items()}, folder / "x.safetensors")


MATRIX = {
    **dict.fromkeys(["g0", "g1", "g2", "g3", "g4", "peft", "te1"], generation),
    **dict.fromkeys(["save_lora_weights", "convert_to_kohya"], by_diffusers),
    "sd_scripts": sd_scripts,
    **dict.fromkeys(
        ["custom.safetensors", "custom.bin", "delta.bin", "compressed.bin", "delta.ckpt"], custom
    ),
}  # fmt: skip


def merge(pipe, plain, deltas, scale):
    """Base plus scale times the change, under whatever names the pipeline's modules have now."""
    for part in ("unet", "text_encoder"):
        state = getattr(pipe, part).state_dict()
        for name, delta in deltas.items():
            if name.startswith(f"{part}."):
                path = name.removeprefix(f"{part}.").removeprefix("text_model.")
                layer, _, kind = path.rpartition(".")
                state.get(path, state.get(f"{layer}.base_layer.{kind}")).copy_(plain[name] + scale * delta)


@pytest.mark.parametrize("form", MATRIX)
def test_same_pictures(model, pipe, tmp_path, form):
    """At three scales, and with a second adapter beside it."""
    other, folder = tmp_path / "other.safetensors", tmp_path / "x"
    lora.save(other, new(model, ["attn2.to_k", "conv1"], 2, 3.0, seed=9)[1], "kohya")
    folder.mkdir()
    deltas = MATRIX[form](form, model, folder)
    if deltas is None:
        pipe.load_lora_weights(folder, adapter_name="x")
    sd = fresh(model)
    plain = weights(sd)
    sd.attach(folder)
    drawn = {}
    for scale, second in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.7)):
        if second:
            sd.attach(other, second)
            pipe.load_lora_weights(other, adapter_name="other")
        sd.rescale("x", scale)
        if deltas is not None:
            merge(pipe, plain, deltas, scale)
        scales = {"x": scale} if deltas is None else {}
        scales |= {"other": second} if second else {}
        if scales:
            pipe.set_adapters(list(scales), list(scales.values()))
        drawn[scale, second] = draw(sd)
        if not scale:
            assert drawn[scale, second] == draw_plain(model)
            continue
        assert psnr(drawn[scale, second], draw_with(pipe)) >= 50, (scale, second)
    assert all(psnr(a, b) < 45 for a, b in itertools.combinations(drawn.values(), 2))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_a_folder_of_peft_s_relatives(model, pipe, tmp_path, kind):
    """alpha, and with LoKr's whole matrices the rank too, are in adapter_config.json alone."""
    import peft

    torch.manual_seed(0)
    config = getattr(peft, f"{kind}Config")(
        r=40, alpha=100, target_modules=["conv1", "to_k"], alpha_pattern={"attn2.to_k": 60},
        rank_pattern={"mid_block.resnets.0.conv1": 2}, init_weights=False,
    )  # fmt: skip
    peft.get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    assert kind == "LoHa" or any(
        k.endswith("lokr_w2") for k in files.read(tmp_path / "adapter_model.safetensors")
    )
    sd = fresh(model)
    sd.attach(tmp_path)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        ours, theirs = sd.unet(x, torch.tensor([5]), context), pipe.unet(x, 5, context).sample
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max())


def test_a_folder_of_peft(sd, pipe, tmp_path):
    """adapter_model.safetensors, with alpha in adapter_config.json alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    sd.attach(tmp_path)
    assert psnr(draw(sd), draw_with(pipe)) >= 50


def test_dora(model, sd, pipe, tmp_path):
    """By PEFT's names, and by kohya's, whose norms diffusers leaves out: they are the same numbers."""
    peft_adapters(pipe, use_dora=True)
    save_peft(pipe, tmp_path / "peft", metadata=True)
    table = lora_names.table(lora.layers(lora.networks(sd)), sd.unet.config)
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
    tensors = {}
    for key, tensor in files.read(tmp_path / "peft" / "pytorch_lora_weights.safetensors").items():
        stem, kind = lora_names.split(key)
        stem = lora_names.kohya_stem(table[stem])
        tensors[f"{stem}.{names[kind]}"] = tensor[:, None] if kind == "magnitude" else tensor
        tensors[f"{stem}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = draw_with(pipe)
    for path in (tmp_path / "peft", tmp_path / "x.safetensors"):
        sd = fresh(model)
        assert "multiplied out" in sd.attach(path)[0]
        assert psnr(draw(sd), expected) >= 50 and psnr(draw(sd), draw_plain(model)) < 45


def test_nothing_is_left_where_the_weights_are_laid_out_as_on_a_gpu(model, tmp_path):
    """There, three products are one, and a product of another shape may round otherwise."""
    lora.save(tmp_path / "x.safetensors", new(model, ["to_q", "to_v"])[1])
    sd = fresh(model)
    layers.to_channels_last(sd.unet)
    attention = sd.unet.get_submodule(f"{ATTENTION}attn1")
    weights = attention.to_q, attention.to_k, attention.to_v
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        whole = layers.fused_qkv(x, *weights)
        sd.attach(tmp_path / "x.safetensors", 0.0)
        weights = attention.to_q, attention.to_k, attention.to_v
        for scale, pieces in ((0.0, 1), (0.5, 3), (0.0, 1)):
            sd.rescale("x", scale)
            found = layers.fused_qkv(x, *weights)
            assert len({t.untyped_storage().data_ptr() for t in found}) == pieces
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True)) == (scale == 0)


# --- Words -----------------------------------------------------------------------------------------------


def parameter_dict(rows):
    """As the first implementation wrote it, and A1111 with an old torch."""
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})


ROWS = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
A1111 = {
    "string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(ROWS)}, "name": "other",
    "step": 1499, "sd_checkpoint": "81761151", "sd_checkpoint_name": None,
}  # fmt: skip
AUTHORS = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameter_dict(ROWS)}
WORDS = {
    "emb_params.safetensors": {"emb_params": ROWS}, "zws.safetensors": {"*": ROWS},
    "<flora>.safetensors": {"<flora>": ROWS}, "zwh.bin": {"zwh": ROWS.half().float()},
    "a1111.pt": A1111, "zw-authors.pt": AUTHORS, "zw-legacy.pt": A1111,
    "old-torch.pt": A1111 | {"string_to_param": parameter_dict(ROWS)},
    "zwx.safetensors": {"bundle_emb.zwx.string_to_param.*": ROWS},
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_forms_of_embeddings(model, pipe, tmp_path, name):
    file, content = tmp_path / name, WORDS[name]
    if name.endswith(".safetensors"):
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=name != "zw-legacy.pt")
    sd = fresh(model)
    assert sd.attach(file) == [f"{file.stem} (2 vectors)"]
    pipe.load_textual_inversion({file.stem: ROWS})
    prompt = f"a photo of {file.stem} here"
    assert psnr(draw(sd, prompt), draw_with(pipe, prompt)) >= 50
    assert psnr(draw(sd, prompt), draw(sd, "a photo of x here")) < 45


def test_a_lora_with_its_words(model, tmp_path):
    tensors, _ = lora.state_dict(new(model, ["to_q"])[1], "kohya")
    save_file(tensors | {"bundle_emb.zwx.string_to_param.*": ROWS}, tmp_path / "x.safetensors")
    sd = fresh(model)
    assert sd.attach(tmp_path / "x.safetensors", 0.0) == [
        "LoRA of rank 4 on 14 modules of the UNet, zwx (2 vectors)"
    ]
    assert len(sd.tokenizer.encode("zwx")) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "x.* is an embedding for SDXL"),
        ({"emb_params": torch.ones(1, 1024)}, "x.safetensors: x is 1024 wide, for SD2; .* encoder 32"),
        ({"bundle_emb.word.clip_g": torch.ones(1, 1280)}, "is an embedding for SDXL"),
        ({"string_to_param.*": ROWS, "string_to_param.b": ROWS + 1}, "b .2, 32. is no embedding"),
        ({"bundle_emb.a.string_to_param.*": ROWS[None] * 1}, r"\(1, 2, 32\) is no embedding"),
        ({"cat": ROWS}, "'cat' is a token already"),
        ({"unet.x.attn2.to_k.weight": ROWS, "modifier_token.x": ROWS + 1}, "1 of its 1 keys .*unet.x.attn2"),
        (
            {f"unet.{ATTENTION}attn2.to_k.weight": torch.ones(64, 33)},
            "to_k .64, 32. does not fit this model: weight .64, 33.",
        ),
        ({f"unet.{ATTENTION}attn2.to_k.bias": torch.ones(64)}, "to_k .64, 32. has no u: bias .64,."),
        ({f"unet.{ATTENTION}attn2.to_k.weight.u": torch.ones(64, 3)}, "to_k .64, 32. has no v: u .64, 3."),
        ({"first_stage_model.x.weight": torch.ones(3, 3, 3)}, "is no adapter of a known kind"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes(model, tmp_path, content, message):
    save_file(content, tmp_path / "x.safetensors")
    sd = fresh(model)
    with pytest.raises(ValueError, match=message):
        sd.attach(tmp_path / "x.safetensors")
    assert not sd.attached and not sd.tokenizer.placeholders


def test_an_lcm_lora_draws_in_four_steps(model, pipe, tmp_path):
    """A plain LoRA of the UNet, convolutions included; the rest is what the command says."""
    from diffusers import LCMScheduler

    updates = {n: u for n, u in new(model, alpha=0.5)[1].items() if n.startswith("unet.")}
    lora.save(tmp_path / "pytorch_lora_weights.safetensors", updates, "kohya")
    flags = ["--model", model, "--adapter", tmp_path, "--prompt", PROMPT, "--output", tmp_path / "x.png"]
    flags += ["--scheduler", "lcm", "--steps", 4, "--guidance_scale", 1, "--seed", 3, "--device", "cpu"]
    run.run(cli.parse_sample(list(map(str, flags))))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(tmp_path)
    generator = torch.Generator().manual_seed(3)
    expected = pipe(PROMPT, num_inference_steps=4, guidance_scale=1, generator=generator).images[0]
    assert psnr(Image.open(tmp_path / "x.png"), expected) >= 50
