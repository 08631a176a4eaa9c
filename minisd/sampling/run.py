"""Sampling as sample.py does it: load the model, generate the images, and save them."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minisd import files, ops
from minisd.data import images
from minisd.device import configure
from minisd.sampling import api, infotext, sweep
from minisd.sampling.api import Model, PixelModel
from minisd.sampling.options import Job, Loading, split_scale
from minisd.sampling.prompt import lora_names
from minisd.sampling.request import Request

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(options: Loading) -> Model | PixelModel:
    """Load the model and attach its adapters."""
    configure(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        raise ValueError(f"--device {device}: {files.first_line(error)}") from error
    dtype = DTYPES.get(options.dtype)
    model = api.load(
        options.model,
        device=device,
        dtype=dtype or (torch.float16 if device.startswith("cuda") else torch.float32),
        revision=options.revision,
        variant=options.variant,
        ema=options.load_ema,
        tokenizer=options.tokenizer_name,
        cache_dir=options.cache_dir,
    )
    model.accept(options)
    if options.compile:
        model.unet.compile(dynamic=False)
    for adapter in options.adapter:
        for line in model.attach(*split_scale(adapter)):
            print(f"{adapter}: {line}")
    return model


def draw(
    model: Model | PixelModel, request: Request, taken: int, several: bool
) -> Iterator[tuple[Path, Image.Image]]:
    """Generate, save and yield the images; `taken` and `several` are as in `output_paths`."""
    arguments, prompts = request.arguments(model), request.prompts
    seeds, settings, count = arguments["seeds"], arguments["settings"], len(prompts)
    paths = output_paths(settings.output, seeds, taken, several or count > 1)

    def preview(drawn: list[Image.Image]) -> None:
        images.save_png(images.grid(drawn), paths[0].with_name("preview.png"))

    if settings.preview:
        arguments |= {"on_preview": preview, "preview": settings.preview}
    steps = count * (settings.steps - settings.first_step)
    with tqdm(total=steps, desc="drawing", unit="step", dynamic_ncols=True) as bar:
        for i, image in enumerate(model.draw(**arguments, on_step=bar.update)):
            of_this = replace(settings, **request.images.of(i, count)) if request.images else settings
            text = infotext.write(prompts[i].text, seeds[i], model.name, of_this, model.flags, ops.digest())
            images.save_png(image, paths[i], text)
            ops.say_verdicts()
            like = None if i else getattr(settings, "like", None)
            if like and dict(infotext.parse(infotext.read(like))[2]).get("Kernels", "") != ops.digest():
                print(f"--like {like}: other kernels computed it, so the last digits differ")
            yield paths[i], image


def output_paths(output: Path, seeds: list[int], taken: int, several: bool) -> list[Path]:
    """The path of each image: in a folder, numbered after the images that are there; for a file, that file,
    or with `several` images its name with numbers from `taken` on."""
    if output.suffix.lower() == ".png":
        numbers = range(taken, taken + len(seeds))
        return [output.with_stem(f"{output.stem}-{i}") if several else output for i in numbers]
    used = [int(p.name[:5]) for p in output.glob("*.png") if p.name[:5].isdigit()]
    first = max(used, default=-1) + 1
    return [output / f"{first + i:05}-seed-{seed}.png" for i, seed in enumerate(seeds)]


def run(jobs: list[Job]) -> list[Path]:
    """Generate and save the images of all jobs, and a contact sheet if there are several images. Returns the
    paths of all files."""
    model, loaded, paths, cells, exported = None, None, [], [], []
    for options, _, where in jobs:
        try:
            request = Request(options, options.read_prompts())
            # LoRAs are summed in the order in which they were attached: another one changes the last bits.
            needed = [*(getattr(options, f.name) for f in fields(Loading)), lora_names(request.prompts)]
            if needed != loaded:
                model = None  # frees it before the next one is loaded
                model, loaded = load(options), needed
            if options.export:
                model.export(options.export, DTYPES.get(options.dtype))
                exported = [options.export]
            drawn = list(draw(model, request, len(paths), len(jobs) > 1)) if request.prompts else []
        except ValueError as e:
            raise ValueError(f"{where}{e}") from e
        paths += [path for path, _ in drawn]
        cells.append([image for _, image in drawn])
    if len(paths) > 1:
        sheet = images.grid(cells[0])
        if len(jobs) > 1:
            sheet = sweep.sheet([job.row for job in jobs], [images.grid(cell) for cell in cells])
        output = jobs[0].options.output
        named = output.suffix.lower() == ".png"
        paths.append(output if named else paths[0].with_name(f"{paths[0].name[:5]}-grid.png"))
        images.save_png(sheet, paths[-1])
    return [*exported, *paths]
