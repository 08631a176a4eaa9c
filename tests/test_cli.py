"""The command line: every flag of the field's script, and one clear line for every mistake."""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from minisd import cli, registry
from minisd.sampling.options import split_scale
from minisd.training import loop
from tests.conftest import ROOT

# Flags of the field's script for each method: those of old with their defaults, and those that came later.
# Its script for an autoencoder trains a discriminator along: ours has other flags.
FIELD = json.loads((Path(__file__).parent / "field_flags.json").read_text())
NEEDS = {
    "dreambooth": ["--instance_prompt", "x"],
    "custom_diffusion": ["--instance_prompt", "x"],
}
# Where our default is another, and why.
CHANGED = {
    "seed": "0 where the field draws one, so that the same command gives the same result",
    "lr_warmup_steps": "the field's 500 are not applied by its default curve, constant; ours says 0 there",
    "max_grad_norm": "",
    "local_rank": "",
    "train_data_dir": "our name is data",
    "output_dir": "DreamBooth's was textual inversion's",
}


@pytest.mark.parametrize("method", FIELD)
def test_every_flag_of_the_field(method):
    cls = cli.options_of(method)
    names = {name: f.name for name, f in cli.names_of(cls).items()}
    missing = (FIELD[method]["defaults"].keys() | FIELD[method]["newer"]) - names.keys()
    assert not missing
    flags = [*(["--model", "m"] if "model" in names else []), "--data", "d", *NEEDS.get(method, [])]
    _, options = cli.parse_train(["--method", method, *flags])
    for flag, default in FIELD[method]["defaults"].items():
        if default is not None and default != "required" and flag not in CHANGED:
            ours = getattr(options, names[flag])
            assert (str(ours) if isinstance(ours, Path) else ours) == default, flag


def test_every_flag_has_help_and_shows_its_default():
    for cls in [cli.Sample, *(cli.options_of(m) for m in registry.names("methods"))]:
        for action in cli.parser_of(cls, "x", "")._actions[1:]:
            assert action.help and ("default" in action.help or action.required), action.dest
        assert all(f.metadata.get("help") for f in fields(cls))


def test_the_names_of_a_flag_mean_the_same():
    for name in ("--use_karras_sigmas", "--karras"):
        for no, value in (("", True), ("no-", False)):
            (job,) = cli.parse_sample(["--model", "m", "--prompt", "x", f"--{no}{name[2:]}"])
            assert job.options.use_karras_sigmas is value


GUIDE = """--pretrained_model_name_or_path=runwayml/sd --train_data_dir=cat --learnable_property=object
--placeholder_token=<cat-toy> --initializer_token=toy --resolution=512 --train_batch_size=1
--gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
--lr_scheduler=constant --lr_warmup_steps=0 --output_dir=textual_inversion_cat"""


def test_the_guide_s_command_parses():
    name, options = cli.parse_train(["--method", "textual_inversion", *GUIDE.split()])
    assert name == "textual_inversion"
    assert (options.model, str(options.data)) == ("runwayml/sd", "cat")
    assert options.scale_lr and options.learning_rate == 5e-4 and options.max_train_steps == 3000


TI = ["--method", "textual_inversion", "--model", "m", "--data", "d"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--method is required"),
        (["--method", "textual_invertion"], "did you mean 'textual_inversion'?"),
        ([*TI, "--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        ([*TI, "--num_vectors", "two"], "--num_vectors: invalid int value: 'two'"),
        ([*TI, "--num_vectors", "0"], "--num_vectors must be positive"),
        (
            [*TI, "--gradient_accumulation_steps", "8000000"],
            "128,000,000 images in an update, by --train_batch_size",
        ),
        ([*TI, "--resolution", "500"], "--resolution must be a positive multiple of 8"),
        ([*TI, "--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        ([*TI, "--flip_p", "2"], "--flip_p must be from 0 to 1"),
        ([*TI, "--validation_scheduler", "eulr"], "did you mean 'euler'?"),
        ([*TI, "--report_to", "wandb", "--hub_token", "x"], "--hub_token"),
        (["--method", "textual_inversion"], "the following arguments are required"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse_train(argv)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text, path, scale",
    [("a/b.safetensors", "a/b.safetensors", 1), ("x:0.5", "x", 0.5), ("C:/x", "C:/x", 1), ("x:-1", "x", -1)],
)
def test_adapter_scale(text, path, scale):
    assert tuple(map(str, split_scale(text))) == (path, str(float(scale)))


@pytest.mark.parametrize("text", ["nan", "inf", "-1e39", "1e400"])
def test_numbers_are_those_of_fp32(text):
    with pytest.raises(ValueError):
        cli.finite(text)
    assert cli.finite("1e-50") == 1e-50


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_is_kept():
    """A large block that was freed is handed out again with its pages; a thread gets one too."""
    code = """
import resource, threading, torch
from minisd import cli
def faults(size, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cli.keep_memory()
pages = 2**26 // resource.getpagesize()
faults(2**26, 1)
print(faults(2**26, 20) < 5 * pages)
threading.Thread(target=lambda: print(torch.ones(2**26, dtype=torch.uint8).sum().item() == 2**26)).start()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stdout + done.stderr


@pytest.mark.parametrize("signals, code", [((), 2), ((signal.SIGINT,), 130), ((signal.SIGTERM,) * 2, 130)])
def test_an_interrupt_that_a_library_swaps_for_an_error(signals, code, capsys, in_foreground):
    """As safetensors and pickle do with a signal's exception; in training, the second one stops at once."""

    def main():
        try:
            with loop.stop_signals() if len(signals) == 2 else contextlib.nullcontext():
                for number in signals:
                    signal.raise_signal(number)
        except KeyboardInterrupt as e:
            raise ValueError("not readable") from e
        raise ValueError("not readable")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        cli.run("x.py", main)
    assert end.value.code == code and signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == ("x.py: interrupted" if signals else "x.py: error: not readable")


@pytest.mark.parametrize("name", ["lora_dropout", "learning_rate", "text_encoder_lr", "caption_dropout"])
def test_bounds_hold_in_python_too(name):
    """NaN is within none; and a method that redeclares a flag keeps its bounds."""
    options = cli.options_of("lora")
    flags = {"data": Path("x"), "train_text_encoder": True}
    assert getattr(options(**flags, **{name: 0.5}), name) == 0.5
    for wrong in (float("nan"), -0.5):
        with pytest.raises(ValueError, match=f"--{name} must be"):
            options(**flags, **{name: wrong})
