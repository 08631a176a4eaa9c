"""The diffusers layout: a folder with model_index.json and a folder for each part.

Its names of tensors are the native ones, but for the attention of a VAE or UNet2D. Releases up to 0.16 know
only the names of 2022, later ones read both: a network is written with the names that its file had, or with
those of 2022 if it was not read from such a file.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from minisd import files, reading
from minisd.formats import config_json, parts
from minisd.formats.parts import PARTS, PipelineParts
from minisd.models.unet2d import UNet2D
from minisd.options import require

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def matches(path: Path) -> bool:
    return (path / INDEX).is_file() or all((path / part / "config.json").is_file() for part in PARTS)


def load(path: Path, *, variant: str | None = None, ema: bool = False) -> PipelineParts:
    """Read a folder.

    `variant` is the `fp16` in `diffusion_pytorch_model.fp16.safetensors`; parts without such a file are read
    from their plain one, if any part has it. ValueError, naming the folder or file, if anything is missing or
    is not of SD v1.x.
    """
    require(not ema, f"{path} is a folder, which has one set of weights: choose EMA by its variant")
    index = reading.read_json(path / INDEX) if (path / INDEX).is_file() else {}
    for name in ("text_encoder_2", "text_encoder_3", "transformer"):
        if index.get(name) not in (None, [None, None]):
            raise ValueError(f"{path} has a {name}: this is SDXL, SD3 or later; minisd is for SD v1.x")
    require(not is_pixels(path), f"{path} is a model of pixels, without text, not Stable Diffusion")
    if absent := [part for part in PARTS if not (path / part / "config.json").is_file()]:
        raise ValueError(f"{path} has no {absent[0]}/config.json")
    weights = choose({part: _names(path / part) for part in PARTS}, variant, path)
    networks = {part: load_part(path / part, part, weights[part][0]) for part in PARTS}
    width, encoded = networks["unet"].config.cross_attention_dim, networks["text_encoder"].config.hidden_size
    problem = f"{path}: the UNet takes text states of width {width}, the text encoder gives {encoded}"
    require(width == encoded, problem)
    vocabulary = set(_names(path / "tokenizer"))
    if "tokenizer.json" not in vocabulary and not {"vocab.json", "merges.txt"} <= vocabulary:
        raise ValueError(f"{path / 'tokenizer'} has neither vocab.json and merges.txt nor tokenizer.json")
    scheduler = config_json.read_scheduler(reading.read_json(path / SCHEDULER), path / SCHEDULER)
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    return PipelineParts(**networks, scheduler=scheduler, tokenizer=path / "tokenizer", pipeline_class=kind)


def save(folder: Path, pipeline: PipelineParts) -> None:
    """Write a folder, whole or not at all. Other files in an existing folder stay there."""
    index = {
        "_class_name": pipeline.pipeline_class, "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    # Other programs may need vocab.json and merges.txt, which newer programs no longer write.
    tokenizer = parts.TOKENIZER if parts.is_standard_tokenizer(pipeline.tokenizer) else pipeline.tokenizer
    _save(folder, pipeline.networks, pipeline.scheduler, index, tokenizer)


def is_pixels(path: Path) -> bool:
    """Whether a folder holds a model of pixels: a UNet2D and nothing else (DDPMPipeline, DDIMPipeline)."""
    index = reading.read_json(path / INDEX) if (path / INDEX).is_file() else {}
    parts = {name: kind for name, kind in index.items() if not name.startswith("_")}
    return parts.keys() == {"unet", "scheduler"} and parts["unet"] == ["diffusers", "UNet2DModel"]


def load_ddpm(path: Path, variant: str | None = None) -> tuple[UNet2D, dict[str, Any]]:
    """Return the network and the content of scheduler_config.json in the folder of a model of pixels. Folders
    of 2022 have all files at the top."""
    unet, source = path / "unet", path / SCHEDULER
    if not unet.is_dir():
        unet, source = path, path / source.name
    weights = choose({"unet2d": _names(unet)}, variant, unet)["unet2d"][0]
    return load_part(unet, "unet2d", weights), config_json.read_scheduler(reading.read_json(source), source)


def save_ddpm(folder: Path, network: UNet2D, scheduler: dict[str, Any]) -> None:
    """Write a DDPMPipeline's folder, as `save` does."""
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    _save(folder, {"unet": network}, scheduler, index)


def _save(
    folder: Path,
    networks: Mapping[str, nn.Module],
    scheduler: dict[str, Any],
    index: dict[str, Any],
    tokenizer: Path | None = None,
) -> None:
    index |= {
        "_diffusers_version": config_json.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler.get("_class_name", "PNDMScheduler")],
    }
    with files.new_folder(folder, keep=True) as temporary:
        for name, network in networks.items():
            save_part(temporary / name, network)
        files.write_json(temporary / SCHEDULER, scheduler)
        for name in TOKENIZER_FILES:
            if tokenizer and (tokenizer / name).is_file():
                files.write_bytes(temporary / "tokenizer" / name, (tokenizer / name).read_bytes())
        files.write_json(temporary / INDEX, dict(sorted(index.items())))


