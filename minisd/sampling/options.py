"""The options of sample.py. Standard library only, like config.py."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from minisd import registry
from minisd.options import KERNELS, Group, Model, flag, require
from minisd.sampling import sweep


@dataclass(kw_only=True)
class Pictures(Group):
    """Pictures in"""

    image: list[Path] = flag([], "begin with it, or edit it: one for all prompts, one for each, or a folder")
    strength: float | None = flag(
        None,
        "the part of the steps that --image goes through; 0.8 alone, 1 with --mask or a model that sees it",
    )
    mask: list[Path] = flag([], "redraw only the white part of --image: one for all, or one for each")
    image_guidance_scale: float | None = flag(
        None, "how far an edit by an instruct-pix2pix model stays with --image; 1.5 by default"
    )
    controlnet: list[str] = flag([], "ControlNets, PATH or PATH:SCALE, each with its --control_image")
    control_image: list[Path] = flag([], "what they go by; one for each")
    control_preprocess: list[Literal["canny", "none"]] = flag(
        [], "canny draws the edges of --control_image; one for all, or one for each"
    )
    control_start: list[float] = flag(
        [], "from which part of the steps on; 0 by default; one or one for each"
    )
    control_end: list[float] = flag([], "up to which part of the steps; 1 by default; one or one for each")
    guess_mode: bool = flag(False, "ControlNets steer the part with the prompt alone, and fine detail less")

    def check(self):
        for name in ("strength", "mask", "image_guidance_scale"):
            require(getattr(self, name) in (None, []) or self.image, f"--{name} needs --image")
        require(self.strength is None or 0 < self.strength <= 1, "--strength must be above 0, and at most 1")
        nets, hints = len(self.controlnet), len(self.control_image)
        require(nets == hints, f"{nets} --controlnet and {hints} --control_image: give one for each")
        for name in ("control_preprocess", "control_start", "control_end"):
            given = len(getattr(self, name))
            require(nets or not given, f"--{name} needs --controlnet")
            require(given in (0, 1, nets), f"{given} --{name} and {nets} --controlnet: one, or one for each")
        require(nets or not self.guess_mode, "--guess_mode needs --controlnet")
        ranges = zip(*(self.for_each(name) for name in ("control_start", "control_end")), strict=True)
        for start, end in ranges:
            require(
                0 <= start < end <= 1,
                f"--control_start {start:g} must be below --control_end {end:g}, and both from 0 to 1",
            )

    def for_each(self, name: str) -> list:
        """A flag's value for each ControlNet."""
        default = {"control_preprocess": "none", "control_start": 0.0, "control_end": 1.0}[name]
        given = getattr(self, name) or [default]
        return given * len(self.controlnet) if len(given) == 1 else given


