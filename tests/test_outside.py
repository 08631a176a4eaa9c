"""Methods and schedulers in files from outside: they work as the folders' do, and run only if named."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from minisd import cli, registry, testing
from minisd.data.images import open_image
from minisd.data.order import Stream, collate
from minisd.methods import lora
from minisd.methods._base import Method
from minisd.noise import NoiseSchedule
from minisd.options import TINY
from minisd.sampling import infotext
from minisd.sampling.options import Settings
from minisd.schedulers import euler
from minisd.schedulers._problem import Problem, read_settings
from tests.conftest import ROOT

RESEARCH = ROOT / "docs" / "research"
PART = str(RESEARCH / "part_of_unet.py")
DPM2 = str(RESEARCH / "dpm2.py")
RAN = "raise SystemExit('it ran')\n"  # which the error of whatever runs it has


@pytest.fixture
def evil(tmp_path) -> str:
    path = tmp_path / "evil.py"
    path.write_text(RAN)
    return str(path)


def refused(capsys, parse, argv) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        parse(list(map(str, argv)))
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1
    return err


def drawn_by(tmp_path, sampler: str, *more: str) -> Path:
    """An image whose parameters say that this sampler drew it."""
    about = PngImagePlugin.PngInfo()
    text = ", ".join(["Steps: 2", f"Sampler: {sampler}", "CFG scale: 3", "Seed: 1", "Model: tiny", *more])
    about.add_text("parameters", f"a cat\n{text}")
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png", pnginfo=about)
    return tmp_path / "drawn.png"


# --- What they do ------------------------------------------------------------------------------------------


def test_the_scheduler():
    """Of second order: nearer to Euler in very many steps than Euler in as many."""

    def last(scheduler, steps: int) -> torch.Tensor:
        schedule = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        problem = Problem(
            denoise=lambda x, t: x.tanh(),
            noise=torch.tensor([-1.0, -0.25, 0.5, 2.0]).view(1, 4, 1, 1),
            schedule=schedule,
            steps=steps,
            generators=[torch.Generator()],
            settings=read_settings(scheduler, {}),
        )
        return list(scheduler.sample(problem))[-1]

    registry.admit(DPM2)
    exact, dpm2 = last(euler, 1000), registry.load("schedulers", DPM2)
    assert (last(dpm2, 50) - exact).norm() < 0.5 * (last(euler, 50) - exact).norm()


def test_the_method(tmp_path):
    """Exactly the modules that it names train."""
    o = testing.options(PART, "--data", ROOT / "cat", "--train_modules", "attn2", output_dir=tmp_path / "out")
    assert o.model == str(TINY) and o.resolution == 64 and o.learning_rate == 1e-4
    method = testing.new(PART, o)
    trained = method.setup()
    assert trained and all(".attn2." in name for name in trained)
    method.loss(collate([Stream(method.datasets()[0], 0)[0]])).backward()
    assert all(p.grad is not None for p in trained.values())
    assert sum(p.requires_grad for part in method.sd.parts.values() for p in part.parameters()) == len(
        trained
    )
    method.save(tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.fixture
def small(model, monkeypatch) -> list:
    """Flags of a run that takes a few seconds."""
    monkeypatch.setattr(Method, "preview_steps", 2)
    return ["--data", ROOT / "cat", "--model", model, "--resolution", 32]


def test_the_check_of_a_method(small, tmp_path):
    testing.check_method(PART, tmp_path, *small, "--train_modules", "attn1", "attn2")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("return super().build(sd) and {}", "nothing trains"),
        (
            "return dict(list(super().build(sd).items())[1:])",
            "against the declaration: {'unet.conv_in.weight'}",
        ),
    ],
)
def test_the_check_finds_what_is_wrong(wrong, message, small, tmp_path):
    source = f"""from minisd import Method
from minisd.options import Captions, Training
class Options(Captions, Training):
    "Wrong"
class Wrong(Method):
    def build(self, sd):
        {wrong}
