"""Adapters of every format draw what diffusers draws with them, or with the weights that they amount to."""

import itertools
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from minisd import cli, files
from minisd.adapters import custom_diffusion, lora
from minisd.formats import lora_names, single_file
from minisd.models import layers
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.options import Sample
from minisd.sampling.stable_diffusion import StableDiffusion
from tests import test_lora
from tests.test_lora import PROJECTIONS, fresh, new, weights
from tests.test_sample import draw_theirs, psnr

pytestmark = pytest.mark.parity
PROMPT = "a photo of a cat"


@pytest.fixture(autouse=True)
def shared_tokenizer(model):
    """It keeps no words of the test before."""
    yield
    fresh(model).tokenizer.placeholders.clear()


def draw(sd, prompt=PROMPT):
    return next(pictures(sd, [prompt], [3], Settings(width=32, height=32, steps=2)))


@cache
def draw_plain(model):
    return draw(fresh(model))


def draw_with(pipe, prompt=PROMPT):
    return draw_theirs(pipe, [prompt], [3], 32, 32, num_inference_steps=2, guidance_scale=7.5)[0]


# --- A matrix of formats, scales and sums ----------------------------------------------------------------


def generation(name, model, folder):
    """By the published names of a generation of the diffusers format, PEFT's or kohya's."""
    targets = ["attn1.to_q", "attn2.to_k", "attn2.to_v", "to_out.0", *(PROJECTIONS if name != "g0" else ())]
    tensors = {}
    updates = new(model, targets, 4, 4.0)[1]
    for layer, update in updates.items():
        part, _, path = layer.partition(".")
        key = test_lora.unet_key if part == "unet" else test_lora.text_key
        tensors[key(name, path, "down")] = update.lora_A.detach().clone()
        tensors[key(name, path, "up")] = update.lora_B.detach().clone()
    save_file(tensors, folder / "x.safetensors")
    if name in ("g0", "g1"):  # which diffusers no longer reads
        return {f"{layer}.weight": update.delta() for layer, update in updates.items()}


def by_diffusers(name, model, folder):
    """By save_lora_weights, and from there by diffusers' own conversion to kohya's names."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_kohya

    other = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    test_lora.peft_adapters(other, rank=3, alpha=6)
    test_lora.save_peft(other, folder, metadata=True)
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


CONV, STRIDED = "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0."


def relative(name, model, folder):
    """What diffusers does not read: it gets the weights with the change in them, written out by itself."""
    generator, tensors, deltas = torch.Generator().manual_seed(1), {}, {}
    base = weights(fresh(model))
    paths = [CONV, STRIDED, "mid_block.resnets.0.conv1"]
    paths += (
        [] if name == "tucker" else [f"{ATTENTION}{p}" for p in ("attn1.to_q", "attn2.to_k", "attn2.to_v")]
    )
    for path in paths:
        t, delta = test_lora.relatives(name, base[f"unet.{path}.weight"], generator)
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{k}": v.contiguous() for k, v in t.items()}
        deltas[f"unet.{path}.weight"] = delta
    save_file(tensors, folder / "x.safetensors")
    return deltas


def custom(name, model, folder):
    """Custom Diffusion's matrices in diffusers' form and in its authors' two, one of them compressed."""
    generator, deltas, sd = torch.Generator().manual_seed(2), {}, fresh(model)
    projections = [n for n in lora.layers(sd.unet) if ".attn2." in n]
    ends = (".to_k", ".to_v") if name != "custom.safetensors" else (".to_k", ".to_v", ".to_q", ".to_out.0")
    for layer in projections:
        if layer.endswith(ends):
            shape = sd.unet.get_submodule(layer).weight.shape
            u, v = (torch.randn(s, generator=generator) for s in ((shape[0], 3), (3, shape[1])))
            deltas[f"{layer}.weight"] = 0.2 * u @ v
            if layer.endswith("to_out.0"):
                deltas[f"{layer}.bias"] = torch.randn(shape[0], generator=generator)
    changed = {k: sd.unet.state_dict()[k] + d for k, d in deltas.items()}
    word = torch.randn(32, generator=generator)
    if name.startswith("custom"):
        theirs = {f"{custom_diffusion.stem(k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v
                  for k, v in changed.items()}  # fmt: skip
        if name.endswith("safetensors"):
            save_file(theirs, folder / name)
        else:
            torch.save(
                theirs | {"mid_block.attentions.0.transformer_blocks.0.attn1.processor": {}}, folder / name
            )
    elif name == "delta.bin":
        torch.save({"unet": changed, "modifier_token": {"<new1>": word}}, folder / name)
    elif name == "compressed.bin":
        factors = {}
        for k, delta in deltas.items():
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            factors[k] = {"u": (u * s)[:, :3], "v": v[:3]}
        torch.save({"unet": factors, "modifier_token": {"<new1>": word}}, folder / name)
    else:
        table = single_file.table("unet", sd.unet.config, "x")
        theirs = {table[k]: v for k, v in changed.items()}
        torch.save({"state_dict": theirs | {"embed": word[None]}}, folder / "delta.bin")
    return {f"unet.{k}": delta for k, delta in deltas.items()}