@dataclass(kw_only=True)
class Sample(Model, Pictures):
    """Sampling"""

    prompt: list[str] = flag([], "what to draw; several draw several")
    prompt_file: Path | None = flag(None, "a text file with a prompt on each line")
    negative_prompt: str = flag("", "what to stay away from")
    plain_prompt: bool = flag(False, "prompts are mere text: no weights, no <lora:...>, 75 tokens at most")
    clip_skip: int = flag(1, "which layer of the text encoder counts, from the end, as in A1111; 1 is none")
    lora_dir: Path | None = flag(
        None, "where <lora:NAME:SCALE> in a prompt is looked up: files, or runs' folders"
    )
    adapter: list[str] = flag([], "PATH or PATH:SCALE of a file, or of the folder a training run left")
    scheduler: str = flag("ddim", f"how the noise is removed: {', '.join(registry.names('schedulers'))}")
    karras: bool | None = flag(
        None,
        "noise levels of Karras et al., for the euler and dpmpp schedulers; what the model says by default",
    )
    steps: int = flag(50, "steps of it", also=("num_inference_steps",))
    guidance_scale: float = flag(7.5, "how far to follow the prompt; 1 and below run without guidance")
    eta: float | None = flag(
        None, "noise that each step adds again, from 0 to 1; each scheduler's own by default"
    )
    seed: int = flag(0, "of the first picture; the next have seed + 1, ...")
    num_images: int = flag(1, "pictures of each prompt")
    width: int | None = flag(
        None, "in pixels, a multiple of 8; as --image or --control_image by default, or the model's own"
    )
    height: int | None = flag(
        None, "in pixels, a multiple of 8; as --image or --control_image by default, or the model's own"
    )
    like: Path | None = flag(None, "draw as this PNG was drawn, but for the other flags given")
    csv: Path | None = flag(None, "a table whose header names flags: draw each row, and a labelled sheet")
    batch_size: int | None = flag(
        None, "pictures drawn at the same time; 4, but 1 on a CPU, where none then changes another's last bit"
    )
    export: Path | None = flag(
        None,
        "write the model with --adapter merged in, to a folder or a .safetensors file; needs no --prompt",
    )
    output: Path = flag(Path("samples"), "folder for the pictures, or the name of a .png file")
    preview: int | None = flag(None, "every so many steps, write what it is about to be to preview.png there")
    device: str | None = flag(None, "cuda, cpu, ...; cuda by default where there is one")
    kernels: KERNELS = flag("auto", "who computes attention and norms; auto is triton where it was measured")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = flag(
        "auto", "auto is fp16 on cuda and fp32 elsewhere, and as it was in what --export writes"
    )

    def check(self):
        require(not (self.prompt and self.prompt_file), "give --prompt or --prompt_file")
        drawn = self.prompt or self.prompt_file
        require(drawn or self.export, "give --prompt or --prompt_file")
        if not drawn:
            self.only_exports()
        require(not (self.export and self.csv), "--export is of one model: it cannot go with --csv")
        self.positive("steps", "num_images", "batch_size", "clip_skip", "preview")
        require(not (self.plain_prompt and self.lora_dir), "--plain_prompt takes no LoRA from --lora_dir")
        for name in ("width", "height"):
            side = getattr(self, name)
            require(side is None or side > 0 and side % 8 == 0, f"--{name} {side}: a positive multiple of 8")
        require(
            not self.strength or int(self.steps * self.strength) > 0,
            f"--strength {self.strength} leaves none of the {self.steps} steps",
        )
        self.scheduler = registry.find("schedulers", self.scheduler)
        require(self.eta is None or 0 <= self.eta <= 1, "--eta must be from 0 to 1")
        require(
            self.image_guidance_scale is None or self.guidance_scale > 1,
            f"--image_guidance_scale has no effect at --guidance_scale {self.guidance_scale:g}",
        )

    def only_exports(self) -> None:
        """ValueError naming a flag that says how to draw. The tiny model has defaults of its own for two."""
        meant = {"export", "adapter", "device", "dtype", "kernels", "steps", "guidance_scale", "csv"}
        for f in fields(self):
            default = f.default_factory() if f.default is MISSING else f.default
            of_model = f.name in Model.__dataclass_fields__ or f.name in meant
            require(
                of_model or getattr(self, f.name) == default, f"--{f.name} draws nothing without --prompt"
            )

    @property
    def prompts(self) -> list[str]:
        """Those of the command line, or of the file. ValueError if that cannot be read."""
        if not self.prompt_file:
            return self.prompt
        try:
            lines = self.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"--prompt_file {self.prompt_file}: {e}") from None
        return [line.strip() for line in lines if line.strip()]


class Job(NamedTuple):
    """What sample.py draws at once: all, or a row of --csv."""

    options: Sample
    row: sweep.Row
    where: str  # what its errors begin with


def split_scale(adapter: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE."""
    path, colon, scale = adapter.rpartition(":")
    try:
        return (Path(path), float(scale)) if colon else (Path(adapter), 1.0)
    except ValueError:
        return Path(adapter), 1.0  # the colon belongs to the path
