"""Files of LoRAs and their relatives: every generation of names, in both directions, and what is refused."""
# ruff: noqa: E501 (names of files are long)

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import files
from minisd.adapters import _adapter, lora
from minisd.formats import lora_names
from minisd.models import text, unet
from tests.lora_helpers import (
    ALL,
    PROJECTIONS,
    close,
    draw,
    draw_with,
    fresh,
    named,
    new,
    outputs,
    randomised,
    relatives,
    same_weights,
    weights,
    with_weights,
)
from tests.picture_helpers import psnr


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
    assert psnr(here, there) >= 50 and psnr(there, plain) < 45
    again = fresh(model)
    assert again.attach(tmp_path) == [
        "LoRA of rank 2, 4 on 128 modules of the UNet and 8 modules of the text encoder"
    ]
    assert same_weights(weights(again), weights(sd))


@pytest.mark.parity
def test_the_form_of_diffusers_0_16(model, pipe, tmp_path):
    """Which builds four projections of one rank for every attention of the UNet, and demands all of them. That
    release has drawn the same from such a file (docs/formats.md); a newer one wants `unet.` before the names."""
    sd, updates = new(model, ["attention"], 4, 1.0)
    text = [n for n in updates if n.startswith("text_encoder.")]
    with pytest.raises(ValueError, match=f"diffusers 0.16 has no LoRA of {text[0]}"):
        lora.save(tmp_path / "x.safetensors", updates, "diffusers-0.16")
    for name in text:
        updates.pop(name).scale = 0.0
    lora.save(tmp_path / "pytorch_lora_weights.safetensors", updates, "diffusers-0.16")
    four = [f"{p}_lora.{d}.weight" for p in ("to_q", "to_k", "to_v", "to_out") for d in ("down", "up")]
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert sorted(tensors) == sorted(f"{name}.{end}" for name in pipe.unet.attn_processors for end in four)
    pipe.load_lora_weights({f"unet.{name}": t for name, t in tensors.items()})
    assert psnr(draw(sd), draw_with(pipe)) >= 50
    again = fresh(model)
    again.attach(tmp_path)
    assert same_weights(weights(again), weights(sd))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "generation", ["g0", "g1", "g2", "g3", "g4", "peft", "bare", "folder", "lcm", "kohya", "te1"]
)
def test_every_generation_is_read(model, sd, tmp_path, generation, suffix):
    targets = ["to_q", "to_k", "to_v", "to_out.0"] + ([] if generation == "g0" else [*PROJECTIONS])
    other, updates = new(model, targets, 4, 4.0)
    tensors = named(updates, generation)
    if generation == "g1":  # what 0.16 wrote beside it and never used
        for name in (name for name in updates if name.startswith("text_encoder.")):
            for unused in ("to_k", "to_v", "to_out"):
                tensors[f"{name}.{unused}_lora.down.weight"] = torch.ones(4, 4)
                tensors[f"{name}.{unused}_lora.up.weight"] = torch.ones(4, 4)
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
