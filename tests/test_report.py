"""The pages of runs: whole, without network, and the same bytes whether a run was stopped or not."""

import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from minisd import __main__ as commands
from minisd import registry
from minisd.data import images
from minisd.training import loop, report, run_folder
from tests import browser, method_helpers
from tests.test_commands import run as minisd

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """A page's pictures, curves and texts; AssertionError if its elements are not nested."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.pictures, self.curves, self.texts, self.links = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        for source in self.pictures:
            assert "://" not in source
            with Image.open(path.parent / unquote(source)) as image:
                image.load()
        assert all(link.startswith("data:") for link in self.links)  # nothing is fetched

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.open += [] if tag in VOID else [tag]
        self.pictures += [attrs["src"]] if tag == "img" else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.curves += [attrs["points"].split()] if tag == "polyline" else []
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def finished(short_run, tmp_path):
    """finished("name", lr): the folder of a finished run with validation and held-out loss."""

    def make(name: str, lr: float = 1e-3, **changes) -> Path:
        flags = ["--validation_prompt", "a cat", "--validation_steps", 2, "--learning_rate", lr]
        flags += ["--validation_split", 2, "--output_dir", tmp_path / name]
        o = short_run("text_to_image", *flags, max_train_steps=5, **changes)
        method_helpers.train("text_to_image", o)
        return o.output_dir

    return make


def test_a_report_shows_the_run(finished):
    folder = finished("run with a <name>")
    page = Page(folder / report.NAME)
    assert [unquote(p) for p in page.pictures] == [
        "result.png", *(f"validation/step-00000{step}.png" for step in (4, 2, 0)),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    counts = {n: sum(n in line for line in lines) for n in report.CURVES}
    assert [len(c) for c in page.curves] == [counts["loss"], *counts.values()] and counts["loss"] == 5
    assert {*report.CURVES.values(), "learning_rate", "0.001"} <= {*page.texts}
    assert "run with a <name>" in page.texts and "adam_beta1" not in page.texts  # a default
    assert json.loads((folder / "run.json").read_text())["data"] in page.texts
    heights = [float(p.partition(",")[2]) for p in page.curves[0]]
    losses = [line["loss"] for line in lines if "loss" in line]
    order = sorted(range(5), key=losses.__getitem__)
    assert sorted(range(5), key=heights.__getitem__, reverse=True) == order  # y grows downwards


def test_pages_of_any_moment(tmp_path):
    """Of a run that has just begun, or was killed while it wrote a line, or left later pictures."""
    (tmp_path / "options.json").write_text('{"method": "lora", "rank": 4}')
    report.write(tmp_path)
    assert not Page(tmp_path / report.NAME).curves
    log = [json.dumps({"step": i, "loss": 1 / i, "lr": 1e-4, "grad_norm": 1.0}) for i in range(1, 2001)]
    (tmp_path / "log.jsonl").write_text("\n".join(log) + '\n{"step": 2001, "lo')
    for step in (2000, 2001):
        (tmp_path / "validation").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "validation" / f"step-{step:06}.png")
    (tmp_path / "validation" / "step-mine.png").write_text("no picture")
    report.write(tmp_path)
    page = Page(tmp_path / report.NAME)
    assert page.pictures == ["validation/step-002000.png"]
    assert max(map(len, page.curves)) <= report.MOST
    assert (tmp_path / report.NAME).stat().st_size < 200_000


@pytest.mark.parametrize(
    "line", ['{"loss": 1}', '{"step": 1, "loss": "x"}', '{"step": null}', '[{"step": 1}']
)
def test_a_log_of_another_program_is_refused(line, tmp_path):
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 1.5}}\n{line}\n')
    with pytest.raises(ValueError, match="log.jsonl(: bad JSON| has a line that is not of a run)"):
        report.RunData.read(tmp_path)


def test_smoothing_and_thinning_keep_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1400)]
    mean = sum(y for _, y in points) / len(points)
    for few in (report.thinned(points), report.smoothed(points)):
        assert abs(sum(y for _, y in few) / len(few) - mean) < 0.05 and few[-1][0] == 1399
    assert len(report.smoothed(points)) == 1400 and len(report.thinned(points)) == 467
    assert report.smoothed([(1, 2.0), (2, 4.0)]) == [(1, 2.0), (2, 4.0)]


def test_a_stopped_run_ends_with_the_same_page(short_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = []
    for name, ends in (("whole", [4]), ("stopped", [2, 4])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for end in ends:
            flags = ["--validation_prompt", "a cat", "--validation_steps", 2, "--checkpointing_steps", 1]
            o = short_run("lora", "--instance_prompt", "x", *flags, "--resume_from_checkpoint", "latest")
            o.output_dir, o.max_train_steps = Path("run"), 4
            method_helpers.train("lora", o) if end == 4 else stop_after(end, o)
        pages.append(Path("run", report.NAME).read_bytes())
    assert pages[0] == pages[1]


def stop_after(steps: int, o) -> None:
    """A run that is stopped by a signal after so many updates."""
    after = loop.after_update

    def stopping(trainer, *rest):
        after(trainer, *rest)
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "after_update", stopping)
        assert method_helpers.train("lora", o) == 128 + signal.SIGTERM
    assert Page(o.output_dir / report.NAME).pictures == [f"validation/step-00000{n}.png" for n in (2, 0)]


def test_what_a_run_says_of_its_start_stays(short_run, monkeypatch):
    """A run that goes on with another commit ends with the bytes of one that was not stopped."""
    flags = ["--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    o = short_run("text_to_image", *flags, max_train_steps=1)
    method_helpers.train("text_to_image", o)
    facts, page = ((o.output_dir / name).read_bytes() for name in ("run.json", "report.html"))
    monkeypatch.setattr(run_folder, "machine", lambda device: {"commit": "another"})
    method_helpers.train("text_to_image", o)
    assert facts == (o.output_dir / "run.json").read_bytes()
    assert page == (o.output_dir / "report.html").read_bytes()


def test_compare(finished, tmp_path, monkeypatch):
    runs = [finished("slow", 1e-4), finished("fast", 1e-2)]
    elsewhere = tmp_path / "pages"
    elsewhere.mkdir()
    done = minisd("compare", *runs, cwd=elsewhere)
    assert done.returncode == 0 and done.stdout == "compare.html\n", done.stderr
    page = Page(elsewhere / "compare.html")
    assert len(page.pictures) == 8 and unquote(page.pictures[0]) == "../slow/result.png"
    assert {"slow", "fast", "learning_rate", "0.0001", "0.01"} <= {*page.texts}
    assert not {"validation_prompt", "data"} & {*page.texts}  # both have the same
    assert len(page.curves) == 2 * len(report.CURVES)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs)])
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        commands.compare()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite"])
    commands.compare()
    assert commands.compare.__doc__


@pytest.mark.skipif(not browser.PATH, reason=browser.MISSING)
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(finished, tmp_path, width):
    """It draws the page without complaint, with all pictures, and nothing is wider than the window."""
    folder = finished("run")
    probe = (
        "<script>onload = () => document.title = JSON.stringify([document.documentElement.scrollWidth <= "
        "innerWidth, [...document.images].every(i => i.naturalWidth > 0), document.images.length])</script>"
    )
    page = folder / "probed.html"
    page.write_text((folder / report.NAME).read_text().replace("</body>", f"{probe}</body>"))
    command = [browser.PATH, *browser.FLAGS, "--dump-dom", "--enable-logging=stderr"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>[true,true,4]</title>" in done.stdout, done.stdout[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr


OWN = {
    "dreambooth": ["--instance_prompt", "a sks cat"],
    "lora": ["--instance_prompt", "a sks cat"],
    "custom_diffusion": ["--instance_prompt", "a <new1> cat", "--modifier_token", "<new1>"],
    "textual_inversion": ["--num_vectors", 2],
    "erase": ["--erase", "a cat", "--ddim_steps", 2],
    "sliders": ["--target_prompt", "a", "--positive_prompt", "b", "--negative_prompt", "", "--ddim_steps", 2],
    "reward": [
        "--reward",
        method_helpers.REWARD,
        "--prompt",
        "a",
        "--images_per_prompt",
        2,
        "--ddim_steps",
        2,
    ],
    "unconditional": ["--ddpm_num_inference_steps", 2, "--eval_batch_size", 2],
}


@pytest.mark.parametrize("method", registry.names("methods"))
def test_before_and_after_of_every_method(method, short_run, monkeypatch):
    """A run that changes next to nothing draws the same afterwards, and result.png has all of it."""
    sheets = []

    def labelled_rows(rows, size=256):
        sheets.append(dict(rows))
        return whole(rows, size)

    whole = images.labelled_rows
    monkeypatch.setattr(images, "labelled_rows", labelled_rows)
    flags = ["--learning_rate", 1e-12, *OWN.get(method, [])]
    o = short_run(method, *flags, max_train_steps=1)
    method_helpers.train(method, o)
    result = Image.open(o.output_dir / "result.png")
    page = Page(o.output_dir / report.NAME)
    if method == "unconditional":  # whose random weights draw noise
        assert [*sheets[0]] == ["trained on"] and page.pictures == ["result.png"]
        return
    if "data" in vars(o):
        shown = sheets.pop(1)["trained on"]
        assert 1 <= len(shown) <= 8
        before_at = whole([("trained on", shown)]).height
    else:
        before_at = 0
    before, after = sheets
    plain = [{label.partition(": ")[2]: row for label, row in rows.items()} for rows in sheets]
    assert plain[0] == plain[1] and {label.partition(":")[0] for label in after} == {"after"}
    drawn = images.open_image(o.output_dir / run_folder.BEFORE)
    box = (0, before_at, drawn.width, before_at + drawn.height)
    assert result.crop(box).tobytes() == drawn.tobytes() == whole([*before.items()]).tobytes()
    assert result.height == before_at + drawn.height + whole([*after.items()]).height
    assert page.pictures == ["result.png", run_folder.BEFORE]


def test_a_run_that_goes_on_elsewhere_has_what_was_before(short_run, tmp_path):
    o = short_run("lora", "--instance_prompt", "x", "--checkpointing_steps", 1)
    method_helpers.train("lora", o)
    before, result = o.output_dir / run_folder.BEFORE, (o.output_dir / "result.png").read_bytes()
    o.resume_from_checkpoint, o.output_dir = str(o.output_dir / "checkpoint-1"), tmp_path / "elsewhere"
    method_helpers.train("lora", o)
    assert (o.output_dir / run_folder.BEFORE).read_bytes() == before.read_bytes()
    assert (o.output_dir / "result.png").read_bytes() == result
