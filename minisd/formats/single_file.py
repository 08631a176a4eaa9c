"""A single .safetensors or .ckpt file with the names of CompVis' stable-diffusion, as model sites share it.

A table of native names and the file's names serves both directions. It is computed from the configs, and
every name in the file must be in it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from minisd import files, reading
from minisd.formats import config_json, parts
from minisd.formats.parts import PARTS, Config, PipelineParts
from minisd.models import controlnet, text, unet, vae
from minisd.options import require

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
EMA = "model_ema."
CONTROLNET = "control_model."
CONTROLNET_NAMES = (CONTROLNET, "controlnet_", "zero_convs.", "input_hint_block.")  # in any layout

# Names that training leaves in such files: the noise schedule, the VAE's loss, counters, and marks of the
# model's kind.
IGNORED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt|log_one_minus|posterior)_.*|logvar|lvlb_weights|v_pred|ztsnr|"
    r"first_stage_model\.loss\..*|model_ema\.(decay|num_updates)|"
    r"cond_stage_model\.transformer\..*embeddings\.position_ids"
)
# Where some newer files leave out the `text_model.` of the text encoder's names.
NO_TEXT_MODEL = re.compile(r"^cond_stage_model\.transformer\.(?!text_model\.)")

CONFIG = "minisd.config"  # the metadata entry with the configs, as sizes may differ from those of SD v1.5


def matches(path: Path) -> bool:
    return path.is_file() and path.suffix in (files.SAFETENSORS, *files.PICKLES)


def load(path: Path, *, variant: str | None = None, ema: bool = False) -> PipelineParts:
    """Read a single file, with the averaged UNet if `ema`. The tokenizer is minisd's copy of CLIP's.

    ValueError, naming the file and some of its names, if it is incomplete or of another model.
    """
    require(not variant, f"{path} is a single file, which has no variant {variant!r}")
    tensors, metadata = files.read_with_metadata(path)
    _refuse_others(tensors, path)
    configs, scheduler, pipeline_class = _described(metadata, tensors, path)
    networks = {part: parts.build(part, configs[part], path) for part in PARTS}
    tables = {part: table(part, network) for part, network in networks.items()}
    other_unet = PREFIXES["unet"] if ema else EMA
    tensors = {
        NO_TEXT_MODEL.sub(r"\g<0>text_model.", name): tensor
        for name, tensor in tensors.items()
        if not (name.startswith(other_unet) or IGNORED.fullmatch(name))
    }
    if ema:
        tables["unet"] = {name: _ema_name(file_name) for name, file_name in tables["unet"].items()}
        require(not tensors.keys().isdisjoint(tables["unet"].values()), f"{path} holds no EMA weights")
    for part in PARTS:
        if tensors.keys().isdisjoint(tables[part].values()):
            raise ValueError(f"{path} holds no {part} ({PREFIXES[part]}*): it is not a whole checkpoint")
    parts.check_names(tensors, {name for part in PARTS for name in tables[part].values()}, path)
    for part, network in networks.items():
        parts.fill(network, {name: tensors[file_name] for name, file_name in tables[part].items()}, path)
    return PipelineParts(
        **networks, scheduler=scheduler, tokenizer=parts.TOKENIZER, pipeline_class=pipeline_class
    )


def save(file: Path, pipeline: PipelineParts) -> None:
    """Write a single .safetensors file. ValueError, naming it, if the model's vocabulary is not CLIP's, for
    which a single file has no place."""
    require(file.suffix == files.SAFETENSORS, f"{file}: a single file is written as {files.SAFETENSORS}")
    if not parts.is_standard_tokenizer(pipeline.tokenizer):
        raise ValueError(
            f"cannot write {file}: a single file has no tokenizer, and {pipeline.tokenizer} is not "
            "CLIP's own; write a folder instead"
        )
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {"scheduler": pipeline.scheduler, "pipeline": pipeline.pipeline_class}
    for part, network in pipeline.networks.items():
        configs[part] = config_json.to_json(part, network.config)
        names = table(part, network)
        for name, tensor in network.state_dict().items():
            # In the file, the VAE's attention has 1x1 convolutions (o, i, 1, 1).
            is_convolution = part == "vae" and ".attentions." in name and tensor.ndim == 2
            tensors[names[name]] = tensor[:, :, None, None] if is_convolution else tensor
    kind = pipeline.scheduler.get("prediction_type", "epsilon")
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
        CONFIG: json.dumps(configs, sort_keys=True),
    }
    files.write(file, tensors, metadata)


def load_controlnet(path: Path) -> controlnet.ControlNet:
    """Read the ControlNet in a single file. Its names may begin with `control_model.`; then the file may also
    hold the base model that it was trained with.

    ValueError, naming the file, if it holds none, or one that is not for SD v1.x.
    """
    tensors, metadata = files.read_with_metadata(path)
    if any(name.startswith(CONTROLNET) for name in tensors):
        tensors = {n.removeprefix(CONTROLNET): t for n, t in tensors.items() if n.startswith(CONTROLNET)}
    if "difference" in tensors:
        raise ValueError(f"{path} holds differences from its base model; only whole ControlNets are read")
    if "zero_convs.0.0.weight" not in tensors:
        raise ValueError(f"{path} holds no ControlNet (zero_convs.*, input_hint_block.*)")
    config = controlnet.SD15
    if CONFIG in metadata:
        config = _embedded(metadata, path, lambda c: config_json.from_json("controlnet", c, "controlnet"))
    elif (width := _text_width(tensors)) not in (0, 768):
        raise ValueError(f"{path}: text states of width {width}; minisd is for ControlNets of SD v1.x")
    network = parts.build("controlnet", config, path)
    names = table("controlnet", network)
    parts.check_names(tensors, names.values(), path)
    return parts.fill(network, {name: tensors[file_name] for name, file_name in names.items()}, path)


# --- The table -------------------------------------------------------------------------------------------

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def table(part: str, network: nn.Module) -> dict[str, str]:
    """Return native name -> file's name, for all tensors of a network, in its order."""
    tables = {"unet": unet_modules, "controlnet": _controlnet, "vae": _vae}
    modules = tables[part](network.config) if part in tables else {}
    prefix = PREFIXES.get(part, "")
    return {name: prefix + rename(name, modules) for name in network.state_dict()}


