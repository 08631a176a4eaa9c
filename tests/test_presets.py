"""--preset: every set of flags fits its method, counts less than what is given, and is on record."""

import json

import pytest

from minisd import cli, reading, registry
from minisd.options import default_of
from minisd.training import report
from tests import method_helpers
from tests.test_config import OWN

TABLE = reading.read_toml(registry.HERE / "presets.toml")
TINY = TABLE.pop("tiny")
NEEDED = {"class_data_dir": "c", "class_prompt": "a cat", "data": "d"}


def parse(method: str, *flags):
    flags = [*flags, *OWN[method]] if method in ("custom_diffusion", "erase", "reward", "sliders") else flags
    return cli.parse_train(["--method", method, *map(str, flags)])[1]


@pytest.mark.parametrize("method, preset", [(m, p) for m in TABLE for p in TABLE[m]])
def test_what_the_table_says_is_what_trains(method, preset):
    known = cli.options_of(method).__dataclass_fields__
    needed = [part for name, v in NEEDED.items() if name in known for part in (f"--{name}", v)]
    needed += ["--instance_prompt", "a"] if method in ("lora", "dreambooth") and preset != "style" else []
    o = parse(method, "--model", "m", *needed, "--preset", preset)
    assert TABLE[method][preset].items() <= vars(o).items() and o.preset == preset
    assert o.max_train_steps >= o.FEWEST  # and so nothing is said of too few


@pytest.mark.parametrize("method", registry.names("methods"))
def test_quick_is_quicker(method):
    """Than the other presets, and on the small model than its own default."""
    updates = {name: flags["max_train_steps"] for name, flags in TABLE.get(method, {}).items()}
    assert not updates or updates.pop("quick") < min(updates.values(), default=1e9)
    known = cli.options_of(method).__dataclass_fields__
    if "model" in known:
        data = ["--data", "d"] if "data" in known else []
        data += ["--instance_prompt", "a"] if method == "dreambooth" else []
        usual, quick = parse(method, *data), parse(method, *data, "--preset", "quick")
        changed = {k for k, v in vars(usual).items() if v != vars(quick)[k]}
        assert changed == {"preset", "max_train_steps"} and quick.max_train_steps < usual.max_train_steps


def test_others_have_priority(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('data = "d"\nmodel = "m"\nrank = 8\nlearning_rate = 3e-4\npreset = "face"')
    o = parse("lora", "--config", file, "--learning_rate", 1, "--instance_prompt", "a")
    face = TABLE["lora"]["face"]
    assert (o.rank, o.learning_rate, o.alpha) == (8, 1, face["alpha"])
    assert parse("lora", "--config", file, "--preset", "object", "--instance_prompt", "a").alpha is None


@pytest.mark.parametrize(
    "method, flags, message",
    [
        (
            "lora",
            ["--preset", "faces", "--model", "m"],
            "--preset faces: lora has object, face, style, quick",
        ),
        ("lora", ["--preset", "face"], "--preset face: the small model has quick"),
        ("erase", ["--preset", "quick", "--model", "m"], "--preset quick: erase has no presets"),
        ("dreambooth", ["--preset", "face", "--model", "m"], "needs --class_data_dir"),
        ("lora", ["--preset", "quick", "--max_train_steps", 3], "no effect beside --max_train_steps 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(method, flags, message, command):
    own = {"erase": ["--erase", "a cat"]}.get(method, ["--data", "d", "--instance_prompt", "a"])
    status, _, err = command("train.py", "--method", method, *own, *flags)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_a_run_says_which(short_run, tmp_path):
    """And begins again from its folder with the same flags."""
    o = short_run("lora", "--instance_prompt", "x", "--preset", "face")
    method_helpers.train("lora", o)
    recorded = json.loads((o.output_dir / "options.json").read_text())
    assert recorded["preset"] == "face" and recorded["alpha"] == TABLE["lora"]["face"]["alpha"]
    assert "<th>preset</th><td>face</td>" in (o.output_dir / report.NAME).read_text()
    again = cli.parse_train(["--config", str(o.output_dir / "options.json")])[1]
    assert again == o


def test_a_method_from_a_file_has_those_of_its_base(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from minisd.methods import lora\n\nclass Options(lora.Options):\n    '''Mine'''\n")
    o = parse(str(file), "--model", "m", "--data", "d", "--instance_prompt", "a", "--preset", "face")
    assert o.rank == TABLE["lora"]["face"]["rank"] != default_of(type(o).__dataclass_fields__["rank"])
