"""Sampling as sample.py does it: load the model, generate the images, and save them."""

from collections.abc import Iterator
from copy import copy
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minisd import files, ops
from minisd.data import images
from minisd.sampling import infotext, sweep
from minisd.sampling.generate import pictures
from minisd.sampling.input_images import InputImages
from minisd.sampling.options import Drawing, Job, Loading, split_scale
from minisd.sampling.prompt import lora_names, parse_all
from minisd.sampling.stable_diffusion import StableDiffusion

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Request:
    """The inputs of one run that need no model: prompts, parsed, and input images, opened."""

    def __init__(self, options: Drawing, texts: list[str]):
        self.options = options
        self.images = InputImages(options) if options.image or options.controlnet else None
        texts = self.images.prompts(texts) if self.images else texts
        self.prompts = [prompt for prompt in parse_all(texts, options) for _ in range(options.num_images)]

    def arguments(self, sd: StableDiffusion) -> dict:
        """The keywords of `generate.pictures` for this model."""
        settings, count = copy(self.options), len(self.prompts)
        if self.images:
            self.images.complete(settings, sd)
        settings.width = settings.width or sd.default_size
        settings.height = settings.height or sd.default_size
        return {
            "prompts": self.prompts,
            "seeds": [settings.seed + i for i in range(count)],
            "settings": settings,
            "batch_size": settings.batch_size or (1 if sd.device.type == "cpu" else 4),
            **(self.images.tensors(sd, settings, count) if self.images else {}),
        }


def load(options: Loading) -> StableDiffusion:
    """Load the model and attach its adapters."""
    ops.choose(options.kernels)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        raise ValueError(f"--device {device}: {files.first_line(error)}") from error
    dtype = DTYPES.get(options.dtype)
    sd = StableDiffusion.load(
        options.model,
        device=device,
        dtype=dtype or (torch.float16 if device.startswith("cuda") else torch.float32),
        revision=options.revision,
        variant=options.variant,
        ema=options.load_ema,
        tokenizer=options.tokenizer_name,
        cache_dir=options.cache_dir,
    )
    for adapter in options.adapter:
        for line in sd.attach(*split_scale(adapter)):
            print(f"{adapter}: {line}")
    return sd


def draw(
    sd: StableDiffusion, request: Request, taken: int, several: bool
) -> Iterator[tuple[Path, Image.Image]]:
    """Generate, save and yield the images; `taken` and `several` are as in `output_paths`."""
    arguments = request.arguments(sd)
    prompts, seeds, settings = (arguments[name] for name in ("prompts", "seeds", "settings"))
    count = len(prompts)
    paths = output_paths(settings.output, seeds, taken, several or count > 1)

    def preview(drawn: list[Image.Image]) -> None:
        images.save_png(images.grid(drawn), paths[0].with_name("preview.png"))

    if settings.preview:
        arguments |= {"on_preview": preview, "preview": settings.preview}
    steps = count * (settings.steps - settings.first_step)
    with tqdm(total=steps, desc="drawing", unit="step", dynamic_ncols=True) as bar:
        for i, image in enumerate(pictures(sd, **arguments, on_step=bar.update)):
            of_this = replace(settings, **request.images.of(i, count)) if request.images else settings
            images.save_png(image, paths[i], infotext.write(prompts[i].text, seeds[i], sd.name, of_this))
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
    sd, loaded, paths, cells, exported = None, None, [], [], []
    for options, _, where in jobs:
        try:
            request = Request(options, options.read_prompts())
            # LoRAs are summed in the order in which they were attached: another one changes the last bits.
            needed = [*(getattr(options, f.name) for f in fields(Loading)), lora_names(request.prompts)]
            if needed != loaded:
                sd = None  # frees it before the next one is loaded
                sd, loaded = load(options), needed
            if options.export:
                sd.export(options.export, DTYPES.get(options.dtype))
                exported = [options.export]
            drawn = list(draw(sd, request, len(paths), len(jobs) > 1)) if request.prompts else []
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
