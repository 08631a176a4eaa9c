"""The options of sample.py, most of which are keywords of `sd.generate` too. Standard library only.

Each is declared once, here: flag, keyword, column of a --csv table, and key in an image's parameters. That is
`infotext` (A1111's key), or else the flag's name, and `words` are the values there if they are words. Options
with `infotext=None` do not shape the image, or sampling/infotext.py writes them in a form of their own.
"""

import random
import re
from collections.abc import Collection
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from minisd import reading, registry
from minisd.options import (
    GRAPH,
    KERNELS,
    MAX_PIXELS,
    Count,
    Group,
    Model,
    Positive,
    Probability,
    Side,
    default_of,
    flag,
    require,
)

NO_PROMPT = "give --prompt or --prompt_file"
unwritten = partial(flag, infotext=None)
SIDE = "in pixels, a multiple of 8; by default that of --image or --control_image, or the model's own"


class Settings(Group):
    """Sampling"""

    steps: Count = flag(50, "number of denoising steps", also=("num_inference_steps",), infotext="Steps")
    scheduler: str = flag(
        "ddim", "by its name in A1111, diffusers or", listing="schedulers", infotext="Sampler"
    )
    schedule_type: Literal["uniform", "karras", "exponential", "sgm_uniform"] | None = flag(
        None,
        "spacing of the noise levels, for euler, heun, dpmpp and unipc; by default as the model's file says",
        infotext="Schedule type",
        words={
            "Uniform": "uniform",
            "Karras": "karras",
            "Exponential": "exponential",
            "SGM Uniform": "sgm_uniform",
        },  # fmt: skip
    )
    use_karras_sigmas: bool | None = unwritten(None, "--schedule_type karras, or uniform", also=("karras",))
    guidance_scale: float = flag(7.5, "classifier-free guidance; none at 1 or less", infotext="CFG scale")
    negative_prompt: str = unwritten("", "what the images should not show")
    plain_prompt: bool = flag(
        False,
        "read prompts as plain text: no weights, no <lora:...>, and only the first 75 tokens",
        infotext="Emphasis",
        words={"None": True},
    )
    clip_skip: Count = flag(
        1,
        "layer of the text encoder, counted from the last one; of the negative prompt too, as in A1111",
        infotext="Clip skip",
    )
    negative_clip_skip: Count | None = flag(
        None, "that of the negative prompt, if it differs from the default --clip_skip; 1 is as in diffusers"
    )
    lora_dir: Path | None = flag(None, "folder of the LoRAs that prompts name by <lora:NAME:SCALE>")
    eta: Probability | None = flag(
        None, "noise per step, from 0 to 1; by default the scheduler's", infotext="Eta"
    )
    rng: Literal["cpu", "nv"] = flag(
        "cpu",
        "whose noise: that of torch on a CPU, or on an Nvidia GPU (nv), as A1111 has it; on any device",
        infotext="RNG",
        words={"CPU": "cpu", "NV": "nv"},
    )
    width: Side | None = unwritten(None, SIDE)
    height: Side | None = unwritten(None, SIDE)
    strength: float | None = flag(
        None,
        "fraction of the steps that redraw --image; by default 1 with --mask or a model that takes images as "
        "an input, otherwise 0.8",
        infotext="Denoising strength",
    )
    image_guidance_scale: float | None = flag(
        None, "weight of the image in an instruct-pix2pix edit; 1.5 by default", infotext="Image CFG scale"
    )

    def check(self):
        self.scheduler, kind = registry.find_scheduler(self.scheduler)
        karras = {True: "karras", False: "uniform", None: None}[self.use_karras_sigmas]
        asked = [
            (f"--{'' if self.use_karras_sigmas else 'no-'}use_karras_sigmas", karras),
            (f"--schedule_type {self.schedule_type}", self.schedule_type),
            (f"--scheduler, whose name ends in {kind}", kind),
        ]
        asked = [(flag, value) for flag, value in asked if value]
        for (one, value), (other, another) in pairwise(asked):
            require(value == another, f"{one} excludes {other}")
        self.schedule_type = asked[0][1] if asked else None
        require(not (self.plain_prompt and self.lora_dir), "--plain_prompt takes no LoRA from --lora_dir")
        require(self.strength is None or 0 < self.strength <= 1, "--strength must be above 0, and at most 1")
        left = self.steps - self.first_step
        require(left > 0, f"--strength {self.strength} leaves none of the {self.steps} steps")

    @property
    def first_step(self) -> int:
        """The number of steps that are left out at the beginning, with an initial image."""
        return 0 if self.strength is None else self.steps - int(self.steps * self.strength)


