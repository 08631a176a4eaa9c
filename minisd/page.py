"""`minisd page`: a page to draw on and to watch runs, for the browsers of this machine alone.

It draws and saves as sample.py does. Nothing is sent, shared or downloaded.
"""

import hashlib
import html
import os
import socket
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from minisd import files, ops, reading, registry
from minisd.options import require
from minisd.sampling import infotext, run
from minisd.sampling.options import Page, Sample
from minisd.sampling.stable_diffusion import adapter_files
from minisd.training import report

CSS = "#result img {width: 100%; height: 100%; object-fit: contain}"
MOST = 60  # images in the gallery
HOSTS = ["127.0.0.1", "localhost"]  # how a browser names this machine; another site's name may lead here, too
FRAME = '<iframe sandbox title="report" style="width:100%;height:85vh;border:0" srcdoc="{}"></iframe>'


def runs_below(folder: Path) -> dict[str, Path]:
    """The folders of runs in `folder`, down to three levels, by their paths in it; the latest first."""
    found = [path for depth in range(4) for path in folder.glob("*/" * depth + "options.json")]
    found.sort(key=lambda path: (-path.stat().st_mtime, path))
    return {path.parent.relative_to(folder).as_posix(): path.parent for path in found}


def is_adapter(path: Path) -> bool:
    """Whether a run left what --adapter takes."""
    with suppress(ValueError):
        kinds = [registry.match("adapters", files.read(file)) for file in adapter_files(path)]
        return not any(hasattr(kind, "CONTROL") for kind in kinds)
    return False


class Artist:
    """Draws for the page, one image after another, with a model that it keeps."""

    def __init__(self, options: Page):
        self.options, self.stopped = options, False
        self.done, self.steps, self.previews = 0, 0, []  # of the image that is being drawn
        asked = self.sample()
        self.model, self.loaded = run.load(asked), run.needs(asked, [])

    def sample(self, **flags) -> Sample:
        """The options of one image. A copy of an uploaded picture stays where --like finds it."""
        if picture := flags.pop("image", None):
            content = Path(picture).read_bytes()
            name = f"{hashlib.sha256(content).hexdigest()[:12]}.png"
            flags["image"] = [self.options.output / "inputs" / name]
            files.write_bytes(flags["image"][0], content)
        else:
            flags |= {"strength": None, "image_guidance_scale": None}
        values = {"prompt": [""]} | vars(self.options) | flags
        return Sample(**{f.name: values[f.name] for f in fields(Sample) if f.name in values})

    def draw(self, options: Sample) -> Path:
        """Draw and save an image, and return its path. ValueError if it was stopped, or as in sample.py."""
        self.stopped, self.done, self.previews = False, 0, []
        request = run.Request(options, options.read_prompts())
        if (needed := run.needs(options, request.prompts)) != self.loaded:
            self.model = self.loaded = None  # frees it before the next one is loaded
            self.model, self.loaded = run.load(options), needed
        self.steps = options.steps
        try:
            ((path, _),) = run.draw(self.model, request, on_step=self._step, on_preview=self.previews.extend)
        finally:
            self.steps = 0
        ops.say_verdicts()
        return path

    def _step(self, n: int) -> None:
        require(not self.stopped, "stopped")
        self.done += n

    def gallery(self) -> list[tuple[str, str]]:
        """The latest images, with their names."""
        drawn = sorted(self.options.output.glob("*-seed-*.png"), reverse=True)[:MOST]
        return [(str(reading.real(path)), path.name) for path in drawn]

    def about(self, name: str) -> str:
        """The parameters of an image of the gallery."""
        try:
            return infotext.read(self.options.output / Path(name).name)
        except ValueError as e:
            return str(e)

    def report(self, name: str | None) -> str:
        """A run's report, in a frame in which no script runs; its images come from the run's folder."""
        path = runs_below(self.options.runs).get(name)
        if not (path and (path / report.NAME).is_file()):
            return "It has no report yet." if path else ""
        base = f'<base href="/gradio_api/file={quote(str(reading.real(path)))}/">'
        return FRAME.format(html.escape(base + (path / report.NAME).read_text(encoding="utf-8")))


