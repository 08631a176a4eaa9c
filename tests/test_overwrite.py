"""Nothing of the user's is overwritten unasked: one line, before a model is loaded, and all stays there."""

import pytest

from minisd.sampling import run
from tests.method_helpers import train


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """A refused command does not get so far as to load one."""

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load", load)


@pytest.mark.parametrize(
    "there, flags",
    [
        ("x.png", ["--output", "x.png", "--prompt", "a"]),
        ("x-1.png", ["--output", "x.png", "--prompt", "a", "b"]),
        ("x.png", ["--output", "x.png", "--like", "x.png"]),
        ("x.png", ["--output", "x.png", "--image", "x.png", "--prompt", "a"]),
        ("m.safetensors", ["--export", "m.safetensors"]),
        ("m/model_index.json", ["--export", "m"]),
        ("m/notes.txt", ["--export", "m"]),
    ],
    ids=str,
)
def test_sampling(there, flags, command, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    if "--like" in flags:
        monkeypatch.setattr("minisd.cli.like", lambda path, given: ({"prompt": ["a"]}, []))
    status, out, err = command("sample.py", "--model", model, *flags)
    assert status == 2 and err.count("\n") == 1 and "exists: --overwrite replaces it" in err
    assert flags[0] in err and path.read_text() == "mine" and len(list(tmp_path.rglob("*.*"))) == 1


def test_a_jpeg_is_no_folder(command, model):
    status, _, err = command("sample.py", "--model", model, "--prompt", "a", "--output", "x.jpg")
    assert status == 2 and "--output x.jpg: a folder, or the name of a .png file" in err


def test_sampling_overwrites_if_asked(command, model, tmp_path, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "x.png"
    out.write_text("mine")
    flags = ["--model", model, "--prompt", "a", "--steps", 1, "--output", out]
    assert command("sample.py", *flags, "--overwrite")[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["learned_embeds.safetensors", "pytorch_lora_weights.bin", "model_index.json", "result.png"]
)
def test_a_result_stays(name, short_run, cat):
    """Of whatever method or script, and with --resume_from_checkpoint latest where there is no checkpoint."""
    for flags in ([], ["--resume_from_checkpoint", "latest"]):
        o = short_run("textual_inversion", *flags)
        o.output_dir.mkdir(exist_ok=True)
        (o.output_dir / name).write_text("mine")
        with pytest.raises(
            ValueError, match=f"has {name} of an earlier run: --overwrite_output_dir replaces it"
        ):
            train("textual_inversion", o)
        assert [p.name for p in o.output_dir.iterdir()] == [name]


@pytest.mark.parametrize("name", ["options.json", "log.jsonl"])
def test_a_run_that_was_begun(name, short_run):
    """Stays, unless the new one goes on from it: it may have been killed before its first checkpoint."""
    o = short_run("textual_inversion", max_train_steps=1)
    o.output_dir.mkdir()
    (o.output_dir / name).write_text("{}\n")
    with pytest.raises(ValueError, match=f"has {name} of an earlier run"):
        train("textual_inversion", o)
    o.resume_from_checkpoint = "latest"
    assert train("textual_inversion", o) == 0


def test_other_files_are_no_hindrance(short_run):
    o = short_run("textual_inversion", max_train_steps=1)
    o.output_dir.mkdir()
    for name in ("notes.txt", "learned_embeds-steps-1.safetensors"):
        (o.output_dir / name).write_text("mine")
    assert train("textual_inversion", o) == 0
    assert (o.output_dir / "notes.txt").read_text() == "mine"
    o.overwrite_output_dir = True
    assert train("textual_inversion", o) == 0


@pytest.mark.parametrize("name", ["model", "data"])
def test_the_folder_of_an_input(name, command, model, cat):
    inputs = {"model": model, "data": cat}
    before = sorted(inputs[name].rglob("*"))
    flags = ["--method", "textual_inversion", "--model", model, "--data", cat, "--placeholder_token", "<x>"]
    flags += ["--initializer_token", "cat", "--output_dir", f"{inputs[name]}/../{inputs[name].name}"]
    for more in ([], ["--overwrite"]):
        status, _, err = command("train.py", *flags, *more)
        assert status == 2 and f"is --{name} as well, which the run would change" in err, err
    assert sorted(inputs[name].rglob("*")) == before
