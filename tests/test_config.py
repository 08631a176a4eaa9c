"""Flags from a file: TOML, or the options.json of a run, which begins anew with the same bytes."""

import json

import pytest

from minisd import cli, registry
from minisd.training import report, run_folder
from tests import method_helpers

OWN = {
    "dreambooth": ["--instance_prompt", "a sks cat"],
    "custom_diffusion": ["--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>"],
    "erase": ["--erase", "a cat", "5 dogs"],
    "sliders": ["--target_prompt", "a cat", "--positive_prompt", "a big cat", "--negative_prompt", ""],
    "reward": ["--reward", method_helpers.REWARD, "--prompt", "a cat"],
    "lora": ["--instance_prompt", "x", "--target", "attention", "resnet", "--no-cache_latents"],
    "text_to_image": ["--validation_prompts", "a cat", "-5 dogs", "--snr_gamma", "5e-1"],
}


@pytest.mark.parametrize("method", registry.names("methods"))
def test_the_options_of_every_method_come_back(method, tmp_path):
    kept = "data" if "data" in cli.options_of(method).__dataclass_fields__ else "ddim_steps"
    flags = ["--method", method, f"--{kept}", 7, "--learning_rate", 1.5e-7, *OWN.get(method, [])]
    flags += ["--output_dir", tmp_path / "a b"]
    _, o = cli.parse_train(list(map(str, flags)))
    file = tmp_path / "options.json"
    file.write_text(json.dumps(run_folder.RunFolder(method, o).recorded))
    name, again = cli.parse_train(["--config", str(file)])
    assert name == method and again == o
    changed = cli.parse_train(["--config", str(file), "--seed", "9", "--output_dir", "other"])[1]
    assert changed.seed == 9 and str(changed.output_dir) == "other" and vars(changed)[kept] == vars(o)[kept]


def test_a_run_begins_anew_from_its_folder(short_run, tmp_path, command):
    o = short_run("textual_inversion", "--initializer_token", "cat", "--checkpointing_steps", 1)
    method_helpers.train("textual_inversion", o)
    again = tmp_path / "again"
    flags = ["--config", o.output_dir / "options.json", "--device", "cpu"]
    status, _, err = command("train.py", *flags)
    assert (
        status == 2 and "--resume_from_checkpoint latest continues it" in err
    )  # nothing is replaced unasked
    status, _, err = command("train.py", *flags, "--output_dir", again)
    assert status == 0, err
    for name in ("learned_embeds.safetensors", "log.jsonl", "result.png", "run.json"):
        assert (again / name).read_bytes() == (o.output_dir / name).read_bytes(), name
    facts = json.loads((again / "run.json").read_text())
    assert facts.keys() >= {"torch", "device", "data", "images", "processes", "machine", "python"}
    # A resumed run's file begins a new one, too.
    command("train.py", *flags, "--output_dir", again, "--resume_from_checkpoint", "latest")
    assert json.loads((again / "options.json").read_text())["resume_from_checkpoint"] == "latest"
    third = cli.parse_train(["--config", str(again / "options.json")])[1]
    assert third.resume_from_checkpoint is None


TOML = """method = "lora"
data = "~/d"
learning_rate = 3e-4
target = ["attention", "resnet"]
train_text_encoder = true
"""


def test_toml_under_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    name, o = cli.parse_train(["--model", "m", "--config", "~/run.toml"])
    assert (name, o.data, o.learning_rate, o.train_text_encoder) == ("lora", tmp_path / "d", 3e-4, True)
    assert o.target_modules == ["attention", "resnet"]
    flags = ["--target_modules", "attn2.to_k", "--no-train_text_encoder", "--learning_rate", "1"]
    o = cli.parse_train(["--model", "m", "--config", str(file), *flags])[1]
    assert (o.target_modules, o.train_text_encoder, o.learning_rate) == (["attn2.to_k"], False, 1)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("c.toml", TOML + "lerning_rate = 1", "unknown flag --lerning_rate; did you mean --learning_rate?"),
        ("c.toml", TOML + "network_dim = 8", "unknown flag --network_dim; did you mean --rank?"),
        ("c.toml", TOML + "prior = []", "unknown flag --prior"),
        ("c.toml", TOML + 'rank = "many"', "argument --rank: invalid int value: 'many'"),
        ("c.toml", TOML + "train_text_encoder_ = 1", "unknown flag --train_text_encoder_"),
        ("c.toml", TOML + "[train]\nrank = 4", "train is no value of a flag"),
        ("c.toml", TOML.replace("true", '"maybe"'), "--train_text_encoder is yes or no, not 'maybe'"),
        ("c.toml", TOML + 'config = "other.toml"', "config is no value of a flag"),
        ("c.toml", "a = ", "bad TOML"),
        ("c.json", "[1]", "holds a list, not a JSON object"),
        ("c.json", "{", "bad JSON"),
        ("none.json", None, "does not exist"),
        ("c.json", '{"method": "painting"}', "unknown method 'painting'"),
        ("c.json", '{"rank": 4}', "--method is required"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(name, text, message, tmp_path, command):
    if text is not None:
        (tmp_path / name).write_text(text)
    status, out, err = command("train.py", "--model", "m", "--config", tmp_path / name)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and not out
    assert str(tmp_path / name) in err or "method" in message


def test_help_shows_it(command):
    out = command("train.py", "--method", "lora", "--help")[1]
    assert "--config PATH" in out


def test_the_page_says_which_flags_were_given(short_run):
    o = short_run("lora", "--instance_prompt", "a <b> & c", "--rank", 3)
    method_helpers.train("lora", o)
    text = (o.output_dir / report.NAME).read_text()
    assert "<th>rank</th><td>3</td>" in text and "a &lt;b&gt; &amp; c" in text and "adam_beta1" not in text


def test_drawing_from_a_file(tmp_path, capsys):
    """Under the command line, over --like, and with its prompts as they are written."""
    file = tmp_path / "drawing.toml"
    file.write_text(
        'model = "m"\nprompt = ["a", "red", "apple"]\nsteps = 7\nadapter = ["~/x:0.5"]\nkarras = false\n'
    )
    (job,) = cli.parse_sample(["--config", str(file)])
    o = job.options
    assert (o.model, o.prompt, o.steps, o.use_karras_sigmas) == ("m", ["a", "red", "apple"], 7, False)
    (job,) = cli.parse_sample(["--config", str(file), "--steps", "8", "--prompt", "a dog"])
    assert job.options.steps == 8 and job.options.prompt == ["a dog"]
    with pytest.raises(SystemExit):
        cli.parse_sample(["--config", str(file), "--stepz", "8"])
    assert "unknown flag --stepz" in capsys.readouterr().err
    file.write_text("model = 'm'\nstepz = 1")
    with pytest.raises(SystemExit):
        cli.parse_sample(["--config", str(file), "--prompt", "x"])
    assert f"--config {file}: unknown flag --stepz; did you mean --steps?" in capsys.readouterr().err