# --- One part --------------------------------------------------------------------------------------------


def load_part(folder: Path, part: str, weights: str = "") -> nn.Module:
    """Read one network from its folder, such as `unet/`. `weights` is a file of weights there or an index, by
    default the plain one."""
    weights = weights or choose({part: _names(folder)}, None, folder)[part][0]
    network = parts.build(part, config_json.read(folder, part), folder / "config.json")
    listed = {weights}
    if weights.endswith(".json"):
        index = reading.read_json(folder / weights).get("weight_map")
        listed = {str(name) for name in index.values()} if isinstance(index, dict) else set()
        absent = sorted(listed - {*_names(folder)})
        if absent or not listed:
            absent = parts.first_names(absent) or "it lists none"
            raise ValueError(f"{folder / weights} lists files that are not there: {absent}")
    tensors = {name: tensor for file in sorted(listed) for name, tensor in files.read(folder / file).items()}
    network.new_attention = any(_attention(name, NEW_ATTENTION) != name for name in tensors)
    return parts.fill(network, native(part, tensors), folder / weights)


def save_part(folder: Path, network: nn.Module) -> None:
    """Write config.json and the weights of one network, whole or not at all."""
    names = {kind: name for name, kind in parts.MODULES.items()}
    # fully_shard makes subclasses
    part = next(names[kind] for kind in type(network).__mro__ if kind in names)
    table = {} if getattr(network, "new_attention", False) else NEW_ATTENTION
    with files.new_folder(folder, keep=True) as temporary:
        tensors = {_attention(name, table): t for name, t in network.state_dict().items()}
        files.write(temporary / f"{_stem(part)}.safetensors", tensors)
        config_json.write(temporary, part, network.config)


# Names of the attention layers in a VAE or UNet2D: of 2022 -> native, and native -> of 2022.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NEW_ATTENTION = {new: old for old, new in OLD_ATTENTION.items()}


def _attention(name: str, table: Mapping[str, str]) -> str:
    """Rename a tensor by a table, if it is of the attention of a VAE or UNet2D."""
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(.+)(\.weight|\.bias)", name)
    return match[1] + table.get(match[2], match[2]) + match[3] if match else name


def native(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the names that older and newer releases use in this layout."""

    def rename(name: str) -> str:
        if part == "text_encoder" and not name.startswith("text_model."):
            return f"text_model.{name}"
        return _attention(name, OLD_ATTENTION)

    # The position_ids are 0 to 76; in files that were cast to half precision they are wrong.
    return {rename(name): t for name, t in tensors.items() if not name.endswith("embeddings.position_ids")}


# --- File names ------------------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _stem(part: str) -> str:
    return "model" if part == "text_encoder" else "diffusion_pytorch_model"


def variants(names: Collection[str], part: str) -> dict[str | None, str]:
    """Return variant (None: plain) -> its file of weights, or its index of several, among a folder's file
    names. A .safetensors file is preferred to a .bin, and one file to several."""
    pattern = re.compile(
        rf"(?:pytorch_)?{_stem(part)}(?:\.([^.-]+))?\.(safetensors|bin)(\.index(?:\.([^.-]+))?\.json)?"
    )
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    weights: dict[str | None, str] = {}
    for match in sorted(matches, key=lambda match: (match[2] == "bin", match[3] is not None)):
        weights.setdefault(match[1] or match[4], match[0])
    return weights


def choose(
    names: Mapping[str, Collection[str]], variant: str | None, source: Path | str
) -> dict[str, list[str]]:
    """Return part -> its file of weights, or an index and the files that it lists. `names` is part -> the
    file names in its folder; `source` is the folder of these folders, or the folder of the only part.

    A part without the variant gets its plain weights, or the only ones it has, if another part has the
    variant. ValueError, listing the variants, if no part has it.
    """
    weights = {part: variants(names[part], part) for part in names}
    known = {name for of_part in weights.values() for name in of_part}
    if variant and variant not in known:
        listed = ", ".join(sorted(name or "plain weights" for name in known)) or "no weights"
        raise ValueError(f"{source} has no variant {variant!r}; there are {listed}")
    chosen = {}
    for part, of_part in weights.items():
        folder = f"{source}/{part}" if len(names) > 1 else source
        require(of_part, f"{folder} has no {_stem(part)}.safetensors")
        file = of_part.get(variant) or of_part.get(None)
        if not file and len(of_part) > 1:
            raise ValueError(f"{folder} has no plain weights; there are {', '.join(sorted(of_part))}")
        file = file or next(iter(of_part.values()))
        chosen[part] = [file]
        if file.endswith(".json"):  # the files have the same name, with -00001-of-00002 in it
            words = {*file.split(".")} - {"index", "json"}
            chosen[part] += [n for n in names[part] if {*re.sub(r"-\d+-of-\d+", "", n).split(".")} == words]
    return chosen
