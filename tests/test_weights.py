"""Model files: what is written is read back, and what others write is read."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import files, registry
from minisd.formats import config_json, diffusers, parts, single_file
from minisd.formats.parts import PARTS, PipelineParts
from minisd.models import text, unet, vae
from minisd.models.tokenizer import END, START, Tokenizer
from minisd.options import TINY
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.helpers import full_size
from tests.weights_helpers import TEXT, UNET, VAE, assert_equal, listing, rewrite, tiny

# --- Registry -----------------------------------------------------------------------------------------------


def test_a_path_finds_its_format(sd_folder, sd_file):
    assert registry.match("formats", sd_folder) is diffusers
    assert registry.match("formats", sd_file) is single_file
    assert {"single_file", "diffusers"} <= set(registry.names("formats"))
    assert registry.summary("formats", "single_file").startswith("A single .safetensors")


def test_no_format_names_the_path_and_the_formats(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is none .*diffusers: .*single_file: "):
        registry.match("formats", tmp_path / "empty")
    with pytest.raises(ValueError, match="unknown format 'nonesuch'; one of: .*single_file"):
        registry.load("formats", "nonesuch")


def test_matching_runs_only_on_modules_with_matches(tmp_path, monkeypatch):
    package = tmp_path / "zoo"
    package.mkdir()
    (package / "plain.py").write_text('"""No format."""')
    (package / "even.py").write_text('"""Even numbers.\n\nMore."""\ndef matches(n):\n    return n % 2 == 0\n')
    (package / "_hidden.py").write_text("raise RuntimeError")
    monkeypatch.setattr(registry, "HERE", tmp_path)
    monkeypatch.setattr("minisd.__path__", [str(tmp_path)])
    assert registry.names("zoo") == ["even", "plain"]
    assert registry.match("zoo", 4).__name__ == "minisd.zoo.even"
    with pytest.raises(ValueError, match=r"3 is none of .* \(even: Even numbers\)"):
        registry.match("zoo", 3)


# --- Names and counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, config, numbers, tensors",
    [
        ("unet", unet.SD15, 859_520_964, 686),
        ("vae", vae.SD15, 83_653_863, 248),
        ("text_encoder", text.SD15, 123_060_480, 196),
    ],
)
def test_counts_and_table_of_sd15(part, config, numbers, tensors):
    network = parts.build(part, config, "SD15")
    state = network.state_dict()
    assert (sum(tensor.numel() for tensor in state.values()), len(state)) == (numbers, tensors)
    table = single_file.table(part, network)
    assert table.keys() == state.keys()
    assert len(set(table.values())) == tensors


def test_names_that_are_known_by_heart():
    table = single_file.table("unet", parts.build("unet", unet.SD15, ""))
    table |= single_file.table("vae", parts.build("vae", vae.SD15, ""))
    u, v = "model.diffusion_model.", "first_stage_model."
    to_k = "transformer_blocks.0.attn2.to_k.weight"
    for ours, theirs in {
        "time_embedding.linear_2.bias": u + "time_embed.2.bias",
        "down_blocks.1.resnets.0.conv_shortcut.weight": u + "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.downsamplers.0.conv.weight": u + "input_blocks.9.0.op.weight",
        "mid_block.attentions.0.proj_in.weight": u + "middle_block.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.bias": u + "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": u + "output_blocks.5.2.conv.bias",
        "up_blocks.3.attentions.2." + to_k: u + "output_blocks.11.1." + to_k,
        "decoder.up_blocks.0.resnets.2.conv1.weight": v + "decoder.up.3.block.2.conv1.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias": v + "encoder.mid.attn_1.proj_out.bias",
    }.items():
        assert table[ours] == theirs


@pytest.mark.parity
@pytest.mark.parametrize("part, config", [("unet", unet.SD15), ("vae", vae.SD15)])
def test_table_equals_the_oracles_converter(part, config):
    from diffusers.loaders import single_file_utils as oracle

    table = single_file.table(part, parts.build(part, config, "SD15"))
    numbers = {name: i for i, name in enumerate(table)}
    # The converter moves whatever tensor has the name, so each tensor carries its native name's number.
    content = {theirs: torch.full((1, 1, 1, 1), float(numbers[ours])) for ours, theirs in table.items()}
    convert = {"unet": oracle.convert_ldm_unet_checkpoint, "vae": oracle.convert_ldm_vae_checkpoint}[part]
    kwargs = config_json.to_json(part, config)
    converted = convert(content, config=kwargs)
    assert {name: int(tensor.flatten()[0]) for name, tensor in converted.items()} == numbers


# --- Round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folder_to_single_file_to_folder(tmp_path, dtype, channels):
    start = tiny(replace(UNET, in_channels=channels), dtype)
    start.scheduler["prediction_type"] = "v_prediction"
    diffusers.save(tmp_path / "a", start)
    first = diffusers.load(tmp_path / "a")
    single_file.save(tmp_path / "b.safetensors", first)
    second = single_file.load(tmp_path / "b.safetensors")
    diffusers.save(tmp_path / "c", second)
    assert_equal(start, first)
    assert_equal(start, second)
    assert_equal(start, diffusers.load(tmp_path / "c"))
    assert listing(tmp_path / "a") == listing(tmp_path / "c")


def test_single_file_has_the_fields_shapes_and_metadata(sd_file):
    tensors, about = files.read_with_metadata(sd_file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
    assert shapes["first_stage_model.decoder.mid.attn_1.q.bias"] == (64,)
    assert shapes["model.diffusion_model.input_blocks.1.1.proj_in.weight"] == (32, 32, 1, 1)
    assert about["format"] == "pt" and about["modelspec.architecture"] == "stable-diffusion-v1"
    assert about["modelspec.prediction_type"] == "epsilon"


def test_same_tensors_same_bytes(sd_parts, sd_file, tmp_path):
    single_file.save(tmp_path / "again.safetensors", sd_parts)
    assert (tmp_path / "again.safetensors").read_bytes() == sd_file.read_bytes()
    assert load_file(sd_file).keys() == files.read(sd_file).keys()  # the library reads it too


def test_mixed_precision_stays(sd_parts, tmp_path):
    tensors = sd_parts.unet.state_dict()
    tensors["conv_in.weight"] = tensors["conv_in.weight"].half()
    mixed = replace(sd_parts, unet=parts.fill(parts.build("unet", UNET, ""), tensors, ""))
    single_file.save(tmp_path / "m.safetensors", mixed)
    assert_equal(mixed, single_file.load(tmp_path / "m.safetensors"))


def test_saving_over_the_files_that_are_mapped(sd_parts, tmp_path):
    diffusers.save(tmp_path / "model", sd_parts)
    (tmp_path / "model" / "log.jsonl").write_text("mine")
    loaded = diffusers.load(tmp_path / "model")
    loaded.unet.state_dict()["conv_in.bias"].add_(1)
    diffusers.save(tmp_path / "model", loaded)
    assert_equal(loaded, diffusers.load(tmp_path / "model"))
    assert (tmp_path / "model" / "log.jsonl").read_text() == "mine"
    single_file.save(tmp_path / "model.safetensors", loaded)
    mapped = single_file.load(tmp_path / "model.safetensors")
    single_file.save(tmp_path / "model.safetensors", mapped)
    assert_equal(loaded, mapped)
    assert_equal(loaded, single_file.load(tmp_path / "model.safetensors"))
    assert listing(tmp_path)[:2] == ["model", "model.safetensors"]


def test_one_part_alone(sd_parts, tmp_path):
    diffusers.save_part(tmp_path / "vae", sd_parts.vae)
    assert_equal(sd_parts, replace(sd_parts, vae=diffusers.load_part(tmp_path / "vae", "vae")))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    files.write(file, {k: v for k, v in files.read(file).items() if k != "encoder.conv_in.bias"})
    with pytest.raises(ValueError, match="vae.*1 missing .*conv_in.bias"):
        diffusers.load_part(tmp_path / "vae", "vae")


def test_fill_gives_a_module_the_mapped_tensors(sd_folder):
    loaded = diffusers.load(sd_folder)
    for part, network in loaded.networks.items():
        tensors = network.state_dict()
        module = parts.build(part, network.config, sd_folder)
        frozen = next(module.parameters()).requires_grad_(False)
        assert parts.fill(module, tensors, sd_folder) is module
        assert frozen.is_meta and not next(module.parameters()).requires_grad
        module.requires_grad_(True)
        state = module.state_dict()
        assert all(state[k].data_ptr() == v.data_ptr() for k, v in tensors.items())
        assert all(p.requires_grad and not p.is_meta for p in module.parameters())
    assert loaded.text_encoder(torch.tensor([[49406, 320, 49407]])).shape == (1, 3, 32)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_fill_names_what_does_not_fit(sd_parts, change):
    tensors = sd_parts.unet.state_dict()
    if change == "missing":
        del tensors["conv_in.weight"]
    elif change == "unknown":
        tensors["conv_extra.weight"] = torch.zeros(1)
    else:
        tensors["conv_in.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"here\.bin: 1 .*{change}.*conv_"):
        parts.fill(parts.build("unet", UNET, "x"), tensors, "here.bin")


# --- What others write --------------------------------------------------------------------------------------


def old_names(tensors: dict) -> dict:
    for old, new in diffusers.OLD_ATTENTION.items():
        tensors = {k.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): v for k, v in tensors.items()}
    return tensors


def test_old_and_new_names_in_a_folder(sd_parts, tmp_path):
    diffusers.save(tmp_path / "m", sd_parts)
    old = old_names(sd_parts.vae.state_dict())
    assert "encoder.mid_block.attentions.0.query.weight" in old and "to_q" not in "".join(old)
    save_file(old, tmp_path / "m/vae/diffusion_pytorch_model.safetensors")
    bare = {k.removeprefix("text_model."): v for k, v in sd_parts.text_encoder.state_dict().items()}
    save_file(
        {**bare, "embeddings.position_ids": torch.arange(77)[None]},
        tmp_path / "m/text_encoder/model.safetensors",
    )
    nested = {"model_type": "clip", "text_config": config_json.to_json("text_encoder", TEXT)}
    (tmp_path / "m/text_encoder/config.json").write_text(json.dumps(nested))
    assert_equal(sd_parts, diffusers.load(tmp_path / "m"))


@pytest.mark.parametrize("changed", [{"unet"}, set(PARTS)], ids=["frozen", "trained"])
@pytest.mark.parametrize("names", [old_names, dict], ids=["old", "new"])
def test_a_vae_keeps_the_names_of_its_file(model, tmp_path, names, changed):
    """diffusers 0.16 opens a folder only if they are the old ones."""
    folder, file = shutil.copytree(model, tmp_path / "m"), "vae/diffusion_pytorch_model.safetensors"
    before = names(load_file(folder / file))
    assert any(".query." in name for name in before) == (names is old_names)
    save_file(before, folder / file)
    StableDiffusion.load(folder).save(tmp_path / "out", changed)
    after = load_file(tmp_path / "out" / file)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_a_vae_from_a_single_file_gets_the_old_names(sd_file, sd_parts, tmp_path):
    diffusers.save(tmp_path / "m", single_file.load(sd_file))
    expected = old_names(sd_parts.vae.state_dict())
    assert load_file(tmp_path / "m/vae/diffusion_pytorch_model.safetensors").keys() == expected.keys()
    assert_equal(sd_parts, diffusers.load(tmp_path / "m"))


def test_the_litter_of_training_is_ignored(sd_parts, sd_file, tmp_path):
    litter = {
        "betas": torch.zeros(3), "sqrt_alphas_cumprod": torch.zeros(3), "logvar": torch.zeros(3),
        "posterior_variance": torch.zeros(3), "model_ema.decay": torch.zeros(()),
        "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None].half(),
    }  # fmt: skip
    path = rewrite(sd_file, tmp_path / "a.safetensors", lambda t: t | litter)
    assert_equal(sd_parts, single_file.load(path))
    flat = rewrite(
        sd_file, tmp_path / "b.safetensors",
        lambda t: {k: v[:, :, 0, 0] if "attn_1" in k and v.ndim == 4 else v for k, v in t.items()},
    )  # fmt: skip
    assert_equal(sd_parts, single_file.load(flat))
    bare = rewrite(
        sd_file, tmp_path / "c.safetensors", lambda t: {k.replace("text_model.", ""): v for k, v in t.items()}
    )
    assert_equal(sd_parts, single_file.load(bare))


def test_ema_weights_on_request(sd_parts, sd_file, tmp_path):
    def add(tensors):
        prefix = "model.diffusion_model."
        plain = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        return tensors | {"model_ema." + k[len("model.") :].replace(".", ""): v + 1 for k, v in plain.items()}

    path = rewrite(sd_file, tmp_path / "ema.safetensors", add)
    assert "model_ema.diffusion_modeltime_embed0weight" in files.read(path)
    assert_equal(sd_parts, single_file.load(path))
    averaged = single_file.load(path, ema=True).unet.state_dict()
    assert all(torch.equal(averaged[k], v + 1) for k, v in sd_parts.unet.state_dict().items())
    only = rewrite(
        path,
        tmp_path / "only.safetensors",
        lambda t: {k: v for k, v in t.items() if k[:16] != "model.diffusion_"},
    )
    assert torch.equal(single_file.load(only, ema=True).unet.conv_in.bias, averaged["conv_in.bias"])
    with pytest.raises(ValueError, match="model.safetensors holds no EMA"):
        single_file.load(sd_file, ema=True)
    with pytest.raises(ValueError, match="only.safetensors holds no unet"):
        single_file.load(only)


def test_marks_of_v_prediction(sd_file):
    described = single_file._described
    zero = torch.zeros(())
    assert described({}, {}, sd_file)[1] == parts.SD1_SCHEDULER
    assert described({}, {"v_pred": zero}, sd_file)[1]["prediction_type"] == "v_prediction"
    assert described({"modelspec.prediction_type": "v"}, {}, sd_file)[1]["prediction_type"] == "v_prediction"
    assert described({}, {"ztsnr": zero}, sd_file)[1]["rescale_betas_zero_snr"] is True


def test_channels_of_a_standard_file_are_counted():
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, name in parts.PIPELINES.items():
        found = {first: torch.zeros(320, channels, 3, 3)}
        config, _, pipeline = single_file._described({}, found, Path("x.ckpt"))
        assert config["unet"] == replace(unet.SD15, in_channels=channels) and pipeline == name
    with pytest.raises(ValueError, match="x.ckpt: its UNet takes 5 channels"):
        single_file._described({}, {first: torch.zeros(320, 5, 3, 3)}, Path("x.ckpt"))


def test_shards(sd_parts, sd_folder, tmp_path):
    path = shutil.copytree(sd_folder, tmp_path / "m")
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    tensors = sd_parts.unet.state_dict()
    names = list(tensors)
    where = {}
    for i, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, path / "unet" / shard)
        where |= dict.fromkeys(half, shard)
    index = path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_equal(sd_parts, diffusers.load(path))
    index.write_text(json.dumps({"weight_map": where | {"conv_in.bias": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"index.json lists files that are not there: \.\./\.\./secret"):
        diffusers.load(path)


def test_variants(sd_parts, tmp_path):
    half = {p: {k: v.half() for k, v in n.state_dict().items()} for p, n in sd_parts.networks.items()}
    diffusers.save(tmp_path / "m", sd_parts)
    path = tmp_path / "m"
    save_file(half["unet"], path / "unet/diffusion_pytorch_model.fp16.safetensors")
    torch.save(half["vae"], path / "vae/diffusion_pytorch_model.fp16.bin")
    torch.save(sd_parts.unet.state_dict(), path / "unet/diffusion_pytorch_model.non_ema.bin")
    assert diffusers.load(path).unet.conv_in.bias.dtype == torch.float32
    loaded = diffusers.load(path, variant="fp16")
    assert loaded.unet.conv_in.bias.dtype == torch.float16
    assert torch.equal(loaded.vae.quant_conv.bias, half["vae"]["quant_conv.bias"])
    assert loaded.text_encoder.text_model["final_layer_norm"].bias.dtype == torch.float32
    with pytest.raises(ValueError, match=r"m has no variant 'bf16'; there are fp16, non_ema, plain weights"):
        diffusers.load(path, variant="bf16")
    (path / "vae/diffusion_pytorch_model.safetensors").unlink()  # the only other one is taken
    assert diffusers.load(path).vae.quant_conv.bias.dtype == torch.float16
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet has no plain weights; there are fp16, non_ema"):
        diffusers.load(path)


@pytest.fixture(scope="module")
def oracle_pipeline():
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    written = {
        part: config_json.to_json(part, config) for part, config in zip(PARTS, (UNET, VAE, TEXT), strict=True)
    }
    own = {part: {k: v for k, v in c.items() if k[0] != "_"} for part, c in written.items()}
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**own["unet"]),
        vae=AutoencoderKL(**own["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**own["text_encoder"])),
        tokenizer=CLIPTokenizer.from_pretrained(parts.TOKENIZER),
        scheduler=PNDMScheduler.from_config(parts.SD1_SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def assert_same_as_oracle(loaded: PipelineParts, pipeline) -> None:
    for part in PARTS:
        theirs = diffusers.native(part, getattr(pipeline, part).state_dict())
        ours = loaded.networks[part].state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
            assert ours[name].dtype == tensor.dtype


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bin"])
def test_a_folder_that_the_oracle_wrote(oracle_pipeline, tmp_path, kind):
    if kind == "fp16":
        oracle_pipeline.to(dtype=torch.float16)
    oracle_pipeline.save_pretrained(
        tmp_path / "m", safe_serialization=kind != "bin", variant="fp16" if kind == "fp16" else None
    )
    names = [p.name for p in (tmp_path / "m/unet").iterdir()]
    assert {"fp16": ".fp16.safetensors", "fp32": "model.safetensors", "bin": ".bin"}[kind] in "".join(names)
    loaded = diffusers.load(tmp_path / "m")
    assert [network.config for network in loaded.networks.values()] == [UNET, VAE, TEXT]
    assert_same_as_oracle(loaded, oracle_pipeline)
    assert loaded.scheduler.items() >= parts.SD1_SCHEDULER.items()
    single_file.save(tmp_path / "m.safetensors", loaded)  # so its tokenizer is recognised as CLIP's
    assert_same_as_oracle(single_file.load(tmp_path / "m.safetensors"), oracle_pipeline)
    if kind == "fp16":
        oracle_pipeline.to(dtype=torch.float32)


@pytest.mark.parity
@pytest.mark.parametrize("channels", [4, 9])
def test_a_folder_that_we_wrote_opens_in_the_oracle(tmp_path, channels):
    from diffusers import StableDiffusionPipeline

    ours = tiny(replace(UNET, in_channels=channels))
    diffusers.save(tmp_path / "m", ours)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    assert pipeline.text_encoder.config.vocab_size == 49408
    assert pipeline.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert_same_as_oracle(ours, pipeline)


@pytest.mark.parity
@full_size
def test_a_full_size_single_file_opens_in_the_oracle(tmp_path):
    from diffusers.loaders import single_file_utils as oracle

    config = {"unet": unet.SD15, "vae": vae.SD15, "text_encoder": text.SD15}
    networks = {part: parts.build(part, c, "") for part, c in config.items()}
    tensors = {
        part: {
            n: torch.full(t.shape, i / 1000).half() for i, (n, t) in enumerate(module.state_dict().items())
        }
        for part, module in networks.items()
    }
    full = PipelineParts(
        **{part: parts.fill(module, tensors[part], "") for part, module in networks.items()},
        scheduler=dict(parts.SD1_SCHEDULER), tokenizer=parts.TOKENIZER, pipeline_class="X",
    )  # fmt: skip
    single_file.save(tmp_path / "full.safetensors", full)
    content = load_file(tmp_path / "full.safetensors")
    converted = oracle.convert_ldm_vae_checkpoint(content, config=config_json.to_json("vae", vae.SD15))
    assert all(torch.equal(converted[k], v) for k, v in tensors["vae"].items())
    converted = oracle.convert_ldm_unet_checkpoint(content, config=config_json.to_json("unet", unet.SD15))
    assert all(torch.equal(converted[k], v) for k, v in tensors["unet"].items())
    assert oracle.infer_diffusers_model_type(load_file(tmp_path / "full.safetensors")) == "v1"


# --- Tokenizer ----------------------------------------------------------------------------------------------


def test_vocabulary():
    vocabulary = json.loads((parts.TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    merges = (parts.TOKENIZER / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(vocabulary) == 49408 and sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 1 + 48894 and merges[0].startswith("#version")
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["cat</w>"] == 2368


@pytest.mark.parametrize(
    "prompt, ids",
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("A  Photo\nof a CAT", [320, 1125, 539, 320, 2368]),
    ],
)
def test_golden_ids(prompt, ids):
    tokens = Tokenizer(parts.TOKENIZER, 77)([prompt])[0].tolist()
    assert tokens[: len(ids) + 2] == [49406, *ids, 49407] and set(tokens[len(ids) + 2 :]) == {49407}


@pytest.mark.parity
@pytest.mark.parametrize("folder", [parts.TOKENIZER, TINY / "tokenizer"])
def test_ids_equal_transformers(folder):
    """Of random texts: pieces of words, letters of many scripts, emoji, marks, blanks."""
    from transformers import CLIPTokenizer

    draw = random.Random(0)
    theirs, ours = CLIPTokenizer.from_pretrained(str(folder)), Tokenizer(folder, 77)
    assert theirs.get_vocab() == ours.bpe.get_vocab()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.start, ours.end)
    pieces = [word.replace("</w>", " ") for word in ours.bpe.get_vocab()]
    scripts = [*range(1, 0x600), *range(0x1F300, 0x1F700), *range(0x4E00, 0x4E80), 0xAC00, 0x1100, 0x200D]
    marks = ["'s", "'LL", "n't", " ", "  \n", START, END, END.upper(), "é", "İ", "ΑΣ", "<cat>"]
    for _ in range(2000):
        words = [
            draw.choice(pieces),
            chr(draw.choice(scripts)),
            chr(draw.choice(scripts)),
            draw.choice(marks),
        ]
        prompt = "".join(draw.choices(words, k=draw.randrange(9)))
        assert ours.encode(prompt) == theirs.encode(prompt, add_special_tokens=False), repr(prompt)


def test_a_changed_tokenizer_is_read_as_transformers_reads_it(tmp_path):
    """As the scripts leave it: a token more, whose id follows the vocabulary's."""
    tokens = Tokenizer(parts.TOKENIZER, 77)
    ids = tokens.add_placeholder("<cat>", 2)
    again = Tokenizer(tokens.save(tmp_path), 77)
    assert again.vocab_size == 49410 and again.encode("a <cat> <cat>_1 cat") == [320, *ids, 2368]


@pytest.mark.parametrize("name, content", [("vocab.json", '{"a": '), ("merges.txt", "a b\nno")])
def test_a_broken_tokenizer_is_named(tmp_path, name, content):
    folder = shutil.copytree(parts.TOKENIZER, tmp_path / "tokenizer")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{folder} has no readable tokenizer"):
        Tokenizer(folder, 77)


def test_a_folder_without_a_tokenizer(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{folder} has no tokenizer"):
            Tokenizer(folder, 77)
