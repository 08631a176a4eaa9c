"""Training LoRA: what it computes, what it begins with, what it leaves."""

from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minisd import cli, files
from minisd.sampling.stable_diffusion import StableDiffusion
from tests import method_helpers
from tests.method_helpers import built, theirs_of
from tests.method_helpers import train as run


@pytest.fixture
def options(short_run):
    flags = ["--learning_rate", "1e-2", "--center_crop", "--instance_prompt", "a photo of sks cat"]
    return partial(short_run, "lora", *flags)


@pytest.fixture
def classes(cat, tmp_path):
    """Two pictures of the class."""
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(2):
        Image.open(cat / f"{i}.png").rotate(90).save(folder / f"{i}.png")
    return folder


def prior(folder, *more):
    flags = ["--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", "a cat"]
    return [*flags, "--num_class_images", 2, *more]


@pytest.mark.parity
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_loss_is_the_field_s(model, options, classes, prediction_type, gamma, with_prior):
    """The same batch through diffusers' models with PEFT's LoRA in both, by the script's formula."""
    from peft import LoraConfig

    flags = ["--train_text_encoder", "--rank", 3, "--alpha", 6]
    flags += prior(classes, "--prior_loss_weight", 0.7) if with_prior else []
    torch.manual_seed(0)
    m, trained, batch = built("lora", options(*flags, snr_gamma=gamma))
    m.sd.schedule.prediction_type = prediction_type
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_B" in name:
                p.normal_(std=0.05)  # large ones make softmax so steep that rounding is all one compares
    loss = m.loss(batch)
    loss.backward()

    pipe = method_helpers.pipeline(model)
    common = {"r": 3, "lora_alpha": 6, "init_lora_weights": "gaussian"}
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **common))
    pipe.text_encoder.add_adapter(
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **common)
    )
    theirs = {}
    for part, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for name, p in module.named_parameters():
            if "lora_" in name:
                name = name.removeprefix("text_model.").replace(".default.weight", "")
                theirs[f"{part}.{'text_model.' if part == 'text_encoder' else ''}{name}"] = p
    assert theirs.keys() == trained.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(trained[name])
    theirs_batch = theirs_of(pipe, m, batch)
    pred = pipe.unet(theirs_batch.noisy, theirs_batch.timesteps, theirs_batch.context).sample
    errors = theirs_batch.mse(pred, gamma)
    if with_prior:  # instances first, then their class
        assert set(batch["prompt"][4:]) == {"a cat"} and set(batch["prompt"][:4]) == {"a photo of sks cat"}
        instance, other = errors.chunk(2)
        expected = instance.mean() + 0.7 * other.mean()
    else:
        expected = errors.mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for part in ("unet.", "text_encoder."):
        names = [n for n in theirs if n.startswith(part)]
        a, b = (torch.cat([t[n].grad.flatten() for n in names]) for t in (trained, theirs))
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_what_trains(options):
    _, trained, _ = built("lora", options())
    assert len(trained) == 2 * 56 and all(n.startswith("unet.") for n in trained)
    _, trained, _ = built("lora", options("--train_text_encoder", "--target", "attention", "feed_forward"))
    assert len(trained) == 2 * (56 + 14 + 12)


def test_the_text_encoder_learns_too(model, options):
    o = options("--train_text_encoder")
    assert run("lora", o) == 0
    tensors = load_file(o.output_dir / "pytorch_lora_weights.safetensors")
    text = [k for k in tensors if k.startswith("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")]
    assert len(text) == 2 and all(v.dtype == torch.float32 and v.any() for v in tensors.values())
    sd = StableDiffusion.load(model)
    before = sd.encode_text(["a cat"])
    attached = "LoRA of rank 4 on 56 modules of the UNet and 8 modules of the text encoder"
    assert sd.attach(o.output_dir) == [attached]
    assert not torch.equal(sd.encode_text(["a cat"]), before)


