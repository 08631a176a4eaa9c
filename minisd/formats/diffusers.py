"""A folder with model_index.json and a folder for each part: the layout of diffusers.

Native names are this layout's names.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from minisd import files
from minisd.formats import config_json, parts
from minisd.formats.parts import PARTS, PipelineParts
from minisd.models.unet2d import UNet2D

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def matches(path: Path) -> bool:
    path = Path(path)
    return (path / INDEX).is_file() or all((path / part / "config.json").is_file() for part in PARTS)


def load(path: Path, *, variant: str | None = None, ema: bool = False) -> PipelineParts:
    """Read a folder.

    `variant` is the `fp16` in `diffusion_pytorch_model.fp16.safetensors`; a part that has no such file gives
    its plain one, as long as another part has it. ValueError, naming the folder or file, if anything is
    missing or is not of SD v1.x.
    """
    path = Path(path)
    if ema:
        raise ValueError(f"{path} is a folder, which holds one set of weights: ask for EMA by its variant")
    index = files.read_json(path / INDEX) if (path / INDEX).is_file() else {}
    for name in ("text_encoder_2", "text_encoder_3", "transformer"):
        if index.get(name) not in (None, [None, None]):
            raise ValueError(f"{path} has a {name}: this is SDXL, SD3 or later; minisd is for SD v1.x")
    if index.get("_class_name") == "DDPMPipeline":
        raise ValueError(f"{path} is a model of pixels without text (DDPMPipeline), not Stable Diffusion")
    if absent := [part for part in PARTS if not (path / part / "config.json").is_file()]:
        raise ValueError(f"{path} has no {absent[0]}/config.json")
    weights = choose({part: _names(path / part) for part in PARTS}, variant, path)
    networks = {part: _load(path / part, part, weights[part][0]) for part in PARTS}
    taken, given = networks["unet"].config.cross_attention_dim, networks["text_encoder"].config.hidden_size
    if taken != given:
        raise ValueError(
            f"{path}: the UNet takes text states of width {taken}, the text encoder gives {given}"
        )
    vocabulary = set(_names(path / "tokenizer"))
    if "tokenizer.json" not in vocabulary and not {"vocab.json", "merges.txt"} <= vocabulary:
        raise ValueError(f"{path / 'tokenizer'} has neither vocab.json and merges.txt nor tokenizer.json")
    return PipelineParts(
        **networks,
        scheduler=_read_scheduler(path),
        tokenizer=path / "tokenizer",
        pipeline_class=str(index.get("_class_name", "StableDiffusionPipeline")),
    )


def save(folder: Path, pipeline: PipelineParts) -> None:
    """Write a folder, whole or not at all. Other files of an existing folder stay there."""
    index = {
        "_class_name": pipeline.pipeline_class,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    # Other programs may need the two plain files of CLIP's vocabulary, which newer ones no longer write.
    tokenizer = parts.TOKENIZER if parts.is_standard_tokenizer(pipeline.tokenizer) else pipeline.tokenizer
    _save(folder, pipeline.networks, pipeline.scheduler, index, tokenizer)


def load_ddpm(path: Path) -> tuple[UNet2D, dict[str, Any]]:
    """The network and the content of scheduler_config.json of a DDPMPipeline's folder."""
    path = Path(path)
    return load_part(path / "unet", "unet2d"), _read_scheduler(path)


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


def _read_scheduler(path: Path) -> dict[str, Any]:
    return config_json.read_scheduler(files.read_json(path / SCHEDULER), path / SCHEDULER)


# --- One part --------------------------------------------------------------------------------------------


def load_part(folder: Path, part: str, variant: str | None = None) -> nn.Module:
    """The network in a folder of its own (`unet/` and its like, or a VAE by itself)."""
    folder = Path(folder)
    return _load(folder, part, choose({part: _names(folder)}, variant, folder)[part][0])


