"""`minisd page`: for this machine alone, with the adapters and reports of runs, and in a headless browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import cli, files, page
from minisd.__main__ import page_options
from minisd.sampling import infotext, run
from minisd.training import report
from tests import browser, method_helpers
from tests.conftest import ROOT

SAY_ADDRESSES = """
import sys
from minisd import __main__
def heard(event, values):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("TO", event, *values[-1 if event == "socket.connect" else 0:][:1], file=sys.stderr, flush=True)
sys.addaudithook(heard)
__main__.main()
"""
TAB = "[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.trim() == 'Runs').click()"
WIDE = "document.documentElement.scrollWidth"
TEXT = "[...document.querySelectorAll('textarea')].at(-1).value"
LOADED = "[...document.images].every(image => image.naturalWidth > 0) && document.images.length"


@pytest.fixture
def below(short_run, tmp_path):
    """A folder with a run that left a LoRA, one that left a ControlNet, and one that left nothing yet."""
    folder = tmp_path / "below"
    for name in ("begun", "control"):
        (folder / name).mkdir(parents=True)
        (folder / name / "options.json").write_text("{}")
    weights = {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}
    files.write(folder / "control" / "diffusion_pytorch_model.safetensors", weights)
    o = short_run("lora", "--instance_prompt", "x", max_train_steps=1)
    o.output_dir = folder / "runs" / "a <cat>"
    method_helpers.train("lora", o)
    return folder


@pytest.fixture
def artist(below, model, monkeypatch):
    monkeypatch.chdir(below)
    return page.Artist(page_options(["--model", str(model), "--device", "cpu", "--dtype", "fp32"]))


def test_runs_and_their_adapters_are_found(below, tmp_path):
    runs = page.runs_below(below)
    assert {*runs} == {"runs/a <cat>", "begun", "control"}
    assert [name for name, path in runs.items() if page.is_adapter(path)] == ["runs/a <cat>"]
    assert {*page.runs_below(below / "begun")} == {"."}
    deep = tmp_path / "deep" / "a/b/c"
    (deep / "d").mkdir(parents=True)
    for folder in (deep, deep / "d"):
        (folder / "options.json").write_text("{}")
    assert {*page.runs_below(tmp_path / "deep")} == {"a/b/c"}


def test_wrong_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, words in {
        ("--host", "0.0.0.0"): "--host 0.0.0.0: the page is for this machine alone",
        ("--host", "192.168.0.7"): "--host 192.168.0.7: the page is for this machine alone",
        ("--port", "65536"): "--port 65536: the largest is 65535",
        ("--runs", "nowhere"): "--runs nowhere is not a folder",
        ("--output", "one.png"): "--output one.png: the page needs a folder",
        ("--prompt", "x"): "unknown flag --prompt",
    }.items():
        with pytest.raises(SystemExit) as exit:
            page_options([*flags])
        assert exit.value.code == 2 and words in capsys.readouterr().err


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"needs gradio: pip install 'minisd\[page\]'"):
        page.serve(page_options(["--port", free_port()]))


def test_a_port_that_is_not_free(monkeypatch):
    """Is one line, before a model is loaded."""
    monkeypatch.setattr(page, "Artist", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*in use; give another one"):
            page.serve(page_options(["--port", str(port)]))


def test_it_draws_as_sample_does(artist, model, tmp_path):
    """The same bytes as by sample.py, with adapter and picture; what is drawn can be drawn again."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(photo)
    flags = {"prompt": ["a cat"], "seed": 5, "steps": 3, "strength": 0.7}
    paths = [
        artist.draw(artist.sample(**flags, preview=1)),
        artist.draw(artist.sample(**flags, image=str(photo), adapter=["runs/a <cat>:0.5"])),
        artist.draw(artist.sample(**flags)),
    ]
    assert [path.name for path in paths] == [f"0000{i}-seed-5.png" for i in range(3)]
    assert len(artist.previews) == 0 and artist.done == 3 and not artist.steps
    assert paths[0].read_bytes() == paths[2].read_bytes() != paths[1].read_bytes()
    photo.unlink()
    again = ["--like", paths[1], "--output", "again.png", "--device", "cpu", "--model", model]
    run.run(cli.parse_sample(list(map(str, again))))
    assert Path("again.png").read_bytes() == paths[1].read_bytes()
    assert [name for _, name in artist.gallery()] == [path.name for path in reversed(paths)]
    assert artist.about("../" + paths[1].name) == infotext.read(paths[1])
    assert "cannot be read" in artist.about("nothing.png")


