"""A single .safetensors or .ckpt file with the names of CompVis' stable-diffusion, as model sites share it.

One table, native name <-> file's name, serves both directions. It is computed from the configs, and every
name of the file has to be in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minisd import files
from minisd.formats import config_json
from minisd.formats import parts as ck
from minisd.formats.parts import PARTS, Checkpoint, Config
from minisd.models import controlnet, text, unet, vae

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
EMA = "model_ema."
CONTROLNET = "control_model."

# What training left in such files: the noise schedule, the loss' own network, counters, and marks of the kind
# of model. Names that end in `.` or `_` stand for all that begin so.
IGNORED = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_", "log_one_minus_", "posterior_", "logvar",
    "lvlb_weights", "first_stage_model.loss.", EMA, "v_pred", "ztsnr",
)  # fmt: skip

CONFIG = "minisd.config"  # the metadata entry with the configs, for models that are not of SD v1.5's size


def matches(path: Path) -> bool:
    path = Path(path)
    return path.is_file() and path.suffix in (files.SAFETENSORS, *files.PICKLES)


def load(
    path: Path, *, variant: str | None = None, ema: bool = False, parts: Sequence[str] = PARTS
) -> Checkpoint:
    """Read a single file; with `ema` the UNet is the averaged one. The tokenizer is the one in minisd.

    ValueError, naming the file and some of the names, if it is of another model or not complete.
    """
    path = Path(path)
    if variant:
        raise ValueError(f"{path} is a single file, which has no variant {variant!r}")
    found = files.read(path)
    refuse_others(found, path)
    about = files.metadata(path)
    config, scheduler, pipeline = _described(about, found, path)
    tables = {part: table(part, config[part], path) for part in PARTS}
    if ema:
        tables["unet"] = {name: _ema_name(file_name) for name, file_name in tables["unet"].items()}
        if not any(name in found for name in tables["unet"].values()):
            raise ValueError(f"{path} holds no EMA weights")

    # Strict: every name is of a part, or known to be of no use.
    found = {_canonical(name): tensor for name, tensor in found.items() if not _is_ignored(name, ema)}
    known = {file_name for part in PARTS for file_name in tables[part].values()}
    plain = PREFIXES["unet"] if ema else None  # beside the averaged UNet, the plain one is of no use
    found = {name: tensor for name, tensor in found.items() if not (plain and name.startswith(plain))}
    for part in parts:
        if not any(name in found for name in tables[part].values()):
            raise ValueError(f"{path} holds no {part} ({PREFIXES[part]}*): it is not a whole checkpoint")
    wanted = {file_name for part in parts for file_name in tables[part].values()}
    ck.check_names({*found} - (known - wanted), wanted, path)

    return Checkpoint(
        **config,
        tensors={part: _read_part(part, config[part], tables[part], found, path) for part in parts},
        scheduler=scheduler,
        tokenizer=ck.TOKENIZER,
        pipeline=pipeline,
    )


def save(file: Path, checkpoint: Checkpoint) -> None:
    """Write a single .safetensors file. ValueError if it cannot hold the model: one with words of its own."""
    file = Path(file)
    if file.suffix != files.SAFETENSORS:
        raise ValueError(f"{file}: a single file is written as {files.SAFETENSORS}")
    if not ck.is_standard_tokenizer(checkpoint.tokenizer):
        raise ValueError(
            f"cannot write {file}: a single file holds no tokenizer, and {checkpoint.tokenizer} is not "
            "CLIP's own; write a folder instead"
        )
    tensors = {}
    for part in PARTS:
        config = getattr(checkpoint, part)
        ck.check(checkpoint.tensors[part], ck.native_shapes(part, config, file), file)
        for name, file_name in table(part, config, file).items():
            tensor = checkpoint.tensors[part][name]
            tensors[file_name] = tensor[:, :, None, None] if _is_convolution(part, name) else tensor
    kind = checkpoint.scheduler.get("prediction_type", "epsilon")
    described = {part: config_json.WRITERS[part](getattr(checkpoint, part)) for part in PARTS}
    described |= {"scheduler": checkpoint.scheduler, "pipeline": checkpoint.pipeline}
    about = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
        CONFIG: json.dumps(described, sort_keys=True),
    }
    files.write(file, tensors, about)


def load_controlnet(path: Path) -> tuple[controlnet.ControlNetConfig, dict[str, Tensor]]:
    """Config and tensors, by native names, of a ControlNet in a single file: alone, with or without
    `control_model.` before its names, or in front of the base model that it was trained with.

    ValueError, naming the file, if there is none in it, or if it is of another base than SD v1.x.
    """
    path = Path(path)
    found, about = files.read(path), files.metadata(path)
    if any(name.startswith(CONTROLNET) for name in found):
        found = {n.removeprefix(CONTROLNET): t for n, t in found.items() if n.startswith(CONTROLNET)}
    if "difference" in found:
        raise ValueError(f"{path} holds differences from its base model: only whole ones are read")
    if "zero_convs.0.0.weight" not in found:
        raise ValueError(f"{path} holds no ControlNet (zero_convs.*, input_hint_block.*)")
    width = found.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", torch.empty(0, 768)).shape[1]
    if CONFIG not in about and width != 768:
        raise ValueError(f"{path}: text states of width {width}; minisd is for ControlNets of SD v1.x")
    config = controlnet.SD15
    if CONFIG in about:
        try:
            config = config_json.READERS["controlnet"](json.loads(about[CONFIG]), path)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: its metadata {CONFIG} is damaged: {error}") from error
    names = table("controlnet", config, path)
    ck.check_names(found, names.values(), path)
    return config, _read_part("controlnet", config, names, found, path)


def save_controlnet(file: Path, config: controlnet.ControlNetConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a ControlNet as a single .safetensors file, for programs that do not read folders."""
    ck.check(tensors, ck.native_shapes("controlnet", config, file), file)
    named = {new: tensors[name] for name, new in table("controlnet", config, file).items()}
    files.write(file, named, {CONFIG: json.dumps(config_json.WRITERS["controlnet"](config), sort_keys=True)})