"""
    (tmp_path / "wrong.py").write_text(source)
    with pytest.raises(AssertionError, match=message):
        testing.check_method(str(tmp_path / "wrong.py"), tmp_path, *small)


def test_the_check_finds_hidden_state(small, tmp_path):
    """A draw that depends on how often it was called is not the same after a resume."""
    (tmp_path / "hidden.py").write_text("""import torch
from minisd import Method
from minisd.options import Captions, Training
class Options(Captions, Training):
    "Hidden"
class Hidden(Method):
    def build(self, sd):
        self.calls = 0
        return super().build(sd)
    def loss_of(self, batch):
        self.calls += 1
        return super().loss_of(batch) * self.calls
""")
    with pytest.raises(AssertionError, match="differ"):
        testing.check_method(str(tmp_path / "hidden.py"), tmp_path, *small)


def test_the_commands(command, tmp_path):
    """Help, a run, what is recorded, an image, and the image again."""
    status, out, _ = command("train.py", "--method", PART, "--help")
    assert status == 0 and "--train_modules" in out and "Part of the UNet" in out
    argv = ["--data", ROOT / "cat", "--max_train_steps", 1, "--output_dir", tmp_path / "out"]
    argv += ["--num_validation_images", 1, "--validation_scheduler", DPM2]
    status, _, err = command("train.py", "--method", PART, *argv)
    assert status == 0, err
    recorded = json.loads((tmp_path / "out" / "options.json").read_text())
    assert recorded["method"] == PART and recorded["code"] == {n: registry.digest(n) for n in (PART, DPM2)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--method part_of_unet.py" in card and str(ROOT) not in card
    drawing = ["--prompt", "3d emoji of a cat", "--steps", 3, "--output"]
    status, _, err = command("sample.py", "--scheduler", DPM2, *drawing, tmp_path / "a.png")
    assert status == 0, err
    text = infotext.read(tmp_path / "a.png")
    assert "Sampler: DPM2" in text and f"Sampler digest: {registry.digest(DPM2)[:12]}" in text
    again = ["sample.py", "--like", tmp_path / "a.png", "--output", tmp_path / "b.png"]
    status, _, err = command(*again)
    assert status == 2 and "drawn by a scheduler from a file, DPM2: name it by --scheduler" in err
    status, _, err = command(*again, "--scheduler", DPM2)
    assert status == 0 and "differ" not in err, err
    assert open_image(tmp_path / "a.png").tobytes() == open_image(tmp_path / "b.png").tobytes()
    other = tmp_path / "other.py"
    other.write_text(Path(DPM2).read_text() + "# changed\n")
    status, _, err = command(*again, "--scheduler", other, "--overwrite")
    assert status == 0 and "the image will differ, as it was drawn by another scheduler" in err


def test_a_method_from_a_method_has_its_defaults(tmp_path):
    """Those of the tiny model for the method whose options it takes, or else those of most methods."""
    for base, steps, rate in (("lora.Options", 300, 0.003), ("Captions, Training", 200, 1e-5)):
        path = tmp_path / f"{base.split('.')[0].split(',')[0].lower()}_like.py"
        path.write_text(f"""from minisd.methods import lora
from minisd.methods._base import Method
from minisd.options import Captions, Training
class Options({base}):
    "Mine"