def _load(folder: Path, part: str, weights: str) -> nn.Module:
    network = parts.build(part, config_json.read(folder, part), folder / "config.json")
    listed = {weights}
    if weights.endswith(".json"):
        index = files.read_json(folder / weights).get("weight_map")
        listed = {str(name) for name in index.values()} if isinstance(index, dict) else set()
        absent = sorted(listed - {*_names(folder)})
        if absent or not listed:
            absent = parts.first_names(absent) or "none"
            raise ValueError(f"{folder / weights} lists files that are not there: {absent}")
    tensors = {name: tensor for file in sorted(listed) for name, tensor in files.read(folder / file).items()}
    return parts.fill(network, native(part, tensors), folder / weights)


def save_part(folder: Path, network: nn.Module) -> None:
    """Write config.json and the weights of one network, whole or not at all."""
    part = parts.part_of(network)
    with files.new_folder(folder, keep=True) as temporary:
        files.write(temporary / f"{_stem(part)}.safetensors", network.state_dict())
        config_json.write(temporary, part, network.config)


# Names of the attention in a VAE or UNet2D of 2022.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def native(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under native names, from the names of older and newer files of the same layout."""

    def rename(name: str) -> str:
        if part == "text_encoder" and not name.startswith("text_model."):
            return f"text_model.{name}"
        match = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\.weight|\.bias)", name)
        return match[1] + OLD_ATTENTION.get(match[2], match[2]) + match[3] if match else name

    # The position_ids are 0 to 76, and wrong in files that were cast to half precision.
    return {rename(name): t for name, t in tensors.items() if not name.endswith("embeddings.position_ids")}


# --- File names ------------------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _stem(part: str) -> str:
    return "model" if part == "text_encoder" else "diffusion_pytorch_model"


def variants(names: Collection[str], part: str) -> dict[str | None, str]:
    """variant (None: plain) -> its weights' file, or the index of several, among the file names of a folder:
    .safetensors before .bin, one file before several."""
    pattern = re.compile(
        rf"(?:pytorch_)?{_stem(part)}(?:\.([^.-]+))?\.(safetensors|bin)(\.index(?:\.([^.-]+))?\.json)?"
    )
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    weights: dict[str | None, str] = {}
    for match in sorted(matches, key=lambda match: (match[2] == "bin", match[3] is not None)):
        weights.setdefault(match[1] or match[4], match[0])
    return weights


def _shards(index: str) -> list[str]:
    """Patterns of the names of the files that an index may list."""
    stem, kind, _, *variant, _ = index.split(".")
    middle = "".join(f".{word}" for word in variant)
    return [f"{stem}{middle}-?????-of-?????.{kind}", f"{stem}-?????-of-?????{middle}.{kind}"]


def choose(
    names: Mapping[str, Collection[str]], variant: str | None, source: Path | str
) -> dict[str, list[str]]:
    """part -> its weights' file, or an index and patterns of its files, from part -> the file names of its
    folder, which lies in `source`; one part alone lies in `source` itself.

    A part without the variant gives its plain weights, or the only ones it has, as long as another part has
    the variant. ValueError that lists what there is if that is not it.
    """
    weights = {part: variants(names[part], part) for part in names}
    if variant and not any(variant in of_part for of_part in weights.values()):
        known = sorted({str(v or "plain weights") for of_part in weights.values() for v in of_part})
        raise ValueError(f"{source} has no variant {variant!r}; there are {', '.join(known) or 'no weights'}")
    chosen = {}
    for part, of_part in weights.items():
        folder = f"{source}/{part}" if len(names) > 1 else source
        wanted = variant if variant in of_part else None
        if not of_part:
            raise ValueError(f"{folder} has no {_stem(part)}.safetensors")
        if wanted not in of_part and len(of_part) > 1:
            raise ValueError(f"{folder} has no plain weights; there are {', '.join(sorted(of_part))}")
        file = of_part.get(wanted) or next(iter(of_part.values()))
        chosen[part] = [file, *_shards(file)] if file.endswith(".json") else [file]
    return chosen
