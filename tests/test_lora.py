"""LoRA beside diffusers and PEFT: the modules, and the files of every format in both directions."""
# ruff: noqa: E501 (names of files are long)

import copy
import json
import math
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import files
from minisd.adapters import _adapter, lora, token_embedding
from minisd.formats import lora_names
from minisd.models import text, unet
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.test_sample import draw_theirs, psnr

ALL = ["attention", "feed_forward", "projections", "resnet"]
PROMPT = "a photo of a cat"


@cache
def loaded(folder) -> StableDiffusion:
    return StableDiffusion.load(folder)


def fresh(folder) -> StableDiffusion:
    """The model as it is on the disk; its tokenizer, which takes longest to load, is shared."""
    sd = loaded(folder)
    networks = (copy.deepcopy(sd.unet), sd.vae, copy.deepcopy(sd.text_encoder))
    return StableDiffusion(*networks, sd.tokenizer, sd.scheduler, sd.name)


@pytest.fixture
def sd(model):
    return fresh(model)


def randomised(updates, seed=0, size=0.2):
    """Updates as if trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates.values():
            update.lora_A.copy_(torch.randn(update.lora_A.shape, generator=generator) / update.rank)
            update.lora_B.copy_(size * torch.randn(update.lora_B.shape, generator=generator))
    return updates


def new(model, targets=ALL, rank=4, alpha=2.0, seed=0):
    """Trained updates, and the model that carries them."""
    sd = fresh(model)
    return sd, randomised(lora.insert(lora.networks(sd), targets, rank, alpha), seed)


@torch.no_grad()
def outputs(sd):
    """Context and prediction: everything a LoRA can change."""
    generator = torch.Generator().manual_seed(5)
    context = sd.encode_text([PROMPT, "x"])
    x = torch.randn(2, 4, 8, 8, generator=generator).to(context.dtype)
    return context, sd.unet(x, torch.tensor([3, 700]), context)


def close(a, b, tolerance=1e-5):
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def weights(sd):
    """What the networks amount to: the weights with all updates in them."""
    return lora.merged(lora.networks(sd))


def same_weights(a, b, tolerance=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=tolerance, rtol=0) for k in a)


def draw(sd):
    return next(pictures(sd, [PROMPT], [3], Settings(width=32, height=32, steps=8)))


def draw_with(pipe):
    return draw_theirs(pipe, [PROMPT], [3], 32, 32, num_inference_steps=8, guidance_scale=7.5)[0]


# --- Modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*ALL, "conv_in", "time_embedding.linear_1"])
def test_a_new_update_changes_nothing(sd, target):
    before, names = outputs(sd), set(lora.networks(sd).state_dict())
    updates = lora.insert(lora.networks(sd), [target], 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(outputs(sd), before, strict=True))
    assert names < set(lora.networks(sd).state_dict())  # base names stay
    assert all(p.dtype == torch.float32 for u in updates.values() for p in u.parameters())
    randomised(updates)
    assert not close(outputs(sd), before, 1e-3)


def test_how_it_begins():
    layer = torch.nn.Linear(1000, 50)
    update = lora.LowRank.new(layer.weight, 8, 8, 0)
    assert update.lora_A.shape == (8, 1000) and update.lora_B.shape == (50, 8)
    assert update.lora_A.std().item() == pytest.approx(1 / 8, rel=0.05) and not update.lora_B.any()


def test_targets(sd):
    networks = lora.networks(sd)
    assert len(lora.insert(networks, ["attention"], 2, 2)) == 7 * 8 + 2 * 4
    assert len(lora.insert(networks, ["attn2.to_k", "attn2.to_v"], 2, 2)) == 7 * 2
    assert len(lora.insert(networks, ["unet.conv_in", "conv_in"], 2, 2)) == 1
    for wrong in ("attn3", "o_q", ""):
        with pytest.raises(ValueError, match=f"--target_modules '{wrong}'"):
            lora.insert(networks, ["attention", wrong], 2, 2)


def with_weights(model, weights):
    """The model with all of its weights replaced."""
    sd = fresh(model)
    lora.networks(sd).load_state_dict(weights)
    return sd


def test_merged_equals_beside(model):
    sd, _ = new(model, [*ALL, "conv_in", "conv_out"], rank=3, alpha=5.0)
    beside, plain = outputs(sd), outputs(fresh(model))
    assert not close(beside, plain, 0.01)
    assert close(outputs(with_weights(model, weights(sd))), beside)


def test_merging_rounds_once(model):
    sd, updates = new(model)
    sd.unet.half()
    for update in updates.values():
        update.float()
    expected = {
        n: (sd.unet.get_submodule(n.removeprefix("unet.")).weight.float() + u.delta()).half()
        for n, u in updates.items()
        if n.startswith("unet.")
    }
    merged = lora.merged(sd.unet)
    assert all(torch.equal(merged[f"{n.removeprefix('unet.')}.weight"], w) for n, w in expected.items())


def test_dropout_is_for_training(model, sd):
    updates = randomised(lora.insert(sd.unet, ["attention"], 4, 4, 0.5))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert torch.equal(*(sd.unet(x, torch.tensor([9]), context) for _ in range(2)))
    a, b = (sd.unet(x, torch.tensor([9]), context) for _ in range(2))
    assert not torch.allclose(a, b) and len(updates) == 56


def test_scales_and_sums(model, tmp_path):
    """The scale is the share of the update, and several add: W + s1 D1 + s2 D2."""
    for name, rank, alpha, seed in (("a", 4, 2.0, 1), ("b", 2, 6.0, 2)):
        lora.save(tmp_path / f"{name}.safetensors", new(model, rank=rank, alpha=alpha, seed=seed)[1])
    base = weights(fresh(model))

    def attached(**scales):
        sd = fresh(model)
        for name, scale in scales.items():
            sd.attach(tmp_path / f"{name}.safetensors", scale)
        return sd

    nothing = attached(a=0.0, b=0.0)
    assert all(torch.equal(x, y) for x, y in zip(outputs(nothing), outputs(fresh(model)), strict=True))
    whole = {n: weights(attached(**{n: 1.0})) for n in "ab"}
    delta = {n: {k: whole[n][k] - base[k] for k in base} for n in "ab"}
    assert sum(d.any().item() for d in delta["a"].values()) == 140
    for scales in ({"a": 0.5}, {"a": 1.0, "b": 1.0}, {"a": -0.3, "b": 0.7}):
        sd = attached(**scales)
        expected = {k: base[k] + sum(s * delta[n][k] for n, s in scales.items()) for k in base}
        assert same_weights(weights(sd), expected)
        plain = fresh(model)
        lora.networks(plain).load_state_dict(expected)
        for each in (sd, plain):  # some machines' fp32 rounding is over the bound by the last layer
            lora.networks(each).double()
        assert close(outputs(sd), outputs(plain))


def same_outputs(a, b):
    return [torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True)]


def test_scales_are_set_anew(model, sd, tmp_path):
    """The text encoder's by itself; 0 leaves nothing, to the bit; by path, by name, and of a folder."""
    a, b = tmp_path / "a.b.safetensors", tmp_path / "run" / "pytorch_lora_weights.safetensors"
    lora.save(a, new(model, alpha=2.0)[1])
    lora.save(b, new(model, ["attention"], alpha=6.0, seed=2)[1])
    plain = fresh(model)
    sd.attach(a, 1.0, text_scale=0.0)
    assert same_outputs(sd, plain) == [True, False]
    sd.rescale("a.b", 0.0, text_scale=0.7)
    assert same_outputs(sd, plain) == [False, False]  # the UNet sees another context
    sd.attach(b.parent, 0.0)
    sd.rescale(a, 0.0)
    assert same_outputs(sd, plain) == [True, True]
    for name in ("a.b", "a.b.safetensors"):
        sd.rescale(name, 0.5)
        sd.rescale("run", -0.3)
        other = fresh(model)
        other.attach(a, 0.5)
        other.attach(b, -0.3)
        assert same_outputs(sd, other) == [True, True]
        sd.rescale(name, 0)
        sd.rescale(b.parent, 0)
        assert same_outputs(sd, plain) == [True, True]


