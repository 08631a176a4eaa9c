"""Sampling as sample.py does it: load the model, generate the images, and save them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm import tqdm

from minisd import files, ops, registry
from minisd.data import images
from minisd.device import DTYPES, configure, precision, usable
from minisd.sampling import heat, image_prompt, infotext, sweep
from minisd.sampling.edit import edit
from minisd.sampling.input_images import InputImages, opened
from minisd.sampling.options import Drawing, Job, Loading, Sample, is_png, refuse_unused, split_scale
from minisd.sampling.prompt import Prompt, lora_names, parse_all

if TYPE_CHECKING:
    from minisd.sampling.api import Model, PixelModel

TOKEN = re.compile(r"<[^<>\s:]+>")  # of an adapter, as its makers mostly write it
NUMBERED = re.compile(r"(\d{5,})-")  # names of images in a folder


class Request:
    """The inputs of one run that need no model: prompts, parsed, and input images, opened."""

    def __init__(self, options: Drawing, texts: list[str]):
        self.options = options
        if options.scheduler.endswith(".py"):  # which may not run
            registry.load("schedulers", options.scheduler)
        self.images = InputImages(options) if options.image or options.controlnet else None
        self.image_prompts = [opened(path, max_pixels=options.max_pixels) for path in options.image_prompt]
        texts = self.images.prompts(texts) if self.images else texts
        self.prompts = [prompt for prompt in parse_all(texts, options) for _ in range(options.num_images)]

    def arguments(self, model: Model | PixelModel) -> dict:
        """The keywords of `draw` for this model. ValueError, naming the flag, if one has no effect on it."""
        refuse_unused(self.options, model)
        settings, count = copy(self.options), len(self.prompts)
        if self.images:
            self.images.complete(settings, model)
        settings.width = settings.width or model.default_size
        settings.height = settings.height or model.default_size
        asked = self.image_prompts, settings.image_encoder
        return {
            "prompts": self.prompts,
            "seeds": [settings.seed + i for i in range(count)],
            "settings": settings,
            "batch_size": settings.batch_size or (1 if model.device.type == "cpu" else 4),
            **(self.images.tensors(model, settings, count) if self.images else {}),
            **({"image_prompt": image_prompt.project(model, *asked)} if self.image_prompts else {}),
        }


def load(options: Sample) -> Model | PixelModel:
    """Load the model, attach its adapters and erase concepts. ValueError, naming the flag, if one has no
    effect on it."""
    from minisd.sampling import api  # which takes Request from here

    configure(options)
    device = usable(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # An image whose text names no precision was drawn in that of any CPU.
    name = "fp32" if (options.dtype, device.type) == ("auto", "cpu") and options.like else options.dtype
    dtype = precision(name, device)
    if name == "auto" and dtype == torch.bfloat16:
        print(
            "precision: bf16, which this CPU computes fastest (--dtype fp32 for more digits)", file=sys.stderr
        )
    model = api.load(options.model, device=device, dtype=dtype, **options.loading())
    refuse_unused(options, model)
    if options.compile:
        model.unet.compile(dynamic=False)
    for adapter in options.adapter:
        for line in model.attach(*split_scale(adapter)):
            print(f"{adapter}: {line}", file=sys.stderr)
    if options.erase_concepts:
        prompts = options.erase_concepts, options.guide_concepts or [""], options.preserve_concepts
        said = edit(model, *prompts, lamb=options.lamb, clip_skip=options.clip_skip)
        print(f"concepts: {said}", file=sys.stderr)
    return model


def say_tokens(model: Model | PixelModel, texts: list[str], prompts: list[Prompt]) -> None:
    """Say which <tokens> of the prompts are none of the model, and which tokens of adapters are in no prompt
    of this run: in `texts`, or the `prompts` of a file."""
    if model.is_pixels or not prompts:
        return
    texts = [*texts, *(text for prompt in prompts for text in (prompt.text, prompt.negative.text))]
    words = dict.fromkeys(word for text in texts for word in TOKEN.findall(text.lower()))
    known = model.tokenizer.placeholders
    for word in words:
        if word not in known and model.tokenizer.one(word) is None:
            line = f"prompt: {word} is no token of the model or of an --adapter, and is read as other text"
            print(line, file=sys.stderr)
    for token in known:
        if not any(token in text.lower() for text in texts):
            print(f"--adapter: its token {token} is in no prompt", file=sys.stderr)


def draw(
    model: Model | PixelModel,
    request: Request,
    taken: int = 0,
    several: bool = False,
    on_step: Callable[[int], None] = lambda n: None,
    on_preview: Callable[[list[Image.Image]], None] | None = None,
) -> Iterator[tuple[Path, Image.Image]]:
    """Generate, save and yield the images; `taken` counts those of earlier jobs, and `several` says whether
    there are further jobs. `on_step` and `on_preview` are as in `generate.pictures`; by default previews go
    to a file."""
    arguments, prompts = request.arguments(model), request.prompts
    seeds, settings, count = arguments["seeds"], arguments["settings"], len(prompts)
    output = settings.output

    def stepped(n: int) -> None:
        bar.update(n)
        on_step(n)

    def preview(drawn: list[Image.Image]) -> None:
        folder = output.parent if is_png(output) else output
        images.save_png(images.grid(drawn), folder / "preview.png")

    if settings.dtype == "auto" and model.unet.conv_in.weight.dtype == torch.bfloat16:
        settings.dtype = "bf16"  # which --like finds in the image
    if settings.preview:
        arguments |= {"on_preview": on_preview or preview, "preview": settings.preview}
    steps = count * (settings.steps - settings.first_step)
    watching = nullcontext()
    if settings.heatmap:
        arguments["batch_size"], watching = 1, heat.mapped(model, prompts, settings.heatmap)
    with tqdm(total=steps, desc="drawing", unit="step", dynamic_ncols=True) as bar, watching as heat_map:
        for i, image in enumerate(model.draw(**arguments, on_step=stepped)):
            shown = replace(settings, **request.images.of(i, count)) if request.images else settings
            text = infotext.write(prompts[i].text, seeds[i], model.name, shown, model.flags, ops.digest())
            number = taken + i if several or count > 1 else None
            path = save(image, text, output, seeds[i], number)
            if heat_map:
                images.save_png(heat_map(i, image), path.with_stem(f"{path.stem}-heat"))
            yield path, image


def save(image: Image.Image, text: str, output: Path, seed: int, number: int | None) -> Path:
    """Write an image and return its path: in a folder, numbered after the images that are there; for a file,
    that file, with `number` in its name unless that is None."""
    if is_png(output):
        path = output if number is None else output.with_stem(f"{output.stem}-{number}")
        images.save_png(image, path, text)
        return path
    with files.locked(output):  # another process may be numbering its images there
        used = [int(match[1]) for path in output.glob("*.png") if (match := NUMBERED.match(path.name))]
        path = output / f"{max(used, default=-1) + 1:05}-seed-{seed}.png"
        images.save_png(image, path, text)
    return path


def needs(options: Sample, prompts: list[Prompt]) -> list[object]:
    """All that `load` makes a model from: while it is the same, the model need not be loaded anew. LoRAs of
    prompts are summed in the order in which they were attached: another one changes the last bits."""
    needed = [*(getattr(options, f.name) for f in fields(Loading)), lora_names(prompts)]
    return [*needed, options.erase_concepts and options.clip_skip]


def run(jobs: list[Job]) -> list[Path]:
    """Generate and save the images of all jobs, and a contact sheet if there are several images. Returns the
    paths of all files."""
    model, loaded, paths, cells, exported = None, None, [], [], []
    like = jobs[0].options.like  # which this run may overwrite
    recorded = dict(infotext.parse(infotext.read(like))[2]).get("Kernels", "") if like else ""
    for options, _, where in jobs:
        try:
            request = Request(options, options.read_prompts())
            needed = needs(options, request.prompts)
            if needed != loaded:
                model = None  # frees it before the next one is loaded
                model, loaded = load(options), needed
                say_tokens(model, [text for job in jobs for text in job.options.prompt], request.prompts)
            if options.export:
                model.export(options.export, DTYPES.get(options.dtype))
                exported = [options.export]
            drawn = list(draw(model, request, len(paths), len(jobs) > 1)) if request.prompts else []
        except ValueError as e:
            raise ValueError(f"{where}{e}") from e
        paths += [path for path, _ in drawn]
        cells.append([image for _, image in drawn])
        ops.say_verdicts()
    if like and recorded != ops.digest():
        print(f"--like {like}: other kernels computed it, so the last digits differ", file=sys.stderr)
    if len(paths) > 1:
        sheet = sweep.by_prompt([prompt.text for prompt in request.prompts], cells[0])
        if len(jobs) > 1:
            sheet = sweep.sheet([job.row for job in jobs], [images.grid(cell) for cell in cells])
        output = jobs[0].options.output
        grid = f"{paths[0].name.partition('-')[0]}-grid.png"
        paths.append(output if is_png(output) else paths[0].with_name(grid))
        images.save_png(sheet, paths[-1])
    return [*exported, *paths]
