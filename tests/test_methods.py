"""Every method of the folder: what it computes, what it changes, what it leaves, and how it goes on."""

import json
import os
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minisd import cli, registry, testing
from minisd.data.order import collate
from minisd.methods._drawn import DrawnLatents
from minisd.options import Dataset, Diffusion, Optimizer
from minisd.training import loop
from minisd.training.distributed import Processes
from minisd.training.loop import held_out_loss
from minisd.training.run_folder import RunFolder
from minisd.training.step import Trainer
from tests import method_helpers
from tests.helpers import mostly_slow
from tests.method_helpers import built, new, theirs_of
from tests.method_helpers import train as run

METHODS = registry.names("methods")
# Beside the flags of all.
NEEDS = {
    "lora": ["--instance_prompt", "a photo of sks cat", "--center_crop"],
    "dreambooth": ["--instance_prompt", "a photo of sks cat", "--train_text_encoder", "--use_ema"],
    "text_to_image": ["--center_crop", "--random_flip", "--use_ema", "--noise_offset", "0.1"]
    + ["--train_text_encoder"],
    "autoencoder": ["--center_crop", "--random_flip", "--rescale_latents"],
    "custom_diffusion": ["--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>"]
    + ["--initializer_token", "dog", "--hflip"],
    "dpo": ["--center_crop", "--random_flip"],
    "erase": ["--erase", "a cat", "--ddim_steps", "5"],
    "reward": ["--reward", method_helpers.REWARD, "--prompt", "a cat", "a dog", "--ddim_steps", "5"]
    + ["--images_per_prompt", "2", "--learned_steps", "2", "--clip_range", "0.5"],
    "sliders": ["--target_prompt", "a cat", "--positive_prompt", "a big cat"]
    + ["--negative_prompt", "a small cat", "--ddim_steps", "5"],
    "controlnet": ["--proportion_empty_prompts", "0.5"],
    "instruct_pix2pix": ["--conditioning_dropout_prob", "0.2", "--random_flip", "--use_ema"],
    "unconditional": ["--use_ema", "--random_flip", "--eval_batch_size", "1"]
    + ["--ddpm_num_inference_steps", "2"],
}


@pytest.fixture
def options(short_run):
    """As short_run, with the flags that the method needs."""
    common = ["--max_train_steps", "4", "--learning_rate", "1e-2"]
    return lambda method, *flags, **changes: short_run(
        method, *common, *NEEDS.get(method, []), *flags, **changes
    )


def test_the_class_is_named_like_the_file():
    for name in METHODS:
        cls = registry.load_class("methods", name)
        assert cls.__module__ == f"minisd.methods.{name}" and cls.__name__ != "Method"


@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_is_declared_changes(method, options):
    # Behind two zero convolutions the gradient is zero twice.
    method_helpers.assert_exactly_these_train(*built(method, options(method)), steps=3)


RESUMED = [(method, {}) for method in METHODS]
RESUMED += [("text_to_image", {"cache_latents": False, "dataloader_num_workers": 2})]