def test_scales_that_would_change_nothing(model, sd, tmp_path):
    lora.save(tmp_path / "both.safetensors", new(model, ["to_q", "q_proj"])[1])
    lora.save(tmp_path / "unet.safetensors", new(model, ["to_q"])[1])
    lora.save(tmp_path / "text.safetensors", new(model, ["q_proj"])[1])
    token_embedding.save(tmp_path / "word.safetensors", "<word>", torch.zeros(1, 32), {})
    for name, scales, message in [
        ("unet", (1, 0.5), "unet.safetensors changes nothing in the text encoder, so its scale 0.5 there"),
        ("text", (0.5, 1), "text.safetensors changes nothing in the UNet, so its scale 0.5 there"),
        ("word", (0.5,), "word.safetensors is an embedding: it has no scale, so 0.5 would"),
        ("both", (math.nan,), "nan is no scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            sd.attach(tmp_path / f"{name}.safetensors", *scales)
        assert same_outputs(sd, fresh(model)) == [True, True] and not sd.attached
        sd.attach(tmp_path / f"{name}.safetensors", *[0] * (name != "word"))
        with pytest.raises(ValueError, match=message.replace(".safetensors", "")):
            sd.rescale(name, *scales)
        assert same_outputs(sd, fresh(model)) == [True, True]
        sd.attached.clear()
        sd = fresh(model)
    sd.tokenizer.placeholders.clear()


def test_names_of_what_is_attached(model, sd, tmp_path):
    for folder in "ab":
        lora.save(tmp_path / folder / "x.safetensors", new(model, ["to_q"])[1])
        sd.attach(tmp_path / folder, 0.5)
    for wrong in (tmp_path / "a", tmp_path / "a" / "x.safetensors"):
        with pytest.raises(ValueError, match="x.safetensors is attached already"):
            sd.attach(wrong)
    with pytest.raises(ValueError, match="^c is no adapter that is attached: .*/a, .*/b$"):
        sd.rescale("c", 1.0)
    (tmp_path / "c").mkdir()
    lora.save(tmp_path / "c" / "a.safetensors", new(model, ["to_k"])[1])
    sd.attach(tmp_path / "c" / "a.safetensors")
    with pytest.raises(ValueError, match="^a is the name of several adapters: "):
        sd.rescale("a", 1.0)


def test_a_folder_with_both_formats(model, sd, tmp_path):
    updates = new(model, ["to_q"])[1]
    lora.save(tmp_path / "w.safetensors", updates)
    torch.save(lora.state_dict(updates)[0], tmp_path / "w.bin")
    assert len(sd.attach(tmp_path)) == 1


def test_the_saved_model_has_it_in_its_weights(model, tmp_path):
    sd, _ = new(model)
    sd.save(tmp_path / "out")
    assert close(outputs(StableDiffusion.load(tmp_path / "out")), outputs(sd))


# --- Files: ours there, theirs here ----------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_ours_in_diffusers(model, pipe, tmp_path, form, alpha):
    """With two ranks and alphas in one file; in kohya's format diffusers takes but one of the text encoder."""
    sd, updates = new(model, ["attention", "projections"], 4, alpha)
    updates |= randomised(lora.insert(lora.networks(sd), ["ff.net.0.proj", "ff.net.2", "resnet"], 2, 3.0), 1)
    lora.save(tmp_path / "pytorch_lora_weights.safetensors", updates, form)
    plain = draw_with(pipe)
    pipe.load_lora_weights(tmp_path)
    here, there = draw(sd), draw_with(pipe)
    assert psnr(here, there) >= 50 and psnr(there, plain) < 40
    again = fresh(model)
    assert again.attach(tmp_path) == [
        "LoRA of rank 2, 4 on 128 modules of the UNet and 8 modules of the text encoder"
    ]
    assert same_weights(weights(again), weights(sd))


def peft_adapters(pipe, rank=3, alpha=6, **kwargs):
    """LoRAs of PEFT in both networks of a pipeline, as the field's script inserts them, with random B."""
    from peft import LoraConfig

    torch.manual_seed(1)
    common = {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian", **kwargs}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **common))
    pipe.text_encoder.add_adapter(
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **common)
    )
    for part in (pipe.unet, pipe.text_encoder):
        for name, p in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
            if "magnitude" in name:
                p.data.mul_(1 + 0.1 * torch.rand_like(p))


def save_peft(pipe, folder, metadata: bool):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {
        f"{n}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(m))
        for n, m in parts.items()
    }
    about = _collate_lora_metadata(parts) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **about)


@pytest.mark.parity
@pytest.mark.parametrize("alpha, metadata", [(6, True), (3, False)])
def test_theirs_here(sd, pipe, tmp_path, alpha, metadata):
    peft_adapters(pipe, alpha=alpha)
    save_peft(pipe, tmp_path, metadata)
    plain = draw(sd)
    assert sd.attach(tmp_path)[0].startswith("LoRA of rank 3 on")
    assert psnr(draw(sd), draw_with(pipe)) >= 50 and psnr(plain, draw(sd)) < 40


@pytest.mark.parity
def test_two_at_their_scales(model, pipe, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        updates = new(model, ["attention"], 4, 3.0, seed)[1]
        lora.save(tmp_path / name / "pytorch_lora_weights.safetensors", updates)
    for name in "ab":
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    for scales in ((0.5, 1.0), (0.0, 0.5)):
        pipe.set_adapters(["a", "b"], list(scales))
        sd = fresh(model)
        for name, scale in zip("ab", scales, strict=True):
            sd.attach(tmp_path / name, scale)
        assert psnr(draw(sd), draw_with(pipe)) >= 50


@pytest.mark.parity
def test_a_folder_of_peft(sd, pipe, tmp_path):
    """adapter_model.safetensors, with alpha in adapter_config.json alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    sd.attach(tmp_path)
    assert psnr(draw(sd), draw_with(pipe)) >= 50


@pytest.mark.parity
def test_dora_of_peft(sd, pipe, tmp_path):
    peft_adapters(pipe, use_dora=True)
    save_peft(pipe, tmp_path, True)
    assert "multiplied out" in sd.attach(tmp_path)[0]
    with torch.no_grad():
        ids = sd.tokenizer([PROMPT])
        assert torch.allclose(sd.encode_text([PROMPT]), pipe.text_encoder(ids)[0], atol=1e-4)
    assert psnr(draw(sd), draw_with(pipe)) >= 50


# --- Files: every generation -----------------------------------------------------------------------------

ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def unet_key(generation, path, which):
    attention, _, last = path.partition(".to_")
    old = f"{attention}.processor.{ATTENTION[f'to_{last}']}_lora.{which}.weight"
    peft = {"down": "lora_A", "up": "lora_B"}[which]
    return {
        "g0": old, "g1": f"unet.{old}", "g2": f"unet.{old}", "g3": f"unet.{old}",
        "g4": f"unet.{path}.lora.{which}.weight", "peft": f"unet.{path}.{peft}.weight",
        "bare": f"unet.{path}.lora.{which}.weight", "folder": f"base_model.model.{path}.{peft}.weight",
        "kohya": f"lora_unet_{path.replace('.', '_')}.lora_{which}.weight",
        "te1": f"lora_unet_{path.replace('.', '_')}.lora_{which}.weight",
    }[generation]  # fmt: skip


def text_key(generation, path, which):
    attention, _, last = path.rpartition(".")
    peft = {"down": "lora_A", "up": "lora_B"}[which]
    flat = path.replace(".", "_")
    return {
        "g1": f"text_encoder.{path}.to_q_lora.{which}.weight",
        "g2": f"text_encoder.{attention}.{PROJECTIONS[last]}_lora.{which}.weight",
        "g3": f"text_encoder.{path}.lora_linear_layer.{which}.weight",
        "g4": f"text_encoder.{path}.lora_linear_layer.{which}.weight",
        "peft": f"text_encoder.{path}.{peft}.weight",
        "bare": f"text_encoder.{path.removeprefix('text_model.')}.lora_linear_layer.{which}.weight",
        "folder": f"base_model.model.{path}.{peft}.weight",
        "kohya": f"lora_te_{flat}.lora_{which}.weight", "te1": f"lora_te1_{flat}.lora_{which}.weight",
    }[generation]  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "generation", ["g0", "g1", "g2", "g3", "g4", "peft", "bare", "folder", "kohya", "te1"]
)
def test_every_generation_is_read(model, sd, tmp_path, generation, suffix):
    targets = ["to_q", "to_k", "to_v", "to_out.0"] + ([] if generation == "g0" else [*PROJECTIONS])
    other, updates = new(model, targets, 4, 4.0)
    tensors = {}
    for name, update in updates.items():
        part, _, path = name.partition(".")
        key = unet_key if part == "unet" else text_key
        tensors[key(generation, path, "down")] = update.lora_A.detach().clone()
        tensors[key(generation, path, "up")] = update.lora_B.detach().clone()
        if generation == "g1" and part == "text_encoder":  # what 0.16 wrote beside it and never used
            for unused in ("to_k", "to_v", "to_out"):
                for which in ("down", "up"):
                    tensors[f"{name}.{unused}_lora.{which}.weight"] = torch.ones(4, 4)
    file = tmp_path / f"lora{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    assert sd.attach(file)[0].startswith("LoRA of rank 4 on")
    assert same_weights(weights(sd), weights(other))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_alpha_of_kohya(model, sd, tmp_path, alpha):
    """alpha / rank; 0 means the rank."""
    tensors, _ = lora.state_dict(new(model)[1], "kohya")
    tensors = {k: torch.tensor(alpha) if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    sd.attach(tmp_path / "x.safetensors")
    expected = weights(fresh(model))
    for name in lora.layers(lora.networks(sd)):
        if (down := tensors.get(f"{lora_names.kohya_stem(name)}.lora_down.weight")) is not None:
            up, weight = tensors[f"{lora_names.kohya_stem(name)}.lora_up.weight"], expected[f"{name}.weight"]
            expected[f"{name}.weight"] = weight + (alpha or 4) / 4 * (
                up.flatten(1) @ down.flatten(1)
            ).view_as(weight)
    assert same_weights(weights(sd), expected)


def test_alpha_patterns(model, sd, tmp_path):
    """PEFT's exceptions, by the end of a path; and its scale by the root of the rank."""
    _, updates = new(model, ["to_q", "q_proj"], 4, 4.0)
    tensors, _ = lora_names.to_diffusers({n: (u.lora_A, u.lora_B, 4.0) for n, u in updates.items()})
    about = {
        "unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 8},
        "text_encoder.lora_alpha": 3, "text_encoder.use_rslora": True,
    }  # fmt: skip
    files.write(tmp_path / "x.safetensors", tensors, {lora_names.METADATA: json.dumps(about)})
    read = _adapter.read(sd, tmp_path / "x.safetensors").updates
    expected = lambda n: 3 * 4**0.5 if "q_proj" in n else 8.0 if "attn1" in n else 2.0  # noqa: E731
    assert {n: u.alpha for n, u in read.items()} == {n: expected(n) for n in updates}


# --- Kohya's names ---------------------------------------------------------------------------------------

TRANSFORMERS = [
    *(f"down_blocks_{b}_attentions_{i}" for b in range(3) for i in range(2)), "mid_block_attentions_0",
    *(f"up_blocks_{b}_attentions_{i}" for b in range(1, 4) for i in range(3)),
]  # fmt: skip
WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3


def published(rank):
    """Key -> shape of what sd-scripts saves for SD v1.5 by default: 192 modules of the UNet, 72 of CLIP."""
    shapes = {}

    def add(stem, c_in, c_out, conv=False):
        tail = (1, 1) if conv else ()
        shapes[f"{stem}.lora_down.weight"] = (rank, c_in, *tail)
        shapes[f"{stem}.lora_up.weight"] = (c_out, rank, *tail)
        shapes[f"{stem}.alpha"] = ()

    for name, c in zip(TRANSFORMERS, WIDTHS, strict=True):
        stem = f"lora_unet_{name}"
        add(f"{stem}_proj_in", c, c, conv=True)
        add(f"{stem}_proj_out", c, c, conv=True)
        block = f"{stem}_transformer_blocks_0"
        for attention, c_context in (("attn1", c), ("attn2", 768)):
            add(f"{block}_{attention}_to_q", c, c)
            add(f"{block}_{attention}_to_k", c_context, c)
            add(f"{block}_{attention}_to_v", c_context, c)
            add(f"{block}_{attention}_to_out_0", c, c)
        add(f"{block}_ff_net_0_proj", c, 8 * c)
        add(f"{block}_ff_net_2", 4 * c, c)
    for i in range(12):
        stem = f"lora_te_text_model_encoder_layers_{i}"
        for p in "qkv":
            add(f"{stem}_self_attn_{p}_proj", 768, 768)
        add(f"{stem}_self_attn_out_proj", 768, 768)
        add(f"{stem}_mlp_fc1", 768, 3072)
        add(f"{stem}_mlp_fc2", 3072, 768)
    return shapes


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return torch.nn.ModuleDict(
            {"unet": unet.UNet(unet.SD15), "text_encoder": text.TextEncoder(text.SD15)}
        )


def test_kohya_s_names_and_shapes_are_the_published_ones(sd15):
    updates = {
        name: lora.LowRank.new(layer.weight, 4, 1.0, 0.0)
        for name, layer in lora.layers(sd15).items()
        if any(f".{name}".endswith(f".{end}") for t in ALL[:3] for end in lora.TARGETS[t])
    }
    tensors, about = lora.state_dict(updates, "kohya")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == published(4) and len(tensors) == 792
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "1")


def test_sizes_of_the_field_s_scripts(sd15):
    """What the scripts train at rank 4: 797,184 numbers in 128 layers, and 294,912 in 48 of the text encoder."""
    for part, count, size in (("unet", 128, 797_184), ("text_encoder", 48, 294_912)):
        updates = {
            name: lora.LowRank.new(layer.weight, 4, 1.0, 0.0)
            for name, layer in lora.layers(sd15[part]).items()
            if any(f".{name}".endswith(f".{end}") for end in lora.TARGETS["attention"])
        }
        assert len(updates) == count
        assert sum(p.numel() for u in updates.values() for p in u.parameters()) == size


def test_names_of_the_single_file(sd15):
    stems = lora_names.table(lora.layers(sd15), unet.SD15)
    assert None in stems.values()
    for theirs, ours in {
        "input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "output_blocks_3_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "time_embed_0": "time_embedding.linear_1", "out_2": "conv_out", "input_blocks_0_0": "conv_in",
    }.items():  # fmt: skip
        assert stems[f"lora_unet_{theirs}"] == f"unet.{ours}"


def test_no_name_means_two_modules(sd15):
    names = list(lora.layers(sd15))
    assert set(lora_names.table(names, unet.SD15).values()) == {*names, None}  # which asserts it
    assert len({lora_names.kohya_stem(n) for n in names}) == len(names)
    with pytest.raises(AssertionError, match="means unet.a.b and unet.a_b"):
        lora_names.table(["unet.a.b", "unet.a_b"], unet.SD15)


# --- Relatives -------------------------------------------------------------------------------------------


def relatives(kind, weight, generator):
    """Tensors of a relative of LoRA for a weight, and what they add to it, written out by itself."""

    def rand(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    o, i, *k = weight.shape
    n = math.prod(k)
    r, alpha = 3, 2.0
    t = {"alpha": torch.tensor(alpha)}
    if kind == "locon":
        t |= {"lora_down.weight": rand(r, i, *k), "lora_up.weight": rand(o, r, *[1] * len(k))}
        up, down = t["lora_up.weight"].view(o, r), t["lora_down.weight"].view(r, i * n)
        return t, sum(torch.outer(up[:, j], down[j]) for j in range(r)).view_as(weight) * alpha / r
    if kind == "tucker":
        t |= {
            "lora_down.weight": rand(r, i, 1, 1),
            "lora_up.weight": rand(o, r, 1, 1),
            "lora_mid.weight": rand(r, r, *k),
        }
        mid = t["lora_mid.weight"].permute(2, 3, 0, 1)  # (k, k, r, r)
        delta = t["lora_up.weight"].view(o, r) @ mid @ t["lora_down.weight"].view(r, i)
        return t, delta.permute(2, 3, 0, 1) * alpha / r
    if kind == "loha":
        t |= {f"hada_w{j}_a": rand(o, r) for j in "12"} | {f"hada_w{j}_b": rand(r, i * n) for j in "12"}
        return t, ((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])).view_as(
            weight
        ) * alpha / r
    if kind == "lokr":
        t |= {"lokr_w1": rand(4, 2), "lokr_w2_a": rand(o // 4, r), "lokr_w2_b": rand(r, i // 2 * n)}
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(o // 4, i // 2, *k)
        rows = [torch.cat([t["lokr_w1"][a, b] * w2 for b in range(2)], dim=1) for a in range(4)]
        return t, torch.cat(rows) * alpha / r
    if kind == "lokr_full":
        t |= {"lokr_w1": rand(4, 2), "lokr_w2": rand(o // 4, i // 2, *k)}
        rows = [torch.cat([t["lokr_w1"][a, b] * t["lokr_w2"] for b in range(2)], dim=1) for a in range(4)]
        return t, torch.cat(rows)
    axis = {"dora_out": 0, "dora_in": 1}[kind]
    plain, delta = relatives("locon", weight, generator)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    scale = rand(*shape).abs() + 0.5
    changed = weight + delta
    norm = changed.transpose(0, axis).flatten(1).norm(dim=1).view(shape)
    return plain | {"dora_scale": scale}, changed / norm * scale - weight


KINDS = ["locon", "tucker", "loha", "lokr", "lokr_full", "dora_out", "dora_in"]
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV, STRIDED = "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"


@pytest.mark.parametrize("kind", KINDS)
def test_relatives(model, sd, tmp_path, kind):
    generator = torch.Generator().manual_seed(1)
    base, tensors, deltas = weights(sd), {}, {}
    for path in [CONV, STRIDED] + ([LINEAR] if kind != "tucker" else []):
        t, delta = relatives(kind, base[f"unet.{path}.weight"], generator)
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{k}": v for k, v in t.items()}
        deltas[f"unet.{path}.weight"] = delta
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    sd.attach(tmp_path / "x.safetensors", 0.5)
    expected = {k: w + 0.5 * deltas[k] if k in deltas else w for k, w in base.items()}
    assert same_weights(weights(sd), expected)
    assert close(outputs(with_weights(model, weights(sd))), outputs(sd))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize("effective", [False, True])
def test_relatives_of_peft(sd, pipe, tmp_path, kind, effective):
    """PEFT's own LoHa and LoKr, with and without a Tucker core."""
    import peft

    torch.manual_seed(0)
    config = getattr(peft, f"{kind}Config")(
        r=2, alpha=3, target_modules=["conv1", "to_k", "downsamplers.0.conv"],
        use_effective_conv2d=effective, init_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(pipe.unet, config)
    state = peft.get_peft_model_state_dict(wrapped)
    tensors = {k.replace("base_model.model.", "unet."): v.detach().contiguous() for k, v in state.items()}
    stems = {lora_names.split(k)[0] for k in tensors}
    tensors |= {f"{stem}.alpha": torch.tensor(3.0) for stem in stems}
    assert any("_t2" in k for k in tensors) == effective
    save_file(tensors, tmp_path / "x.safetensors")
    sd.attach(tmp_path / "x.safetensors")
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        ours, theirs = sd.unet(x, torch.tensor([5]), context), pipe.unet(x, 5, context).sample
    assert close([ours], [theirs], 1e-4)


# --- Mistakes --------------------------------------------------------------------------------------------

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
GOOD = {f"{Q}.lora.down.weight": (4, 64), f"{Q}.lora.up.weight": (64, 4)}


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({f"{K}.lora.down.weight": (4, 1024), f"{K}.lora.up.weight": (64, 4)}, "LoRA for SD2"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight": (4, 2048)}, "LoRA for SDXL"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "LoRA for SDXL"),
        ({f"{K}.lora.down.weight": (4, 33), f"{K}.lora.up.weight": (64, 4)}, "another model"),
        (GOOD | {"unet.mid_block.nothing.lora.up.weight": (4, 4)}, "1 of its 3 keys .*mid_block.nothing.lora.up"),
        (GOOD | {f"{Q}.lora.middle.weight": (4, 4)}, "to_q.lora.middle.weight"),
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (4, 4)}, "unsupported: .*oft_blocks"),
        ({f"{Q}.lora.down.weight": (4, 64)}, "to_q .64, 64. has no up"),
        ({f"{Q}.lora.up.weight": (64, 4)}, "has no down"),
        ({f"lora_unet_{Q[5:].replace('.', '_')}.alpha": ()}, "alpha alone"),
        ({f"{Q}.lora.down.weight": (4, 65), f"{Q}.lora.up.weight": (64, 4)}, "does not fit this model: down .4, 65."),
        ({f"{Q}.lora.down.weight": (3, 64), f"{Q}.lora.up.weight": (64, 4)}, "does not fit"),
        ({f"{Q}.lora.down.weight": (64,), f"{Q}.lora.up.weight": (64,)}, "does not fit"),
        (GOOD | {f"{Q}.lora_A.weight": (4, 64)}, "to_q.lora_A.weight"),
        ({f"{Q}.lora_B.bias": (64,)} | GOOD, "lora_B.bias"),
        ({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.to_k_lora.up.weight": (4, 4)}, "none of its 1"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_files(sd, tmp_path, shapes, message):
    file = tmp_path / "wrong.safetensors"
    save_file({k: torch.ones(s) for k, s in shapes.items()}, file)
    before = outputs(sd)
    with pytest.raises(ValueError, match=f"wrong.safetensors.*{message}"):
        sd.attach(file)
    assert all(torch.equal(a, b) for a, b in zip(outputs(sd), before, strict=True))


def test_damaged_metadata(sd, tmp_path):
    tensors = {k: torch.ones(s) for k, s in GOOD.items()}
    files.write(tmp_path / "x.safetensors", tensors, {lora_names.METADATA: "{"})
    with pytest.raises(ValueError, match="x.safetensors.*lora_adapter_metadata"):
        sd.attach(tmp_path / "x.safetensors")


def test_embeddings_are_not_taken_for_a_lora():
    assert not lora.matches({"<lo>": torch.zeros(3)}) and not lora.matches({"emb_params": torch.zeros(1, 3)})


def test_the_same_bytes(model, tmp_path):
    for name in "ab":
        lora.save(tmp_path / name, new(model, ["attention"])[1], "kohya")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "b").keys()