class Drawing(Settings):
    """Images"""

    NEEDS = {
        "image": "strength mask image_guidance_scale",
        "image_prompt": "image_encoder",
        "controlnet": "control_preprocess control_start control_end guess_mode",
    }
    prompt: list[str] = unwritten([], "what the images should show; one image for each prompt")
    seed: int = flag(
        0, "seed of the first image, or -1 to draw one; the next one has seed + 1, and so on", infotext="Seed"
    )
    num_images: Count = unwritten(1, "number of images for each prompt")
    batch_size: Count | None = unwritten(
        None, "images generated at once; by default 4 on a GPU and 1 on a CPU"
    )
    image: list[Path] = flag(
        [], "initial images (img2img), or images to edit: one for all, one for each, or a folder"
    )
    mask: list[Path] = flag([], "redraw only where this is white (inpainting): one for all, or one for each")
    max_pixels: Count = unwritten(MAX_PIXELS, "refuse input images with more pixels than this")
    image_prompt: list[Path] = flag(
        [], "images as prompts, one for each IP-Adapter among --adapter", also=("ip_adapter_image",)
    )
    image_encoder: str | None = flag(
        None,
        "what sees --image_prompt, a CLIPVisionModelWithProjection of transformers: a folder or hub id; by "
        "default the folder image_encoder beside the adapter",
    )
    controlnet: list[str] = flag(
        [], "ControlNets or T2I-Adapters, PATH or PATH:SCALE, each with its --control_image"
    )
    control_image: list[Path] = flag([], "conditioning images, one for each --controlnet")
    control_preprocess: list[Literal["canny", "none"]] = flag(
        [], "canny takes the edges of --control_image; one for all, or one for each; none by default"
    )
    control_start: list[float] = flag(
        [], "fraction of the steps before a ControlNet acts; one for all, or one for each; 0 by default"
    )
    control_end: list[float] = flag(
        [], "fraction of the steps after which it no longer acts; one for all, or one for each; 1 by default"
    )
    guess_mode: bool = flag(False, "apply ControlNets to the conditional branch only, and less to details")

    def check(self):
        self.seed = random.randrange(2**32) if self.seed == -1 else self.seed
        guided = self.image_guidance_scale is None or self.guidance_scale > 1
        require(guided, f"--image_guidance_scale has no effect at --guidance_scale {self.guidance_scale:g}")
        nets, images = len(self.controlnet), len(self.control_image)
        require(nets == images, f"{nets} --controlnet and {images} --control_image: give one for each")
        for name in ("control_preprocess", "control_start", "control_end"):
            count = len(getattr(self, name))
            require(count in (0, 1, nets), f"{count} --{name} and {nets} --controlnet: one, or one for each")
        for _, start, end in self.control_ranges():
            problem = f"--control_start {start:g} must be below --control_end {end:g}, and both from 0 to 1"
            require(0 <= start < end <= 1, problem)

    def control_ranges(self) -> list[tuple[str, float, float]]:
        """(preprocessing, start, end) of each ControlNet, the latter as fractions of the steps."""
        values = (self.control_preprocess or ["none"], self.control_start or [0.0], self.control_end or [1.0])
        count = len(self.controlnet)
        return list(zip(*(v * count if len(v) == 1 else v for v in values), strict=True))


class Editing(Group):
    """Concepts to erase, in closed form"""

    NEEDS = {"erase_concepts": "guide_concepts preserve_concepts lamb"}
    erase_concepts: list[str] = flag([], "prompts that the model should draw as --guide_concepts")
    guide_concepts: list[str] = flag(
        [], "prompts to draw instead: one for all, or one for each; '' by default"
    )
    preserve_concepts: list[str] = flag([], "prompts that should stay as they are, the more the better")
    lamb: Positive = flag(0.5, "how much all else should stay as it is")