def serve(options: Page) -> None:
    """Show the page until Ctrl-C. ValueError if gradio is not installed, if the port is not free, or as in
    `run.load`."""
    try:
        socket.create_server((options.host, options.port)).close()
    except OSError as e:
        raise ValueError(f"--port {options.port}: {os.strerror(e.errno)}; give another one") from None
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the page needs gradio: pip install 'minisd[page]'") from None
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    page = build(gr, Artist(options))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # of no font server
    page.launch(
        server_name=options.host, server_port=options.port, allowed_paths=[], share=False, mcp_server=False,
        ssr_mode=False, run_history=False, quiet=True, prevent_thread_lock=True, theme=theme, css=CSS,
        footer_links=[], app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]},
    )  # fmt: skip
    print(page.local_url, flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def form(gr: ModuleType, o: Page) -> dict:
    """What the user fills in, by the names of flags; it begins with those of the command line."""
    narrow = {"precision": 0, "min_width": 110}
    with gr.Column():
        inputs = {"prompt": gr.Textbox(label="Prompt", lines=2)}
        inputs["negative_prompt"] = gr.Textbox(o.negative_prompt, label="Negative prompt")
        with gr.Row():
            inputs["seed"] = gr.Number(-1, label="Seed (-1: any)", **narrow)
            inputs["steps"] = gr.Number(o.steps, label="Steps", **narrow)
            inputs["guidance_scale"] = gr.Number(o.guidance_scale, label="Guidance", min_width=110)
        with gr.Row():
            known = registry.names("schedulers")
            inputs["scheduler"] = gr.Dropdown(known, value=o.scheduler, label="Sampler", min_width=110)
            inputs["width"] = gr.Number(o.width or 0, label="Width (0: auto)", **narrow)
            inputs["height"] = gr.Number(o.height or 0, label="Height (0: auto)", **narrow)
        with gr.Accordion("Start from a picture", open=False):
            inputs["image"] = gr.Image(type="filepath", format="png", sources=["upload", "clipboard"])
            inputs["strength"] = gr.Slider(0.05, 1, o.strength or 0.8, step=0.05, label="Strength")
        inputs["adapter"] = gr.Dataframe(
            headers=["Adapter", "Scale"], datatype=["str", "number"], type="array", static_columns=[0],
            label="Adapters of your runs: not used at scale 0", interactive=True, wrap=True,
        )  # fmt: skip
    return inputs


def build(gr: ModuleType, artist: Artist):
    """The page, by `gr`, the module gradio."""
    o = artist.options

    def draw(*given):
        values = dict(zip(inputs, given, strict=True))
        chosen = [f"{o.runs / name}:{scale}" for name, scale in values["adapter"] if scale]
        values |= {"prompt": [values["prompt"]], "adapter": [*o.adapter, *chosen]}
        values |= {"width": values["width"] or None, "height": values["height"] or None}
        try:
            path = artist.draw(artist.sample(**values, preview=max(1, values["steps"] // 10)))
        except ValueError as e:
            raise gr.Error(str(e), print_exception=False) from None
        return str(reading.real(path)), artist.about(path.name), artist.gallery()

    def look():
        runs = runs_below(o.runs)
        page.allowed_paths = [str(reading.real(path)) for path in (o.output, *runs.values())]
        found = [[name, 0] for name, path in runs.items() if is_adapter(path)]
        return artist.gallery(), found, gr.Dropdown([*runs], value=next(iter(runs), None))

    def watch(name):
        if not artist.steps:
            return gr.skip(), gr.skip(), artist.report(name)
        latest = (artist.previews or [None])[-1]
        return latest, f"step {artist.done} of {artist.steps}", artist.report(name)

    def stop():
        artist.stopped = True

    def about(event: gr.SelectData):
        return artist.about(event.value["caption"])

    with gr.Blocks(title="minisd", analytics_enabled=False) as page:
        with gr.Tab("Draw"), gr.Row():
            inputs = form(gr, o)
            with gr.Column():
                with gr.Row():
                    start, end = gr.Button("Draw", variant="primary"), gr.Button("Stop")
                plain = {"show_label": False, "buttons": ["download", "fullscreen"]}  # none that uploads
                result = gr.Image(interactive=False, format="png", height=360, elem_id="result", **plain)
                text = gr.Textbox(label="Parameters", interactive=False, buttons=["copy"])
                images = gr.Gallery(columns=4, fit_columns=False, object_fit="contain", **plain)
        with gr.Tab("Runs", render_children=True):  # or what it is sent before it is opened is lost
            name, shown = gr.Dropdown([], label="Run"), gr.HTML()
        start.click(draw, [*inputs.values()], [result, text, images], show_progress="hidden")
        end.click(stop)
        images.select(about, None, text)
        page.load(look, None, [images, inputs["adapter"], name])
        ticks = [name.change, gr.Timer(1).tick]  # a report that is the same stays where it was scrolled to
        gr.on(ticks, watch, name, [result, text, shown], show_progress="hidden")
    return page
