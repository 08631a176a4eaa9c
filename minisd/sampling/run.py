"""What sample.py does with options: load the model that they name, draw, and save."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minisd import ops
from minisd.data import images
from minisd.sampling import infotext, prompt, sweep
from minisd.sampling.generate import pictures
from minisd.sampling.input_images import Inputs
from minisd.sampling.options import Job, Sample, split_scale
from minisd.sampling.stable_diffusion import StableDiffusion

# A change in one of these needs the model anew.
LOADING = "model revision variant load_ema tokenizer_name cache_dir device dtype kernels adapter".split()
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(options: Sample) -> StableDiffusion:
    """The model, with its adapters."""
    ops.choose(options.kernels)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    sd: StableDiffusion, inputs: Inputs, taken: int, several: bool
) -> Iterator[tuple[Path, Image.Image]]:
    """Draw and save the pictures; `taken` and `several` are as in `output_paths`."""
    options = inputs.options
    arguments = inputs.arguments(sd)
    prompts, seeds, settings = (arguments[name] for name in ("prompts", "seeds", "settings"))
    if not settings.plain_prompt:
        for line in prompt.attach_loras(sd, prompts, settings.lora_dir):
            print(line)
    paths = output_paths(options.output, seeds, taken, several or len(seeds) > 1)

    def preview(drawn: list[Image.Image]) -> None:
        images.save_png(images.grid(drawn), paths[0].with_name("preview.png"))

    if options.preview:
        arguments |= {"on_preview": preview, "preview": options.preview}
    steps = len(prompts) * (settings.steps - settings.first_step)
    with tqdm(total=steps, desc="drawing", unit="step", dynamic_ncols=True) as bar:
        made = pictures(sd, **arguments, on_step=bar.update)
        for i, (text, path, image) in enumerate(zip(prompts, paths, made, strict=True)):
            about = replace(options, **inputs.of(i, len(prompts)))
            images.save_png(image, path, infotext.write(text, seeds[i], sd.name, about, settings))
            yield path, image


def output_paths(output: Path, seeds: list[int], taken: int, several: bool) -> list[Path]:
    """Where each picture goes: numbered names that are still free in the folder; or the file that was named,
    which gets numbers from `taken` on if there are `several` pictures."""
    if output.suffix.lower() == ".png":
        numbers = range(taken, taken + len(seeds))
        return [output.with_stem(f"{output.stem}-{i}") if several else output for i in numbers]
    used = [int(p.name[:5]) for p in output.glob("*.png") if p.name[:5].isdigit()]
    first = max(used, default=-1) + 1
    return [output / f"{first + i:05}-seed-{seed}.png" for i, seed in enumerate(seeds)]


def run(jobs: list[Job]) -> list[Path]:
    """Everything that was asked for, and a sheet if that is several pictures; returns where all that is."""
    sd, loaded, paths, cells, exported = None, None, [], [], []
    for job in jobs:
        try:
            inputs = Inputs(job.options)
            # LoRAs add in the order in which they came: with others, that would change the last bits.
            named = [] if job.options.plain_prompt else prompt.lora_names(job.options.prompts)
            wanted = [*(getattr(job.options, name) for name in LOADING), named]
            if wanted != loaded:
                sd = None  # before there are two of them
                sd, loaded = load(job.options), wanted
            if job.options.export:
                sd.export(job.options.export, DTYPES.get(job.options.dtype))
                exported = [job.options.export]
            drawn = list(draw(sd, inputs, len(paths), len(jobs) > 1)) if job.options.prompts else []
        except ValueError as e:
            raise ValueError(f"{job.where}{e}") from e
        paths += [path for path, _ in drawn]
        cells.append([image for _, image in drawn])
    if len(paths) > 1:
        output = jobs[0].options.output
        named = output.suffix.lower() == ".png"
        paths.append(output if named else paths[0].with_name(f"{paths[0].name[:5]}-grid.png"))
        if len(jobs) > 1:
            sheet = sweep.sheet([job.row for job in jobs], [images.grid(cell) for cell in cells])
        else:
            sheet = images.grid(cells[0])
        images.save_png(sheet, paths[-1])
    return [*exported, *paths]
