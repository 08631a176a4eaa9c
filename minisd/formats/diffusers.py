"""A folder with model_index.json and one folder for each part: the layout of diffusers.

Native names are this layout's names.
"""

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minisd import files
from minisd.formats import config_json
from minisd.formats import parts as ck
from minisd.formats.parts import PARTS, Checkpoint, Config
from minisd.models.unet2d import UNet2DConfig

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def matches(path: Path) -> bool:
    path = Path(path)
    return (path / INDEX).is_file() or all((path / part / "config.json").is_file() for part in PARTS)


def load(
    path: Path, *, variant: str | None = None, ema: bool = False, parts: Sequence[str] = PARTS
) -> Checkpoint:
    """Read a folder: all configs, and the tensors of `parts`.

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
    config = {part: config_json.read(path / part, part) for part in PARTS}
    if config["unet"].cross_attention_dim != config["text_encoder"].hidden_size:
        raise ValueError(
            f"{path}: the UNet takes text states of width {config['unet'].cross_attention_dim}, "
            f"the text encoder gives {config['text_encoder'].hidden_size}"
        )
    chosen = variant_of_parts({part: _names(path / part) for part in parts}, variant, path)
    tensors = {part: load_part(path / part, part, chosen[part])[1] for part in parts}
    tokenizer = path / "tokenizer"
    if not ((tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()):
        if not (tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer} has neither vocab.json and merges.txt nor tokenizer.json")
    return Checkpoint(
        **config,
        tensors=tensors,
        scheduler=files.read_json(path / SCHEDULER),
        tokenizer=tokenizer,
        pipeline=str(index.get("_class_name", "StableDiffusionPipeline")),
    )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder, whole or not at all. What else an existing folder holds stays there."""
    with files.new_folder(folder, keep=True) as temporary:
        for part in PARTS:
            save_part(temporary / part, part, getattr(checkpoint, part), checkpoint.tensors[part])
        (temporary / "scheduler").mkdir()
        files.write_json(temporary / SCHEDULER, checkpoint.scheduler)
        (temporary / "tokenizer").mkdir()
        # Other programs of the field may want the two plain files, which newer ones no longer write.
        source = ck.TOKENIZER if ck.is_standard_tokenizer(checkpoint.tokenizer) else checkpoint.tokenizer
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / "tokenizer" / name)
        index = {
            "_class_name": checkpoint.pipeline,
            "_diffusers_version": config_json.LAYOUT,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", checkpoint.scheduler.get("_class_name", "PNDMScheduler")],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        files.write_json(temporary / INDEX, index)


def load_ddpm(path: Path, *, variant: str | None = None) -> tuple[UNet2DConfig, dict[str, Tensor], dict]:
    """Config, tensors and scheduler_config.json of a DDPMPipeline's folder."""
    path = Path(path)
    config, tensors = load_part(path / "unet", "unet2d", variant)
    return config, tensors, files.read_json(path / SCHEDULER)


def save_ddpm(folder: Path, config: UNet2DConfig, tensors: dict[str, Tensor], scheduler: dict) -> None:
    """Write a DDPMPipeline's folder, whole or not at all. What else an existing folder holds stays there."""
    with files.new_folder(folder, keep=True) as temporary:
        save_part(temporary / "unet", "unet2d", config, tensors)
        (temporary / "scheduler").mkdir()
        files.write_json(temporary / SCHEDULER, scheduler)
        index = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": config_json.LAYOUT,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        }
        files.write_json(temporary / INDEX, index)


# --- One part -------------------------------------------------------------------------------------------


def load_part(folder: Path, part: str, variant: str | None = None) -> tuple[Config, dict[str, Tensor]]:
    """Config and tensors, by native names, of a part's folder (`unet/` and its like, or a VAE by itself)."""
    folder = Path(folder)
    config = config_json.read(folder, part)
    chosen, shards = choose(_names(folder), part, variant, folder)
    if chosen.endswith(".json"):
        index = files.read_json(folder / chosen).get("weight_map")
        listed = {str(name) for name in index.values()} if isinstance(index, dict) else set()
        if not listed or not listed <= set(shards):
            absent = sorted(listed - set(shards))
            raise ValueError(f"{folder / chosen} lists files that are not there: {ck.some(absent) or 'none'}")
        tensors = {name: t for shard in sorted(listed) for name, t in files.read(folder / shard).items()}
    else:
        tensors = files.read(folder / chosen)
    tensors = native(part, tensors)
    ck.check(tensors, ck.native_shapes(part, config, folder / "config.json"), folder / chosen)
    return config, tensors


def save_part(folder: Path, part: str, config: Config, tensors: dict[str, Tensor]) -> None:
    """Write config.json and the weights of one part, whole or not at all."""
    ck.check(tensors, ck.native_shapes(part, config, folder), folder)
    with files.new_folder(folder, keep=True) as temporary:
        files.write(temporary / f"{_stem(part, 'safetensors')}.safetensors", tensors)
        config_json.write(temporary, part, config)


def native(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under native names, from the names of older and newer files of the same layout."""
    return {
        new: ck.as_matrix(tensor) if part in OLD_NAMES and ".attentions." in new else tensor
        for name, tensor in tensors.items()
        if (new := _native_name(part, name)) is not None
    }


OLD_NAMES = ("vae", "unet2d")  # the parts whose attention had other names once
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _native_name(part: str, name: str) -> str | None:
    if part in OLD_NAMES:
        found = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\.weight|\.bias)", name)
        if found and found[2] in OLD_ATTENTION:
            return found[1] + OLD_ATTENTION[found[2]] + found[3]
    if part == "text_encoder":
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        if name == "text_model.embeddings.position_ids":
            return None  # 0 to 76, and wrong in files that were cast to half precision
    return name


# --- File names ------------------------------------------------------------------------------------------


def _stem(part: str, kind: str) -> str:
    return (
        "diffusion_pytorch_model" if part != "text_encoder" else {"bin": "pytorch_model"}.get(kind, "model")
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def variants(names: Collection[str], part: str) -> dict[str | None, dict[str, list[str]]]:
    """variant (None: plain) -> kind of file -> [file or index, shards ...], of the file names of a folder."""
    found: dict[str | None, dict[str, list[str]]] = {}
    for kind in ("safetensors", "bin"):
        stem, word = _stem(part, kind), r"(?:\.([^.-]+))?"
        for name in sorted(names, key=lambda name: name.endswith(".json")):  # a whole file before an index
            single = re.fullmatch(rf"{stem}{word}\.{kind}", name)
            index = re.fullmatch(rf"{stem}\.{kind}\.index{word}\.json", name)
            if not (single or index):
                continue
            variant = (single or index)[1]
            middle = re.escape(f".{variant}") if variant else ""
            number = r"-\d+-of-\d+"
            shard = re.compile(rf"{stem}({middle}{number}|{number}{middle})\.{kind}")
            shards = sorted(n for n in names if shard.fullmatch(n)) if index else []
            found.setdefault(variant, {}).setdefault(kind, [name, *shards])
    return found


def choose(
    names: Collection[str], part: str, variant: str | None, folder: Path | str
) -> tuple[str, list[str]]:
    """The weights' file, or the index of several and these, among the file names of a part's folder.

    Plain unless a variant is asked for or is all there is; .safetensors before .bin. ValueError listing what
    is there if that is not it.
    """
    found = variants(names, part)
    if not found:
        raise ValueError(f"{folder} has no {_stem(part, 'safetensors')}.safetensors")
    if variant not in found:
        if variant or len(found) > 1:
            asked = f"variant {variant!r}" if variant else "plain weights"
            raise ValueError(f"{folder} has no {asked}; there are {', '.join(sorted(map(str, found)))}")
        (variant,) = found
    kinds = found[variant]
    chosen, *shards = kinds.get("safetensors") or kinds["bin"]
    return chosen, shards


def variant_of_parts(
    names: Mapping[str, Collection[str]], variant: str | None, source: Path | str
) -> dict[str, str | None]:
    """The variant to read of each part: the one asked for, where it is. ValueError if no part has it."""
    found = {part: variants(names[part], part) for part in names}
    if variant and not any(variant in of_part for of_part in found.values()):
        known = sorted({str(v or "plain weights") for of_part in found.values() for v in of_part})
        raise ValueError(f"{source} has no variant {variant!r}; there are {', '.join(known) or 'no weights'}")
    return {part: variant if variant in of_part else None for part, of_part in found.items()}