def test_stop(artist):
    asked = artist.sample(prompt=["a cat"], steps=3)
    step, steps = artist._step, []

    def stopping(n):
        artist.stopped = bool(steps)
        steps.append(n)
        step(n)

    artist._step = stopping
    with pytest.raises(ValueError, match="stopped"):
        artist.draw(asked)
    assert steps == [1, 1] and artist.done == 1 and not artist.steps


def test_a_report_runs_no_script(artist):
    assert 'sandbox title="report"' in artist.report("runs/a <cat>")
    assert artist.report("begun") == "It has no report yet." and not artist.report("../..")
    (Path("begun") / report.NAME).write_text('"></iframe><script>alert(1)</script>')
    assert "<script" not in artist.report("begun")


def status(address: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.skipif(not browser.PATH, reason=browser.MISSING)
def test_in_a_browser(below, model, tmp_path, in_foreground):
    """It draws, shows the report, fits small and large windows, and asks no other machine for anything."""
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-c", SAY_ADDRESSES, "page", "--port", port, "--steps", "4"]
    command += ["--model", str(model), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "1"}
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        command, cwd=below, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        address = server.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/", (tmp_path / "log").read_text()
        for width in (400, 1400):
            with browser.Browser(tmp_path / f"profile-{width}") as tab:
                tab.go(address, width)
                tab.wait("document.querySelector('textarea') && document.body.innerText.includes('a <cat>')")
                tab.value("document.querySelector('textarea').focus()")
                tab.call("Input.insertText", text="a cat")
                tab.value("document.querySelector('button.primary').click()")
                tab.wait(f"{TEXT}.includes('Steps: 4')")
                tab.wait(LOADED)
                assert tab.value(WIDE) == width
                tab.screenshot(tmp_path / f"draw-{width}.png")
                tab.value(TAB)
                tab.wait("!!document.querySelector('iframe')")
                tab.value("document.querySelector('iframe').kept = true")
                tab.value("new Promise(resolve => setTimeout(resolve, 2500))")
                assert tab.value(
                    "document.querySelector('iframe').kept"
                )  # and so is where it was scrolled to
                assert tab.value(WIDE) == width
                tab.screenshot(tmp_path / f"runs-{width}.png")
                assert not tab.complaints
                local = (address, "data:", "blob:", "about:")
                assert not [url for url in tab.fetched if not url.startswith(local)]
        assert len([*(below / "samples").glob("*-seed-*.png")]) >= 2
        served = f"{address}gradio_api/file={below}"
        assert status(f"{served}/runs/a%20%3Ccat%3E/result.png") == 200
        assert status(f"{served}/../log") == status(f"{address}gradio_api/file=/etc/passwd") == 403
        assert status(address, Host="elsewhere.org") == 400
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
    finally:
        server.kill()
        log.close()
    said = (tmp_path / "log").read_text()
    assert said.endswith("minisd page: interrupted\n") and "Traceback" not in said
    addresses = [line for line in said.splitlines() if line.startswith("TO ")]
    assert addresses and all("127.0.0.1" in line or "localhost" in line for line in addresses), said


def test_the_containers_paths_exist():
    text = (ROOT / "docs" / "Containerfile").read_text()
    lines = [line.split() for line in text.splitlines()]
    copied = [name for line in lines if line[:1] == ["COPY"] for name in line[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    entry = json.loads(text.rpartition("ENTRYPOINT")[2])
    assert f"{entry[0]} = " in (ROOT / "pyproject.toml").read_text()