# --- The table -------------------------------------------------------------------------------------------

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def table(part: str, config: Config, source: Path | str) -> dict[str, str]:
    """Native name -> file's name, for every tensor of a part."""
    rows = {"unet": _unet, "vae": _vae, "text_encoder": lambda config: (), "controlnet": _controlnet}
    modules = dict(rows[part](config))
    prefix = PREFIXES.get(part, "")
    return {name: prefix + rename(name, modules) for name in ck.native_shapes(part, config, source)}


def rename(name: str, modules: Mapping[str, str]) -> str:
    """The name with its longest beginning that is a row of `modules` replaced."""
    head = name
    while head := head.rpartition(".")[0]:
        if head in modules:
            return modules[head] + name[len(head) :]
    return name


def unet_modules(config: unet.UNetConfig) -> dict[str, str]:
    """Native module -> file's module, without the prefix, for `rename`."""
    return dict(_unet(config))


def _encoder(config: unet.EncoderConfig) -> Iterator[tuple[str, str]]:
    """Rows native module -> file's module. The file counts blocks through all levels; in a block, index 0 is
    the ResnetBlock, 1 the transformer, and what changes the size comes last."""
    layers = config.layers_per_block
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
    }.items()
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    for b in range(len(config.block_out_channels)):
        first = 1 + b * (layers + 1)
        for i in range(layers):
            yield from _resnet(f"down_blocks.{b}.resnets.{i}", f"input_blocks.{first + i}.0")
            yield f"down_blocks.{b}.attentions.{i}", f"input_blocks.{first + i}.1"
        yield f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{first + layers}.0.op"


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in UNET_RESNET.items())


def _unet(config: unet.UNetConfig) -> Iterator[tuple[str, str]]:
    levels, layers = len(config.block_out_channels), config.layers_per_block
    yield from _encoder(config)
    yield from {"conv_norm_out": "out.0", "conv_out": "out.2"}.items()
    for b in range(levels):
        first = b * (layers + 1)
        for i in range(layers + 1):
            yield from _resnet(f"up_blocks.{b}.resnets.{i}", f"output_blocks.{first + i}.0")
            yield f"up_blocks.{b}.attentions.{i}", f"output_blocks.{first + i}.1"
        last = 2 if config.attention[levels - 1 - b] else 1
        yield f"up_blocks.{b}.upsamplers.0.conv", f"output_blocks.{first + layers}.{last}.conv"


def _controlnet(config: controlnet.ControlNetConfig) -> Iterator[tuple[str, str]]:
    """Rows native module -> file's module; in the hint network the file counts the SiLUs, too."""
    yield from _encoder(config)
    for i in range(len(config.block_out_channels) * (config.layers_per_block + 1)):
        yield f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0"
    yield "controlnet_mid_block", "middle_block_out.0"
    hint, blocks = "controlnet_cond_embedding", 2 * (len(config.hint_channels) - 1)
    yield f"{hint}.conv_in", "input_hint_block.0"
    for i in range(blocks):
        yield f"{hint}.blocks.{i}", f"input_hint_block.{2 * i + 2}"
    yield f"{hint}.conv_out", f"input_hint_block.{2 * blocks + 2}"