MATRIX = {
    **dict.fromkeys(["g0", "g1", "g2", "g3", "g4", "peft", "te1"], generation),
    **dict.fromkeys(["save_lora_weights", "convert_to_kohya"], by_diffusers),
    "sd_scripts": sd_scripts,
    **dict.fromkeys(["locon", "tucker", "loha", "lokr", "lokr_full", "dora_out", "dora_in"], relative),
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


def test_dora_by_kohya_s_names(model, pipe, tmp_path):
    """diffusers leaves out the norms of such a file, but has PEFT's, which are the same numbers."""
    test_lora.peft_adapters(pipe, use_dora=True)
    test_lora.save_peft(pipe, tmp_path / "peft", metadata=True)
    sd = fresh(model)
    table = lora_names.table(lora.layers(lora.networks(sd)), sd.unet.config)
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
    tensors = {}
    for key, tensor in files.read(tmp_path / "peft" / "pytorch_lora_weights.safetensors").items():
        stem, kind = lora_names.split(key)
        stem = lora_names.kohya_stem(table[stem])
        tensors[f"{stem}.{names[kind]}"] = tensor[:, None] if kind == "magnitude" else tensor
        tensors[f"{stem}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    sd.attach(tmp_path / "x.safetensors")
    assert psnr(draw(sd), draw_with(pipe)) >= 50 and psnr(draw(sd), draw_plain(model)) < 45


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
        ({"unet.x.attn2.to_k.weight": ROWS, "modifier_token.x": ROWS + 1}, "1 of its 2 names .*unet.x.attn2"),
        (
            {f"unet.{ATTENTION}attn2.to_k.weight": torch.ones(64, 33)},
            "to_k is .64, 33., this model's is .64, 32.",
        ),
        ({f"unet.{ATTENTION}attn2.to_k.bias": torch.ones(64)}, "this model's is None"),
        ({f"unet.{ATTENTION}attn2.to_k.weight.u": torch.ones(64, 3)}, "weight.u .64, 3. is no change of"),
        ({"first_stage_model.x.weight": torch.ones(3, 3, 3)}, "is no adapter that is known here"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes(model, tmp_path, content, message):
    save_file(content, tmp_path / "x.safetensors")
    sd = fresh(model)
    with pytest.raises(ValueError, match=message):
        sd.attach(tmp_path / "x.safetensors")
    assert not sd.attached and not sd.tokenizer.placeholders


# --- Merged into a model of its own ----------------------------------------------------------------------


@pytest.fixture
def attached(model, tmp_path):
    """attached(dtype): a model with two LoRAs at their scales, and Custom Diffusion's matrices."""
    lora.save(tmp_path / "a.safetensors", new(model, ["attention", "resnet"], 2, 3.0, seed=9)[1], "kohya")
    lora.save(tmp_path / "b.safetensors", new(model, ["q_proj", "to_q"], 4, 2.0, seed=8)[1])
    (tmp_path / "c").mkdir()
    custom("custom.safetensors", model, tmp_path / "c")

    def make(dtype=torch.float32):
        sd = StableDiffusion.load(model, dtype=dtype)
        sd.attach(tmp_path / "a.safetensors", 0.7, text_scale=0.4)
        sd.attach(tmp_path / "b.safetensors", -0.5)
        sd.attach(tmp_path / "c", 0.5)
        return sd

    return make


def test_export(model, attached, tmp_path):
    """A folder and a single file draw the same in diffusers, and are the same again here."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd = attached()
    expected = draw(sd)
    sd.export(tmp_path / "out")
    sd.export(tmp_path / "out.safetensors")
    for path in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert psnr(draw(StableDiffusion.load(path)), expected) >= 60
        if path.is_dir():
            pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        else:
            kwargs = {"config": str(model), "local_files_only": True, "safety_checker": None}
            pipe = StableDiffusionPipeline.from_single_file(str(path), **kwargs)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        pipe.set_progress_bar_config(disable=True)
        assert psnr(draw_with(pipe), expected) >= 50 and psnr(expected, draw_plain(model)) < 45
    # Whatever precision it runs in: merged from what the files have, and rounded once.
    low = attached(torch.bfloat16)
    low.export(tmp_path / "low")
    low.export(tmp_path / "half", torch.float16)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        whole, same, half = (files.read(tmp_path / n / f"{part}.safetensors") for n in ("out", "low", "half"))
        for name, tensor in whole.items():
            assert tensor.dtype == same[name].dtype and torch.allclose(same[name], tensor, atol=1e-6)
            assert half[name].dtype == torch.float16
            assert torch.allclose(half[name].float(), tensor, atol=1e-6, rtol=1e-3)


def test_export_has_the_tokens(model, tmp_path):
    save_file({"<zw>": ROWS}, tmp_path / "word.safetensors")
    sd = fresh(model)
    sd.attach(tmp_path / "word.safetensors")
    sd.export(tmp_path / "out")
    prompt = "a photo of <zw> <zw>_1 here"
    assert draw(StableDiffusion.load(tmp_path / "out"), prompt) == draw(sd, "a photo of <zw> here")
    with pytest.raises(ValueError, match="word.safetensors: it is one of the adapters"):
        sd.export(tmp_path / "word.safetensors")
    with pytest.raises(
        ValueError, match="out.safetensors: a single file has no place for <zw>; a folder has"
    ):
        sd.export(tmp_path / "out.safetensors")


def test_where_an_export_may_go(model, tmp_path):
    sd = StableDiffusion.load(model)
    before = sorted((p, p.stat().st_mtime_ns) for p in model.rglob("*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for path, message in [
        (model, "it is the model itself"),
        (tmp_path / "mine", "it holds other things"),
        (tmp_path / "x.ckpt", "a model is a .safetensors file, or a folder"),
    ]:
        with pytest.raises(ValueError, match=f"cannot write {path}: {message}"):
            sd.export(path)
    assert sorted((p, p.stat().st_mtime_ns) for p in model.rglob("*")) == before
    for _ in range(2):  # over its own
        sd.export(tmp_path / "out")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"] and not (
        tmp_path / "x.ckpt"
    ).exists()


def test_the_command_exports(model, script, tmp_path):
    lora.save(tmp_path / "a.safetensors", new(model, ["attention"], 2, 3.0, seed=9)[1], "kohya")
    save_file({"<zw>": ROWS}, tmp_path / "word.safetensors")
    base = ["--model", model, "--device", "cpu", "--adapter", f"{tmp_path / 'a.safetensors'}:0.7"]
    sd, out = fresh(model), tmp_path / "out.safetensors"
    sd.attach(tmp_path / "a.safetensors", 0.7)
    status, stdout, stderr = script("sample.py", *base, "--export", out)
    assert status == 0 and stdout.splitlines()[-1] == str(out), stderr
    assert not (tmp_path / "samples").exists()
    assert psnr(draw(StableDiffusion.load(out)), draw(sd)) >= 60

    def run(*flags):
        return run.run(cli.parse_sample(list(map(str, [*base, *flags]))))

    draws = ["--prompt", "x", "--steps", 1, "--output", tmp_path / "x.png", "--dtype", "bf16"]
    assert run(*draws, "--export", tmp_path / "half") == [tmp_path / "half", tmp_path / "x.png"]
    half = files.read(tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="--num_images draws nothing without --prompt"):
        Sample(model=str(model), export=out, num_images=2)
    with pytest.raises(ValueError, match="cannot go with --csv"):
        Sample(model=str(model), export=out, csv=tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x.safetensors: a single file has no place for <zw>"):
        run("--adapter", tmp_path / "word.safetensors", "--export", tmp_path / "x.safetensors")