class Loading(Editing, Model):
    """Adapters, device and precision"""

    adapter: list[str] = flag([], "PATH or PATH:SCALE of an adapter, or of a training run's output folder")
    device: str | None = unwritten(None, "cuda, cpu, ...; by default cuda if there is a GPU")
    kernels: KERNELS = unwritten("auto", "attention and norm kernels; auto is triton where it is faster")
    graph: GRAPH = unwritten("auto", "the UNet as a CUDA graph; auto uses one where it gives the same bits")
    compile: bool = unwritten(False, "compile the UNet with torch.compile, which takes a minute")
    deterministic: bool = flag(
        False, "the same command gives the same bytes on the same GPU; --kernels auto is then torch"
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = flag(
        "auto",
        "precision; auto is fp16 on a GPU, bf16 on a CPU that is faster in it, else fp32, and for --export "
        "that of the model's files",
    )


class Sample(Drawing, Loading):
    """Input and output"""

    EXCLUDES = {"prompt": "prompt_file"}
    prompt_file: Path | None = unwritten(None, "a text file with a prompt on each line")
    like: Path | None = unwritten(None, "take the settings of this PNG where no flag is given")
    csv: Path | None = unwritten(None, "a table whose header names flags: images of each row, and a sheet")
    export: Path | None = unwritten(
        None,
        "write the model with --adapter merged in, and concepts erased, to a folder or .safetensors file; "
        "needs no --prompt",
    )
    output: Path = unwritten(Path("samples"), "folder for the images, or the name of a .png file")
    overwrite: bool = unwritten(False, "replace the files that --output and --export name, if they are there")
    heatmap: list[str] = unwritten([], "words of the prompt: beside each image, a PNG of where they act")
    preview: Count | None = unwritten(None, "steps between previews, written to preview.png in that folder")

    def check(self):
        draws = self.prompt or self.prompt_file
        require(draws or self.export or self.may_lack_text(), NO_PROMPT)
        require(not (self.export and self.csv), "--export writes one model: it cannot go with --csv")
        image = self.output.suffix.lower() in (".jpg", ".jpeg", ".webp")
        require(not image, f"--output {self.output}: a folder, or the name of a .png file")
        # Allowed with --export alone; the tiny model's defaults set steps and guidance_scale.
        used = {"export", "steps", "guidance_scale", *(f.name for f in fields(Loading))}
        name = None if draws or not self.export else unused(self, used)
        require(name is None, f"--{name} draws nothing without --prompt")
        for name, path in self.replaced():
            require(self.overwrite, f"--{name} {path} exists: --overwrite replaces it")

    def replaced(self) -> list[tuple[str, Path]]:
        """The flag and the path of each file that is there, and that this run would write."""
        named = [("export", self.export)] if self.export else []
        if is_png(self.output) and (self.prompt or self.prompt_file or not self.export):
            end = ("(-heat)?" if self.heatmap else "") + re.escape(self.output.suffix)
            numbered = re.compile(re.escape(self.output.stem) + r"(-\d+)?" + end)
            beside = sorted(p for p in self.output.parent.glob("*") if numbered.fullmatch(p.name))
            named += [("output", path) for path in (self.output, *beside)]
        return [
            (name, path) for name, path in named if path.is_file() or path.is_dir() and any(path.iterdir())
        ]

    def may_lack_text(self) -> bool:
        """Whether the model is one of pixels, which takes no prompt, or on the hub, so that it may be one."""
        from minisd.formats import diffusers

        path = Path(self.model)
        return diffusers.is_pixels(path) or not path.exists()

    def read_prompts(self) -> list[str]:
        """The prompts of the command line, or of the file. ValueError if that cannot be read."""
        if self.prompt_file:
            return reading.lines(self.prompt_file, "prompt_file")
        return self.prompt or ([] if self.export else [""])  # "" is for a model without text


class Page(Settings, Loading):
    """Page"""

    runs: Path = flag(Path("."), "show the runs in this folder, down to three levels, and their adapters")
    output: Path = flag(Path("samples"), "folder for the images")
    host: str = flag("127.0.0.1", "address of the page, which other machines never reach; or localhost")
    port: Count = flag(7860, "port of the page")

    def check(self):
        problem = f"--host {self.host}: the page is for this machine alone; from another one, use ssh -L"
        require(self.host in ("127.0.0.1", "localhost"), problem)
        require(self.port < 2**16, f"--port {self.port}: the largest is 65535")
        require(self.runs.is_dir(), f"--runs {self.runs} is not a folder")
        require(not is_png(self.output), f"--output {self.output}: the page needs a folder")


def is_png(output: Path) -> bool:
    """Whether --output names a file, not a folder."""
    return output.suffix.lower() == ".png"


def refuse_unused(options: Group, model) -> None:
    """ValueError, naming the flag, if one has no effect on the model, whose `flags` are those that it takes.
    If they are None, it takes them all, and needs a prompt."""
    if model.flags is None:
        texts = getattr(options, "prompt", True), getattr(options, "prompt_file", None)
        if not any(texts) and not getattr(options, "export", None):
            raise ValueError(NO_PROMPT)
    elif name := unused(options, model.flags):
        raise ValueError(f"--{name} has no effect: {model.name} is a model of pixels, without text")


def unused(options: Group, used: Collection[str]) -> str | None:
    """The first flag that is not among the `used` ones, and yet is not at its default."""
    names = (f.name for f in fields(options) if getattr(options, f.name) not in (default_of(f), [""]))
    return next((name for name in names if name not in used), None)


class Job(NamedTuple):
    """One run of sample.py: the command line, or one row of --csv."""

    options: Sample
    row: dict[str, list[str]]  # the row's values by flag
    where: str  # the row's name, with which error messages begin


def split_scale(adapter: str) -> tuple[str, float]:
    """(path, scale) of PATH or PATH:SCALE."""
    path, colon, scale = adapter.rpartition(":")
    try:
        return (path, float(scale)) if colon else (adapter, 1.0)
    except ValueError:
        return adapter, 1.0  # the colon belongs to the path