""")
        argv = [
            "--method",
            str(path),
            "--data",
            str(ROOT / "cat"),
            *(["--instance_prompt", "x"] * ("lora" in base)),
        ]
        _, o = cli.parse_train(argv)
        assert (o.max_train_steps, o.learning_rate, o.resolution) == (steps, rate, 64)
    assert not isinstance(o, lora.Options)


def test_a_changed_file_does_not_go_on(tmp_path, capsys):
    path = tmp_path / "mine.py"
    source = Path(PART).read_text().replace("PartOfUNet", "Mine")
    path.write_text(source)
    flags = "--data", ROOT / "cat", "--checkpointing_steps", "1", "--num_validation_images", "1"
    o = testing.options(str(path), *flags, output_dir=tmp_path / "out", max_train_steps=1)
    assert testing.train(str(path), o) == 0
    path.write_text(source + "# another line\n")
    again = testing.options(
        str(path),
        *flags,
        "--resume_from_checkpoint",
        "latest",
        output_dir=tmp_path / "out",
        max_train_steps=2,
    )
    with pytest.raises(ValueError, match="the code was another"):
        testing.train(str(path), again)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = (", "line 1: SyntaxError"),
        ("import torch\n\nimport nowhere", "line 3: ModuleNotFoundError: No module named 'nowhere'"),
        ("def f():\n    return 1 / 0\n\nf()", "line 2: ZeroDivisionError"),
        ("import sys\nsys.exit()", "line 2: SystemExit"),
        ("x = 1", "is not one of the methods: it has no Options"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(source, message, tmp_path, capsys):
    path = tmp_path / "mine.py"
    if source:
        path.write_text(source)
    err = refused(capsys, cli.parse_train, ["--method", path, "--data", "x"])
    assert f"--method: {path}" in err and message in err
    if source == "x = 1":
        registry.admit(str(path))
        with pytest.raises(ValueError, match="not one of the schedulers: it has no SETTINGS"):
            registry.load("schedulers", str(path))
        path.write_text("class Options: pass")
        registry.admit(str(path))
        with pytest.raises(ValueError, match="has no class of its name, 'mine' in any case"):
            registry.load_class("methods", str(path))


# --- Who may say so ----------------------------------------------------------------------------------------


def test_the_command_line_alone(evil, tmp_path, capsys):
    """Not the parameters of an image, a table, a file of flags, or a keyword of a program."""
    err = refused(capsys, cli.parse_sample, ["--like", drawn_by(tmp_path, evil)])
    assert "is code: it runs only if the command line names it" in err
    err = refused(capsys, cli.parse_sample, ["--like", drawn_by(tmp_path, evil, "Sampler digest: 00")])
    assert "name it by --scheduler" in err
    (tmp_path / "table.csv").write_text(f"scheduler\n{evil}\n")
    err = refused(capsys, cli.parse_sample, ["--prompt", "x", "--csv", tmp_path / "table.csv"])
    assert "is code: it runs only if the command line names it" in err
    for method, text in {evil: "", "lora": f"\nvalidation_scheduler = {json.dumps(evil)}"}.items():
        (tmp_path / "run.toml").write_text(f"method = {json.dumps(method)}{text}\ndata = 'x'\n")
        err = refused(capsys, cli.parse_train, ["--config", tmp_path / "run.toml"])
        assert "is code: it runs only if the command line names it" in err
    (tmp_path / "run.toml").write_text(f"scheduler = {json.dumps(evil)}\n")
    err = refused(capsys, cli.parse_sample, ["--prompt", "x", "--config", tmp_path / "run.toml"])
    assert "is code: it runs only if the command line names it" in err
    with pytest.raises(ValueError, match="is code"):
        Settings(scheduler=evil)
    with pytest.raises(ValueError, match="is code"):
        registry.load("methods", evil)
    err = refused(capsys, cli.parse_train, ["--method", evil])
    assert "SystemExit: it ran" in err  # so all of this was about a file that does something


def test_another_run_s_options_run_nothing(evil, short_run, tmp_path, monkeypatch):
    """A checkpoint that says it is of a method from a file."""
    o = short_run("textual_inversion", max_train_steps=1, checkpointing_steps=1)
    assert testing.train("textual_inversion", o) == 0
    state = o.output_dir / "checkpoint-1" / "state.json"
    from minisd.training import checkpoint

    content = json.loads(state.read_text())
    del content["sha256"]
    content["options"] |= {"method": evil, "validation_scheduler": evil, "code": {evil: "0"}}
    state.write_text(json.dumps(content | {"sha256": checkpoint.own_digest(content)}))
    again = short_run("textual_inversion", "--resume_from_checkpoint", "latest", max_train_steps=2)
    with pytest.raises(ValueError, match="--method was .*evil.py, --validation_scheduler was"):
        testing.train("textual_inversion", again)