def _vae(config: vae.VAEConfig) -> Iterator[tuple[str, str]]:
    """Rows native module -> file's module. The file counts the decoder's levels from the finest one."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    resnets = {}
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        for ours, theirs in VAE_ATTENTION.items():
            yield f"{half}.mid_block.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}"
        for i in range(2):
            resnets[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
    for b in range(levels):
        yield f"encoder.down_blocks.{b}.downsamplers.0.conv", f"encoder.down.{b}.downsample.conv"
        yield f"decoder.up_blocks.{b}.upsamplers.0.conv", f"decoder.up.{levels - 1 - b}.upsample.conv"
        for i in range(layers):
            resnets[f"encoder.down_blocks.{b}.resnets.{i}"] = f"encoder.down.{b}.block.{i}"
        for i in range(layers + 1):
            resnets[f"decoder.up_blocks.{b}.resnets.{i}"] = f"decoder.up.{levels - 1 - b}.block.{i}"
    for ours, theirs in resnets.items():
        yield ours, theirs
        yield f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut"


def _ema_name(file_name: str) -> str:
    """The averaged weights' names are the plain ones without `model.` and without dots."""
    return EMA + file_name.removeprefix("model.").replace(".", "")


def _is_convolution(part: str, name: str) -> bool:
    """Whether the file has a 1x1 convolution (o, i, 1, 1) where we have a linear layer (o, i)."""
    return part == "vae" and ".attentions." in name and name.endswith(".weight") and "group_norm" not in name


# --- Reading ---------------------------------------------------------------------------------------------


def refuse_others(found: Mapping[str, Tensor], path: Path) -> None:
    """ValueError saying what a file is, if it is one of the kinds that people mistake for a checkpoint."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in found)

    keys = [t for name, t in found.items() if name.endswith("attn2.to_k.weight") and t.ndim == 2]
    width = keys[0].shape[1] if keys else 0
    base = has(PREFIXES["unet"])
    kind = None
    if has("conditioner.") or width == 2048 or has(PREFIXES["unet"] + "label_emb."):
        kind = "an SDXL checkpoint"
    elif width == 1024 or has("cond_stage_model.model."):
        kind = "an SD2 checkpoint"
    elif has(CONTROLNET, "controlnet_", "zero_convs.", "input_hint_block."):
        kind = "a ControlNet"
    elif any("lora_" in name or ".lora" in name for name in found):
        kind = "a LoRA, an adapter"
    elif not base and has("string_to_param", "emb_params"):
        kind = "a textual inversion embedding, an adapter"
    elif (
        not base
        and has("encoder.conv_in.", "first_stage_model.encoder.")
        and not has(PREFIXES["text_encoder"])
    ):
        kind = "a VAE alone"
    elif not base and has("down_blocks."):
        kind = "one part of a folder"
    if kind:
        raise ValueError(f"{path}: this is {kind}, not a whole checkpoint of SD v1.x")


def _described(
    about: Mapping[str, str], found: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Config], dict, str]:
    """Configs by part, scheduler and pipeline: our own metadata, else SD v1.5's with what the file shows."""
    if CONFIG in about:
        try:
            own = json.loads(about[CONFIG])
            config = {part: config_json.READERS[part](own[part], path) for part in PARTS}
            return config, dict(own["scheduler"]), str(own["pipeline"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: its metadata {CONFIG} is damaged: {error}") from error
    first = PREFIXES["unet"] + "input_blocks.0.0.weight"
    conv_in = found.get(first, found.get(_ema_name(first)))
    in_channels = conv_in.shape[1] if conv_in is not None and conv_in.ndim == 4 else 4
    if in_channels not in ck.PIPELINES:
        known = [*ck.PIPELINES]
        raise ValueError(f"{path}: its UNet takes {in_channels} channels; minisd knows {known}")
    config = {"unet": replace(unet.SD15, in_channels=in_channels), "vae": vae.SD15, "text_encoder": text.SD15}
    scheduler = dict(ck.SD1_SCHEDULER)
    if "v_pred" in found or about.get("modelspec.prediction_type", "").startswith("v"):
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in found:
        scheduler["rescale_betas_zero_snr"] = True
    return config, scheduler, ck.PIPELINES[in_channels]


def _is_ignored(name: str, ema: bool) -> bool:
    if name.startswith(EMA):
        return not ema or name in (EMA + "decay", EMA + "num_updates")
    return any(name.startswith(i) if i[-1] in "._" else name == i for i in IGNORED) or (
        name.startswith(PREFIXES["text_encoder"]) and name.endswith("embeddings.position_ids")
    )


def _canonical(name: str) -> str:
    """The text encoder's names have `text_model.`, which some newer files leave out."""
    prefix = PREFIXES["text_encoder"]
    if name.startswith(prefix) and not name.startswith(prefix + "text_model."):
        return prefix + "text_model." + name.removeprefix(prefix)
    return name


def _read_part(
    part: str, config: Config, names: Mapping[str, str], found: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    tensors = {name: found[file_name] for name, file_name in names.items()}
    tensors = {n: ck.as_matrix(t) if _is_convolution(part, n) else t for n, t in tensors.items()}
    ck.check(tensors, ck.native_shapes(part, config, path), path)
    return tensors