@pytest.mark.parametrize(
    "flag", [["--train_text_encoder"], ["--target_modules", "resnet"], ["--init_lora", "x"]]
)
def test_the_form_of_diffusers_0_16_has_no_place_for_more(options, flag):
    old = ["--save_format", "diffusers-0.16"]
    with pytest.raises(SystemExit):
        options(*old, *flag)
    o = options(*old)
    assert run("lora", o) == 0
    tensors = load_file(o.output_dir / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 56 and all(t.any() for t in tensors.values())


def test_going_on_from_a_file(model, options, tmp_path):
    """Its layers, ranks and alphas; the text encoder's updates stay, unless they are to train too."""
    first = options("--train_text_encoder", "--rank", 2, "--alpha", 3, "--save_format", "kohya")
    assert run("lora", first) == 0
    file = first.output_dir / "pytorch_lora_weights.safetensors"
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in load_file(file)
    about = files.read_with_metadata(file)[1]
    assert (about["ss_network_dim"], about["ss_output_name"], about["ss_seed"]) == ("2", "out", "0")
    o = options("--init_lora", file, output_dir=tmp_path / "second", max_train_steps=1)
    m, trained, _ = built("lora", o)
    assert len(trained) == 2 * 56 and len(m.updates) == 64
    old = StableDiffusion.load(model)
    old.attach(file)
    assert torch.equal(m.sd.encode_text(["sks"]), old.encode_text(["sks"]))
    assert run("lora", o) == 0
    before, after = load_file(file), load_file(o.output_dir / "pytorch_lora_weights.safetensors")
    text = [k for k in after if k.startswith("text_encoder.")]
    assert len(text) == 16 and {u.alpha for u in m.updates.values()} == {3.0}
    old_name = "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight"
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight"
    assert torch.equal(after[name], before[old_name])
    assert len(built("lora", options("--init_lora", file, "--train_text_encoder"))[1]) == 2 * 64


def test_class_pictures_are_drawn_once(options, tmp_path):
    folder = tmp_path / "drawn"
    o = options(*prior(folder, "--num_class_images", 3))
    assert run("lora", o) == 0
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"0000{i}-seed-{i}.png" for i in range(3)]
    with Image.open(folder / names[1]) as image:
        assert image.size == (32, 32) and image.text["parameters"].startswith("a cat\nSteps: 50")
    stamps = [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]
    (folder / names[2]).unlink()
    built("lora", o)
    assert [p.stat().st_mtime_ns for p in sorted(folder.iterdir())][:2] == stamps[:2]
    assert sorted(p.name for p in folder.iterdir()) == names


def test_a_prompt_is_encoded_once_and_by_itself(options, monkeypatch):
    m, _, batch = built("lora", options())
    asked = []
    encode = m.sd.encode_text
    monkeypatch.setattr(m.sd, "encode_text", lambda prompts: asked.append(prompts) or encode(prompts))
    for _ in range(2):
        assert m.condition(m.inputs(batch))["context"].shape == (4, 77, 32)
    assert asked == [["a photo of sks cat"]]
    m.frozen_context([str(i) for i in range(1001)])
    assert len(m.contexts) == 1000 and "1000" in m.contexts


def test_defaults_follow_the_kind(cat):
    argv = ["--method", "lora", "--model", "m", "--data", str(cat)]
    captioned = cli.parse_train(argv)[1]
    dreambooth = cli.parse_train([*argv, "--instance_prompt", "x"])[1]
    for o, expected in (
        (captioned, (1e-4, 16, 100, 1, "sd-model-finetuned-lora")),
        (dreambooth, (5e-4, 4, 1, 50, "lora-dreambooth-model")),
    ):
        assert (o.learning_rate, o.train_batch_size, o.num_train_epochs, o.validation_epochs) == expected[:4]
        assert str(o.output_dir) == expected[4]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target", "attn3"], "--target_modules 'attn3' means no layer"),
        (
            ["--target_modules", "conv_in", "--train_text_encoder"],
            "--train_text_encoder: --target_modules conv_in",
        ),
        (["--init_lora", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_mistakes(options, flags, message):
    with pytest.raises(ValueError, match=message):
        run("lora", options(*flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rank", "0"], "--rank"),
        (["--rank", "2", "--init_lora", "x"], "--rank is set by --init_lora"),
        (["--lora_dropout", "1"], "--lora_dropout"),
        (["--tokenizer_max_length", "77"], "--tokenizer_max_length is refused: SD v1.x"),
        (["--with_prior_preservation"], "--class_data_dir|--instance_prompt"),
        (["--pre_compute_text_embeddings", "--train_text_encoder"], "exclude each other"),
    ],
)
def test_wrong_flags(cat, capsys, flags, message):
    import re

    with pytest.raises(SystemExit):
        cli.parse_train(["--method", "lora", "--model", "m", "--data", str(cat), *flags])
    assert re.search(message, capsys.readouterr().err)
