"""A checkpoint in memory: what every format is read into and written from."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minisd.models.controlnet import ControlNet, ControlNetConfig
from minisd.models.text import TextConfig, TextEncoder
from minisd.models.unet import UNet, UNetConfig
from minisd.models.unet2d import UNet2D, UNet2DConfig
from minisd.models.vae import AutoencoderKL, VAEConfig

Config = UNetConfig | VAEConfig | TextConfig | ControlNetConfig | UNet2DConfig

PARTS = ("unet", "vae", "text_encoder")  # of a Stable Diffusion; the other networks come by themselves
MODULES: dict[str, type[nn.Module]] = {
    "unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder, "controlnet": ControlNet,
    "unet2d": UNet2D,
}  # fmt: skip

# By the number of channels that the UNet takes.
PIPELINES = {
    4: "StableDiffusionPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}

TOKENIZER = Path(__file__).resolve().parent.parent / "tokenizer"  # CLIP's vocabulary

# What SD v1.x was trained with and published with.
SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}


@dataclass(kw_only=True)
class Checkpoint:
    """Everything that a format holds. Only the parts that were asked for are in `tensors`."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextConfig
    tensors: dict[str, dict[str, Tensor]]  # part -> native name -> tensor, memory-mapped
    scheduler: dict  # what scheduler_config.json says
    tokenizer: Path  # folder with vocab.json and merges.txt, or with tokenizer.json
    pipeline: str  # class name in model_index.json


class _NoInit(TorchFunctionMode):
    """Leaves new parameters as they are. The meta device has nothing to draw, yet the first draw there costs
    1.5 seconds of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_built: dict[tuple[str, str], nn.Module] = {}


def build(part: str, config: Config, source: Path | str) -> nn.Module:
    """The part's module on the meta device. ValueError, naming `source`, if it cannot be built."""
    if module := _built.pop((part, repr(config)), None):
        return module
    try:
        with torch.device("meta"), _NoInit():
            return MODULES[part](config)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source}: no {part} can be built from its config: {reason}") from error


def native_shapes(part: str, config: Config, source: Path | str) -> dict[str, torch.Size]:
    """Native name -> shape of every tensor of a part. The next `build` of it takes the module made for this:
    making a full-size UNet takes as long as mapping its file."""
    module = _built[part, repr(config)] = build(part, config, source)
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> nn.Module:
    """Give a module (on the meta device) these tensors: not copied, so still memory-mapped if they were.

    ValueError, naming `source` and the names, unless names and shapes are exactly the module's.
    """
    check(tensors, {name: tensor.shape for name, tensor in module.state_dict().items()}, source)
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: Path | str) -> None:
    """ValueError, naming `source` and some names, unless `tensors` has exactly these names and shapes."""
    check_names(tensors, shapes, source)
    wrong = [name for name in shapes if tensors[name].shape != shapes[name]]
    if wrong:
        first = f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}, not {tuple(shapes[wrong[0]])}"
        raise ValueError(f"{source}: {len(wrong)} tensors of another shape: {first}")


def check_names(found: Collection[str], expected: Collection[str], source: Path | str) -> None:
    """ValueError, naming `source`, counting and giving some names, unless both are the same."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    problems = [f"{len(names)} {kind} ({some(names)})"
                for kind, names in (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"{source}: {' and '.join(problems)} of {len(expected)} tensors")


def as_matrix(tensor: Tensor) -> Tensor:
    """A view of a 1x1 convolution's weight (o, i, 1, 1) as a linear layer's (o, i)."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def some(names: Collection[str]) -> str:
    """The first three of some names."""
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def is_standard_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer folder holds CLIP's own vocabulary and nothing more."""
    return folder.resolve() == TOKENIZER or _vocabulary(folder) == _vocabulary(TOKENIZER)


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[str]] | None:
    """Entries and merges of a tokenizer folder; None if it has none that can be read."""
    try:
        if (folder / "vocab.json").is_file():
            entries = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            added = folder / "added_tokens.json"
            entries |= json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
        else:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            entries, merges = content["model"]["vocab"], content["model"]["merges"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            entries |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entries, merges