@pytest.mark.parametrize("method, changes", RESUMED, ids=str)
def test_resumed_equals_uninterrupted(method, changes, options, tmp_path):
    """Stopped by a signal after update 3: files, log and images are those of a run that was not stopped."""
    common = {
        "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
        "dataloader_num_workers": 0,
    } | changes  # fmt: skip
    testing.assert_resumed_equals_uninterrupted(method, options(method, **common), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "parts" / "run" / "log.jsonl").open()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_does_not_change_what_is_drawn(method, options):
    """Twice two pictures accumulated are four pictures at once, to rounding."""
    m, trained, four = built(method, options(method))
    stream = method_helpers.Stream(m.data, m.options.seed)
    m.loss(four).backward()
    at_once = [p.grad.clone() for p in trained.values()]
    for p in trained.values():
        p.grad = None
    for start in (0, 2):
        (m.loss(collate([stream[k] for k in (start, start + 1)])) / 2).backward()
    floor = 1e-4 * max(g.abs().max() for g in at_once)  # some gradients are nothing but rounding
    for p, g in zip(trained.values(), at_once, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * max(g.abs().max(), floor)


def flags_of(group) -> list[str]:
    return [f.name for f in fields(group)]


NOISE = {"snr_gamma": 0.001, "noise_offset": 0.5, "input_perturbation": 0.5}


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_of_noise_and_loss_counts(method, options, capsys):
    """It changes the loss, or it is refused."""
    assert {*NOISE, "prediction_type", "rescale_betas_zero_snr"} == set(flags_of(Diffusion))
    kind = "sample" if method == "unconditional" else "v_prediction"
    if not issubclass(cli.options_of(method), Diffusion):
        for flag in flags_of(Diffusion):
            with pytest.raises(SystemExit):
                options(method, f"--{flag}", "1")
            assert f"--{flag} is not a flag of this method" in capsys.readouterr().err
        return
    losses = []

    def loss(m, trained, batch) -> float:
        """Away from the start, at which some losses do not depend on the flags yet."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        return m.loss(batch).item()

    for flags in ({}, {"prediction_type": kind}, {"prediction_type": kind, "rescale_betas_zero_snr": True}):
        m, trained, batch = built(method, options(method, **flags))
        losses.append(loss(m, trained, batch))
    for name, value in NOISE.items():
        m.options = replace(m.options, **dict.fromkeys(NOISE, 0.0) | {"snr_gamma": None, name: value})
        losses.append(m.loss(batch).item())
    assert len(set(losses)) == len(losses)


# Beside each flag's value, what else has to be given for it to count.
OPTIMIZER = {
    "optimizer": ("torch.optim.SGD", {}),
    "optimizer_args": (["momentum=0.9"], {"optimizer": "torch.optim.SGD"}),
    "learning_rate": (1e-3, {}),
    "scale_lr": (True, {}),
    "lr_scheduler": ("linear", {}),
    "lr_warmup_steps": (2, {"lr_scheduler": "constant_with_warmup"}),
    "lr_num_cycles": (2, {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (2.0, {"lr_scheduler": "polynomial"}),
    "train_batch_size": (1, {"scale_lr": True}),
    "gradient_accumulation_steps": (2, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_weight_decay": (0.5, {}),
    "adam_epsilon": (0.1, {}),
    "max_grad_norm": (1e-3, {"adam_epsilon": 0.1}),
}


def trained_value(o) -> float:
    """Of one parameter after three updates."""
    method = SimpleNamespace(options=o, device=torch.device("cpu"), dtype=torch.float32, lr_scale=1.0)
    method.sd, method.inputs = SimpleNamespace(parts={}), lambda batch: batch
    method.before_update = lambda step: None
    method.loss_of = lambda batch: ((parameter - batch["number"][0]) ** 2).mean()
    parameter = torch.nn.Parameter(torch.ones(3))
    trainer = Trainer(method, {"p": parameter}, 8, Processes())
    for _ in range(3):
        trainer.update(iter([{"number": [2 + trainer.step]}, {"number": [7]}]))
    return parameter[0].item()


@pytest.mark.parametrize("name", flags_of(Optimizer))
def test_every_flag_of_the_optimizer_counts(name, options):
    if name == "use_8bit_adam":
        return  # test_optim.py: what is in its state
    registry.admit("torch.optim.SGD")
    value, further = OPTIMIZER[name]
    o = options("textual_inversion", max_grad_norm=0.0, **{"lr_warmup_steps": 0} | further)
    assert trained_value(o) != trained_value(replace(o, **{name: value}))


def test_a_lost_state_is_not_guessed(options):
    method = "textual_inversion"
    done = options(method, checkpointing_steps=2)
    assert run(method, done) == 0
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        run(method, done)
    with pytest.raises(ValueError, match="--seed was"):
        run(method, replace(done, resume_from_checkpoint="latest", seed=1))
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        run(method, replace(done, resume_from_checkpoint="nowhere"))
    assert run(method, replace(done, overwrite_output_dir=True, max_train_steps=1)) == 0
    assert not list(done.output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize("method", mostly_slow(["textual_inversion", "autoencoder"], "textual_inversion"))
def test_checkpoints_rotate_and_a_full_disk_loses_nothing(method, options, monkeypatch):
    o = options(method, checkpointing_steps=1, checkpoints_total_limit=2)
    assert run(method, o) == 0
    assert sorted(p.name for p in o.output_dir.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]

    is_full, fsync = False, os.fsync

    def full(descriptor):
        nonlocal is_full
        is_full |= "checkpoint-2" in os.readlink(f"/proc/self/fd/{descriptor}")
        if is_full:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        run(method, replace(o, overwrite_output_dir=True))
    monkeypatch.undo()
    assert not list(o.output_dir.rglob("*.tmp"))
    assert sorted(p.name for p in o.output_dir.glob("checkpoint-*")) == ["checkpoint-1"]
    assert run(method, replace(o, resume_from_checkpoint="latest")) == 0


SPLITS = [m for m in METHODS if issubclass(cli.options_of(m), Dataset)]


@pytest.mark.parametrize("method", SPLITS)
def test_held_out_loss(method, options):
    """Of examples that are not trained on, and the same number twice."""
    m = new(method, options(method, validation_split=2.0))
    trained, (shown, held) = m.setup(), m.datasets()
    held_names, names = ({record.name for record in part.source.records} for part in (held, shown))
    assert len(held_names) == 2 and not held_names & names
    first = held_out_loss(m, held)
    assert held_out_loss(m, held) == first
    with torch.no_grad():
        torch._foreach_add_(list(trained.values()), 0.1)
    assert held_out_loss(m, held) != first


@pytest.mark.parametrize("method", mostly_slow(["text_to_image", "unconditional"], "unconditional"))
def test_the_held_out_loss_is_logged(method, options):
    """When due, and after a resume."""
    pictures = {"validation_steps": 2, "validation_epochs": None, "save_images_epochs": 1}
    o = options(method, validation_split=2.0, checkpointing_steps=3, train_batch_size=1, **pictures)
    assert run(method, o) == 0
    log = (o.output_dir / "log.jsonl").read_text()
    values = [json.loads(line) for line in log.splitlines()]
    assert [v["step"] for v in values if "validation_loss" in v] in ([2, 4], [3, 4])  # 3: an epoch's end
    assert run(method, replace(o, resume_from_checkpoint=str(o.output_dir / "checkpoint-3"))) == 0
    assert (o.output_dir / "log.jsonl").read_text() == log


def test_steps_count_where_epochs_are_the_default(cat):
    argv = ["--method", "lora", "--model", "m", "--data", str(cat)]
    o = cli.parse_train([*argv, "--validation_steps", "7"])[1]
    assert (o.validation_steps, o.validation_epochs) == (7, None)
    with pytest.raises(SystemExit):
        cli.parse_train([*argv, "--validation_steps", "7", "--validation_epochs", "1"])


def test_a_loss_that_is_not_a_number_stops(options):
    method = "textual_inversion"
    o = options(method, checkpointing_steps=1)
    m = new(method, o)
    inputs, loss_of, numbers = m.inputs, m.loss_of, []
    m.inputs = lambda batch: numbers.append(batch["number"][0]) or inputs(batch)
    m.loss_of = lambda tensors: loss_of(tensors) * (float("nan") if numbers[-1] >= 4 else 1)
    with pytest.raises(ValueError, match="loss of update 3 is nan"):
        loop.train(m, RunFolder(method, o))
    assert sorted(p.name for p in o.output_dir.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("method", mostly_slow(METHODS, "controlnet", "lora", "unconditional"))
def test_bf16_and_gradient_checkpointing(method, options):
    """The trained parameters stay in fp32, and the loss is that of fp32 to the precision of bf16; or it is
    refused."""
    if method_helpers.refuses(method, "gradient_checkpointing"):
        with pytest.raises(ValueError, match="--gradient_checkpointing is refused"):
            options(method, gradient_checkpointing=True)
        return
    m, trained, batch = built(method, options(method))
    expected = m.loss(batch)
    expected.backward()
    moved = [p.grad.abs().max() > 0 for p in trained.values()]
    m, trained, batch = built(method, options(method, mixed_precision="bf16", gradient_checkpointing=True))
    mine = {id(p) for p in trained.values()}
    frozen = [
        p for part in method_helpers.networks(m).values() for p in part.parameters() if id(p) not in mine
    ]
    assert not frozen or any(p.dtype == torch.bfloat16 for p in frozen)
    assert all(p.dtype == torch.float32 for p in trained.values())
    loss = m.loss(batch)
    loss.backward()
    near = 0.1 if isinstance(m, DrawnLatents) else 0.05  # it trains on what it draws, in bf16 too
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=near)
    assert all(p.grad.isfinite().all() for p in trained.values())
    assert any(moved) and moved == [p.grad.abs().max() > 0 for p in trained.values()]


# Textual inversion


@pytest.mark.parity
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("vectors", [1, 2])
def test_textual_inversion_loss_is_the_field_s(model, options, prediction_type, gamma, vectors):
    """The same pictures, prompts, noise and timesteps through diffusers' models, by the script's formula."""
    m, trained, batch = built(
        "textual_inversion", options("textual_inversion", snr_gamma=gamma, num_vectors=vectors)
    )
    m.sd.schedule.prediction_type = prediction_type
    loss = m.loss(batch)
    loss.backward()

    pipe = method_helpers.pipeline(model)
    tokens = ["<cat>", *(f"<cat>_{i}" for i in range(1, vectors))]
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    cat = pipe.tokenizer.encode("cat", add_special_tokens=False)
    with torch.no_grad():
        table[-vectors:] = table[cat]
    prompts = [p.replace("<cat>", " ".join(tokens)) for p in batch["prompt"]]
    theirs = theirs_of(pipe, m, batch, prompts)
    pred = pipe.unet(theirs.noisy, theirs.timesteps, theirs.context).sample
    expected = theirs.mse(pred, gamma).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    error = (trained["rows"].grad - table.grad[-vectors:]).abs().max() / table.grad[-vectors:].abs().max()
    assert error <= 1e-4


def test_textual_inversion_learns(options):
    """Fifty updates on one batch and one noise: even on a random model that very loss falls."""
    o = options("textual_inversion", flip_p=0.0, learning_rate=0.05)
    m, trained, batch = built("textual_inversion", o)
    m.timesteps = lambda batch: torch.full((len(batch["number"]),), 500)
    first, last = method_helpers.learn(m, trained, batch, steps=50, lr=0.05)
    assert last < 0.99 * first


GUIDE = """--learnable_property=object --placeholder_token=<cat-toy> --initializer_token=toy --resolution=32
--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=3 --learning_rate=5.0e-04 --scale_lr
--lr_scheduler=constant --lr_warmup_steps=0"""


def test_textual_inversion_by_the_guide_s_command(model, cat, command, tmp_path):
    """The published command, but for model, size and steps; then what it left is drawn."""
    out = tmp_path / "textual_inversion_cat"
    flags = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={cat}", *GUIDE.split()]
    status, stdout, stderr = command(
        "train.py", "--method", "textual_inversion", *flags, f"--output_dir={out}"
    )
    assert status == 0, stderr
    assert "5 pictures" in stdout and "3/3" in stderr
    log = [json.loads(line) for line in (out / "log.jsonl").open()]
    assert [line["step"] for line in log] == [1, 2, 3] and log[0]["lr"] == pytest.approx(5e-4 * 4)
    assert {k: tuple(v.shape) for k, v in load_file(out / "learned_embeds.safetensors").items()} == {
        "<cat-toy>": (1, 32)
    }
    assert Image.open(out / "result.png").size[0] > 256
    assert json.loads((out / "options.json").read_text())["placeholder_token"] == "<cat-toy>"
    status, stdout, stderr = command(
        "sample.py", "--model", model, "--adapter", out, "--prompt", "a photo of <cat-toy>", "--steps", 2,
        "--output", tmp_path / "drawn.png",
    )  # fmt: skip
    assert status == 0 and "<cat-toy> (1 vector)" in stderr


def test_textual_inversion_names_itself_after_the_folder(options):
    m, trained, batch = built("textual_inversion", options("textual_inversion", num_vectors=2))
    assert (m.token, m.word) == ("<cat>", "cat")
    assert all("<cat>" in p for p in batch["prompt"])
    row = m.sd.text_encoder.text_model.embeddings.token_embedding.weight[2368]
    assert torch.equal(trained["rows"], torch.stack([row, row]))


def test_textual_inversion_leaves_a_pipeline(options, tmp_path):
    from diffusers import StableDiffusionPipeline

    o = options(
        "textual_inversion", save_as_full_pipeline=True, num_vectors=2, max_train_steps=2, save_steps=1
    )
    assert run("textual_inversion", o) == 0
    names = ("learned_embeds", "learned_embeds-steps-1", "learned_embeds-steps-2")
    assert {f.stem for f in o.output_dir.glob("*.safetensors")} == set(names)
    pipe = StableDiffusionPipeline.from_pretrained(o.output_dir, safety_checker=None)
    ids = pipe.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
    table = pipe.text_encoder.get_input_embeddings().weight
    learned = load_file(o.output_dir / "learned_embeds.safetensors")["<cat>"]
    assert ids == [49408, 49409] and torch.equal(table[ids], learned)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"initializer_token": "hippopotamus toy"}, "--initializer_token: 'hippopotamus toy'"),
        ({"placeholder_token": "cat"}, "--placeholder_token: .*'cat' is a token already"),
        ({"placeholder_token": " "}, "--placeholder_token"),
        ({"tokenizer_name": "nowhere"}, "nowhere"),
        ({"variant": "fp8"}, "fp8"),
    ],
)
def test_textual_inversion_mistakes(options, changes, message):
    o = options("textual_inversion", **changes)
    with pytest.raises(ValueError, match=message):
        run("textual_inversion", o)
    assert not o.output_dir.exists()