def rename(name: str, modules: Mapping[str, str]) -> str:
    """Return the name with its longest beginning that is in `modules` replaced."""
    head = name
    while head := head.rpartition(".")[0]:
        if head in modules:
            return modules[head] + name[len(head) :]
    return name


def unet_modules(config: unet.EncoderConfig) -> dict[str, str]:
    """Return native module -> file's module without the prefix, for `rename`; some are in no network. The
    file counts blocks through all levels; in a block, index 0 is the ResnetBlock, 1 the transformer, and the
    last one the change of size."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    modules = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
    }  # fmt: skip
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for b in range(levels):
        first = b * (layers + 1)
        for i in range(layers + 1):
            down, up = f"input_blocks.{first + i + 1}", f"output_blocks.{first + i}"
            for ours, theirs in ((f"down_blocks.{b}", down), (f"up_blocks.{b}", up)):
                resnets[f"{ours}.resnets.{i}"] = f"{theirs}.0"
                modules[f"{ours}.attentions.{i}"] = f"{theirs}.1"
        last = 2 if config.attention[levels - 1 - b] else 1
        modules[f"down_blocks.{b}.downsamplers.0.conv"] = f"{down}.0.op"
        modules[f"up_blocks.{b}.upsamplers.0.conv"] = f"{up}.{last}.conv"
    for ours, theirs in resnets.items():
        modules |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in UNET_RESNET.items()}
    return modules


def _controlnet(config: controlnet.ControlNetConfig) -> dict[str, str]:
    """Return native module -> file's module. In the hint network, the file counts the SiLUs, too."""
    modules = unet_modules(config) | {"controlnet_mid_block": "middle_block_out.0"}
    for i in range(len(config.block_out_channels) * (config.layers_per_block + 1)):
        modules[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
    blocks = [f"blocks.{i}" for i in range(2 * (len(config.hint_channels) - 1))]
    for i, name in enumerate(["conv_in", *blocks, "conv_out"]):
        modules[f"controlnet_cond_embedding.{name}"] = f"input_hint_block.{2 * i}"
    return modules


def _vae(config: vae.VAEConfig) -> dict[str, str]:
    """Return native module -> file's module. The file counts the decoder's levels from the finest one."""
    modules, resnets = {}, {}
    for half in ("encoder", "decoder"):
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for ours, theirs in VAE_ATTENTION.items():
            modules[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
        resnets |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
    for b in range(len(config.block_out_channels)):
        down, up = f"encoder.down.{b}", f"decoder.up.{len(config.block_out_channels) - 1 - b}"
        for ours, theirs in ((f"encoder.down_blocks.{b}", down), (f"decoder.up_blocks.{b}", up)):
            modules[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
            modules[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
            for i in range(config.layers_per_block + 1):
                resnets[f"{ours}.resnets.{i}"] = f"{theirs}.block.{i}"
    shortcuts = {f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in resnets.items()}
    return modules | resnets | shortcuts


def _ema_name(file_name: str) -> str:
    """Return the name of a tensor's average: without `model.` and without dots."""
    return EMA + file_name.removeprefix("model.").replace(".", "")


# --- Reading ---------------------------------------------------------------------------------------------


def _text_width(tensors: Mapping[str, Tensor]) -> int:
    """Return the width of the text states that cross-attention takes, or 0 if there is none."""
    keys = (t for name, t in tensors.items() if name.endswith("attn2.to_k.weight") and t.ndim == 2)
    return next((key.shape[1] for key in keys), 0)


def _refuse_others(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ValueError that says what a file is, if it is of a kind often mistaken for a checkpoint."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in tensors)

    width = _text_width(tensors)
    base = has(PREFIXES["unet"])
    vae_alone = has("encoder.conv_in.", "first_stage_model.encoder.") and not has(PREFIXES["text_encoder"])
    kinds = {
        "an SDXL checkpoint": has("conditioner.", PREFIXES["unet"] + "label_emb.") or width == 2048,
        "an SD2 checkpoint": has("cond_stage_model.model.") or width == 1024,
        "a ControlNet": has(*CONTROLNET_NAMES),
        "a LoRA, an adapter": any("lora_" in name or ".lora" in name for name in tensors),
        "a textual inversion embedding, an adapter": not base and has("string_to_param", "emb_params"),
        "a VAE alone": not base and vae_alone,
        "one part of a folder": not base and has("down_blocks."),
    }
    for kind, is_kind in kinds.items():
        require(not is_kind, f"{path}: this is {kind}, not a whole checkpoint of SD v1.x")


def _embedded(metadata: Mapping[str, str], path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """Return what `read` makes of the metadata entry with the configs. ValueError, naming file and entry, if
    that is damaged."""
    try:
        return read(reading.parse_json(metadata[CONFIG], path))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata {CONFIG} is damaged: {error}") from error


def _described(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Config], dict[str, Any], str]:
    """Return configs by part, scheduler and pipeline class: those in minisd's metadata, or else SD v1.5's,
    changed as the file's tensors and metadata tell."""
    if CONFIG in metadata:
        return _embedded(metadata, path, lambda entry: (
            {part: config_json.from_json(part, entry[part], part) for part in PARTS},
            config_json.read_scheduler(dict(entry["scheduler"]), "scheduler"), str(entry["pipeline"]),
        ))  # fmt: skip
    first = PREFIXES["unet"] + "input_blocks.0.0.weight"
    conv_in = tensors.get(first, tensors.get(_ema_name(first)))
    in_channels = conv_in.shape[1] if conv_in is not None and conv_in.ndim == 4 else 4
    if in_channels not in parts.PIPELINES:
        raise ValueError(f"{path}: its UNet takes {in_channels} channels; minisd knows {[*parts.PIPELINES]}")
    unet_config = replace(unet.SD15, in_channels=in_channels)
    configs = {"unet": unet_config, "vae": vae.SD15, "text_encoder": text.SD15}
    scheduler = dict(parts.SD1_SCHEDULER)
    if "v_pred" in tensors or metadata.get("modelspec.prediction_type", "").startswith("v"):
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in tensors:
        scheduler["rescale_betas_zero_snr"] = True
    return configs, scheduler, parts.PIPELINES[in_channels]
