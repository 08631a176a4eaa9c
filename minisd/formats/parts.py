"""The parts of a Stable Diffusion in memory: what every format is read into and written from."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minisd import files, reading
from minisd.models.controlnet import ControlNet, ControlNetConfig
from minisd.models.text import TextConfig, TextEncoder
from minisd.models.tokenizer import Tokenizer
from minisd.models.unet import UNet, UNetConfig
from minisd.models.unet2d import UNet2D, UNet2DConfig
from minisd.models.vae import AutoencoderKL, VAEConfig

Config = UNetConfig | VAEConfig | TextConfig | ControlNetConfig | UNet2DConfig

PARTS = ("unet", "vae", "text_encoder")  # of a Stable Diffusion; further networks have their own files
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

# The settings with which SD v1.x was trained and published.
SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
    "trained_betas": None,
}  # fmt: skip


@dataclass(kw_only=True)
class PipelineParts:
    """The contents of a Stable Diffusion's files. After loading, the networks' tensors are memory-mapped."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    scheduler: dict[str, Any]  # the content of scheduler_config.json
    tokenizer: Path  # folder with vocab.json and merges.txt, or with tokenizer.json
    pipeline_class: str  # the class in diffusers that runs it, from model_index.json

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {part: getattr(self, part) for part in PARTS}


class _NoInit(TorchFunctionMode):
    """Skips the initialization of parameters. On the meta device they have no values, yet the first random
    draw there costs 1.5 seconds of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build(part: str, config: Config, source: Path | str) -> nn.Module:
    """Build a part's network on the meta device. ValueError, naming `source`, if that fails."""
    return on_meta(partial(MODULES[part], config), f"{source}: no {part} can be built from its config")


def on_meta(make: Callable[[], nn.Module], problem: str) -> nn.Module:
    """make(), a network on the meta device. ValueError, which begins with `problem`, if that fails."""
    try:
        with torch.device("meta"), _NoInit():
            return make()
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{problem}: {files.first_line(error)}") from error


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> nn.Module:
    """Give a network on the meta device its tensors, without a copy: memory-mapped tensors stay so. A linear
    layer (o, i) also takes the weight of a 1x1 convolution (o, i, 1, 1). Return the network.

    ValueError, naming `source` and the tensors, unless names and shapes are exactly the network's.
    """
    expected = network.state_dict()
    check_names(tensors, expected, source)
    state = {
        name: t[:, :, 0, 0] if t.shape[2:] == (1, 1) and expected[name].ndim == 2 else t
        for name, t in tensors.items()
    }
    wrong = [name for name in expected if state[name].shape != expected[name].shape]
    if wrong:
        first = f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(expected[wrong[0]].shape)}"
        raise ValueError(f"{source}: {len(wrong)} tensors of another shape: {first}")
    whole = [n for n, t in expected.items() if t.is_floating_point() and not state[n].is_floating_point()]
    if whole:
        raise ValueError(f"{source}: {whole[0]} holds {files.DTYPES[state[whole[0]].dtype]}, not weights")
    network.load_state_dict(state, strict=True, assign=True)
    return network


def check_names(names: Collection[str], expected: Collection[str], source: Path | str) -> None:
    """Raise a ValueError, naming `source` and the first names, if any names are missing or unknown."""
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected]
    problems = [f"{len(these)} {kind} ({first_names(these)})"
                for kind, these in (("missing", missing), ("unknown", unknown)) if these]  # fmt: skip
    if problems:
        raise ValueError(f"{source}: {' and '.join(problems)} of {len(expected)} tensors")


def first_names(names: Collection[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def is_standard_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer folder has exactly CLIP's own vocabulary."""

    def vocabulary(folder: Path) -> tuple[dict[str, int], list]:
        bpe = Tokenizer(folder, 77).bpe
        return bpe.get_vocab(), json.loads(bpe.to_str())["model"]["merges"]

    return reading.real(folder) == TOKENIZER or vocabulary(folder) == vocabulary(TOKENIZER)
