"""config.json and scheduler_config.json in the format of diffusers: the only module that knows their keys.

The same table serves to read and to write a model's config. A row has a key, the spelling of its value, the
default for files without the key, and the attribute of minisd's dataclass.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minisd import files, reading
from minisd.formats.parts import Config
from minisd.models.controlnet import HINT_CHANNELS, ControlNetConfig
from minisd.models.text import ACTIVATIONS, TextConfig
from minisd.models.unet import UNetConfig
from minisd.models.unet2d import UNet2DConfig
from minisd.models.vae import VAEConfig
from minisd.options import require

DIFFUSERS_VERSION = "0.16.0"  # the release whose keys are written

# --- How values are spelled ------------------------------------------------------------------------------

MOST_LAYERS = 100  # in a level, in a text encoder, and of levels
INVALID = (ValueError, TypeError, LookupError)


class Spelling(NamedTuple):
    """How a JSON file spells a value."""

    allowed: str  # the valid values, for messages
    read: Callable[[Any, int], Any]  # (file's value, number of levels) -> attribute; raises one of INVALID
    write: Callable[[Any], Any] = lambda value: value
    nullable: bool = False  # whether null is a value of its own; otherwise it stands for the default


def _size(value: Any, levels: int = 0, *, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 1 << 20:
        raise ValueError
    return value


def _number(value: Any, levels: int = 0) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError
    return float(value)


def _layers(value: Any, levels: int = 0) -> int:
    """Read a number of layers, or one for each level, all the same: each costs time before any is run."""
    size = _same(value, levels or 1)
    if size > MOST_LAYERS:
        raise ValueError
    return size


def _list(values: Any, item: Callable[[Any], Any], length: int = 0) -> tuple:
    """Read a list of `length` items, or of one to MOST_LAYERS if that is 0."""
    count = len(values) if isinstance(values, (list, tuple)) else 0
    if not 1 <= count <= MOST_LAYERS or count != (length or count):
        raise ValueError
    return tuple(map(item, values))


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    """Read a size for each level, or one for all levels."""
    return _list([value] * levels if isinstance(value, int) else value, _size, levels)


def _same(value: Any, levels: int) -> int:
    (size,) = set(_per_level(value, levels))
    return size


def _one_of(values: dict[Any, Any]) -> Spelling:
    """Spell an attribute as one of a few values; `values` is file's value -> attribute."""
    ours = {value: key for key, value in values.items()}
    allowed = " or ".join("null" if value is None else repr(value) for value in values)
    return Spelling(allowed, lambda value, levels: values[value], ours.__getitem__)


def _choice(*values: Any) -> Spelling:
    return _one_of({value: value for value in values})


def _block_types(kind: str, direction: str, attention: Iterable[bool]) -> list[str]:
    return [f"{kind if has else ''}{direction}Block2D" for has in attention]


def _attention(kind: str) -> Spelling:
    """Spell whether each level has attention, by diffusers' names of the blocks."""
    block, plain = _block_types(kind, "Down", (True, False))
    has = {block: True, plain: False}
    return Spelling(
        f"{block} or {plain} for each level",
        lambda value, levels: _list(value, has.__getitem__, levels),
        partial(_block_types, kind, "Down"),
    )


SIZE = Spelling("a whole number above zero", _size)
WHOLE = Spelling("a whole number", partial(_size, least=0))
NUMBER = Spelling("a number above zero", _number)
SIZES = Spelling("whole numbers above zero", lambda value, levels: _list(value, _size), list)
WHOLES = Spelling("whole numbers", lambda value, levels: value and _list(value, partial(_size, least=0)))
NUMBERS = Spelling("numbers above zero", lambda value, levels: _list(value, _number))
PER_LEVEL = Spelling(
    "a whole number above zero, or one for each level",
    _per_level,
    lambda sizes: sizes[0] if len(set(sizes)) == 1 else list(sizes),
)
LAYERS = Spelling(f"a whole number from 1 to {MOST_LAYERS}, the same for every level", _layers)
SAME = Spelling("a whole number above zero, the same for every level", _same)
SIDE = Spelling("a whole number above zero, the same for height and width", lambda value, _: _same(value, 2))
HEAD_DIM = Spelling(
    "a whole number above zero, or null", lambda value, levels: _size(value) if value else None, nullable=True
)
FLAG = _choice(True, False)
ANYTHING = Spelling("anything", lambda value, levels: value)

# --- config.json: a table for each kind of model ---------------------------------------------------------


class Row(NamedTuple):
    key: str
    spelling: Spelling
    default: Any  # in diffusers, for files without the key
    attribute: str = ""  # of the dataclass, if it is not called like the key


@dataclass(frozen=True, kw_only=True)
class Table:
    """The keys of one kind of model. Keys that are not in its table are errors, unless null, false or 0."""

    config: type
    rows: tuple[Row, ...]  # block_out_channels first, as it tells the number of levels
    written: dict[str, Any]  # further keys, with the only value that minisd supports
    fixed: dict[str, Any]  # keys of later releases, with the only value supported; these are not written
    labels: dict[str, Any]  # written for other programs, and not read
    derived: Callable[[Any], dict[str, Any]] = lambda config: {}  # keys whose values follow from the rows
    heads: Callable[[Any], Iterable[tuple[int, int]]] = lambda config: ()  # channels, and a divisor of them
    others: tuple[str, dict[int, str]] = ("", {})  # a key, and its values in models that minisd does not have
    nested: str = ""  # the key of this config in the config of a larger model
    ignores_others: bool = False  # whether unknown keys are harmless


# Harmless keys in any model: at most, they change the rounding.
HARMLESS = {"upcast_attention", "force_upcast", "addition_embed_type_num_heads"}


def _rows(**defaults: int | float | list[int]) -> tuple[Row, ...]:
    """Rows of sizes, numbers and lists of sizes, as their defaults are."""
    spellings = {int: SIZE, float: NUMBER, list: SIZES}
    return tuple(Row(key, spellings[type(default)], default) for key, default in defaults.items())


def _labels(class_name: str) -> dict[str, str]:
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}


def _attending(config: UNet2DConfig) -> list[tuple[int, int]]:
    """Return the channels of the levels with attention and of the middle block, each with a head's width."""
    channels = [c for c, has in zip(config.block_out_channels, config.attention, strict=True) if has]
    return [(c, config.head_dim or 1) for c in (*channels, config.block_out_channels[-1])]


ENCODER_ROWS = (
    *_rows(block_out_channels=[320, 640, 1280, 1280], norm_eps=1e-5, in_channels=4, norm_num_groups=32),
    Row("down_block_types", _attention("CrossAttn"),
        ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "attention"),
    Row("attention_head_dim", PER_LEVEL, 8, "num_heads"),  # a misnomer: it is the number of heads
    Row("layers_per_block", LAYERS, 2),
    Row("cross_attention_dim", SAME, 1280),
)  # fmt: skip
ENCODER_WRITTEN = {
    "act_fn": "silu", "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1,
}  # fmt: skip
ENCODER_FIXED = {
    "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1,
    "use_linear_projection": False, "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default",
}  # fmt: skip

TABLES = {
    "unet": Table(
        config=UNetConfig, labels=_labels("UNet2DConditionModel"),
        rows=(*ENCODER_ROWS, Row("sample_size", SIDE, 64), *_rows(out_channels=4)),
        written=ENCODER_WRITTEN | {"center_input_sample": False}, fixed=ENCODER_FIXED,
        derived=lambda c: {"up_block_types": _block_types("CrossAttn", "Up", reversed(c.attention))},
        heads=lambda c: zip(c.block_out_channels, c.num_heads, strict=True),
        others=("cross_attention_dim", {1024: "an SD2 checkpoint", 2048: "an SDXL checkpoint"}),
    ),
    "controlnet": Table(
        config=ControlNetConfig, labels=_labels("ControlNetModel"),
        rows=(*ENCODER_ROWS,
              Row("conditioning_embedding_out_channels", SIZES, HINT_CHANNELS, "hint_channels")),
        written=ENCODER_WRITTEN
        | {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False},
        fixed=ENCODER_FIXED | {"conditioning_channels": 3},
        heads=lambda c: zip(c.block_out_channels, c.num_heads, strict=True),
        others=("cross_attention_dim", {1024: "a ControlNet of SD2", 2048: "a ControlNet of SDXL"}),
    ),
    "unet2d": Table(
        config=UNet2DConfig, labels=_labels("UNet2DModel"),
        rows=(
            *_rows(block_out_channels=[224, 448, 672, 896], norm_eps=1e-5),
            Row("layers_per_block", LAYERS, 2),
            *_rows(in_channels=3, out_channels=3, norm_num_groups=32),
            Row("down_block_types", _attention("Attn"),
                ["DownBlock2D"] + ["AttnDownBlock2D"] * 3, "attention"),
            Row("attention_head_dim", HEAD_DIM, 8, "head_dim"),
            Row("sample_size", SIDE, 64),
            Row("downsample_padding", _one_of({0: True, 1: False}), 1, "pad_end_only"),
            Row("freq_shift", _choice(0, 1), 0, "frequency_shift"),
            Row("flip_sin_to_cos", _one_of({True: False, False: True}), True, "sines_first"),
        ),
        written={
            "act_fn": "silu", "add_attention": True, "center_input_sample": False,
            "mid_block_scale_factor": 1, "time_embedding_type": "positional",
        },
        fixed={
            "mid_block_type": "UNetMidBlock2D", "downsample_type": "conv", "upsample_type": "conv",
            "resnet_time_scale_shift": "default",
        },
        derived=lambda c: {"up_block_types": _block_types("Attn", "Up", reversed(c.attention))},
        heads=_attending,
    ),
    "vae": Table(
        config=VAEConfig, labels=_labels("AutoencoderKL"),
        rows=(
            *_rows(block_out_channels=[64], scaling_factor=0.18215, latent_channels=4),
            Row("layers_per_block", LAYERS, 1),
            *_rows(in_channels=3, out_channels=3, norm_num_groups=32), Row("sample_size", SIDE, 32),
        ),
        written={"act_fn": "silu"},
        fixed={"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
        derived=lambda c: {
            "down_block_types": ["DownEncoderBlock2D"] * len(c.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(c.block_out_channels),
        },
    ),
    "text_encoder": Table(
        config=TextConfig,
        rows=(
            *_rows(vocab_size=49408, hidden_size=512, intermediate_size=2048),
            Row("num_hidden_layers", LAYERS, 12, "num_layers"),
            Row("num_attention_heads", SIZE, 8, "num_heads"),
            Row("max_position_embeddings", SIZE, 77, "max_positions"),
            Row("hidden_act", _choice(*ACTIVATIONS), "quick_gelu", "activation"),
            Row("layer_norm_eps", NUMBER, 1e-5, "eps"),
        ),
        written={"attention_dropout": 0.0, "dropout": 0.0}, fixed={},
        labels={
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "bos_token_id": 0,
            "eos_token_id": 2,  # as published; other programs take it for "the highest id"
            "pad_token_id": 1, "initializer_factor": 1.0, "initializer_range": 0.02,
        },
        derived=lambda c: {"projection_dim": c.hidden_size},
        heads=lambda c: [(c.hidden_size, c.num_heads)],
        others=("hidden_size", dict.fromkeys((1024, 1280), "the text encoder of SD2 or SDXL")),
        nested="text_config",
        ignores_others=True,  # these are settings of CLIP's projection, of generation and of transformers
    ),
}  # fmt: skip


def read(folder: Path, part: str) -> Config:
    """Read the config.json in a part's folder; ValueError as in `from_json`."""
    path = folder / "config.json"
    return from_json(part, reading.read_json(path), path)


def write(folder: Path, part: str, config: Config) -> None:
    """Write config.json into a part's folder."""
    files.write_json(folder / "config.json", to_json(part, config))


def from_json(part: str, content: dict[str, Any], source: Path | str) -> Config:
    """Return the config that the content of a config.json describes.

    ValueError, naming source and key, if minisd does not support a value, or does not know a key.
    """
    table = TABLES[part]
    if isinstance(content.get(table.nested), dict):
        content = content[table.nested]
    key, families = table.others
    for value, family in families.items():
        require(content.get(key) != value, f"{source}: this is {family}; minisd is for SD v1.x")
    values: dict[str, Any] = {}
    for row in table.rows:
        value = content.get(row.key)
        if value is None and not (row.spelling.nullable and row.key in content):
            value = row.default
        levels = len(values.get("block_out_channels", ()))
        values[row.attribute or row.key] = _read(row.key, value, row.spelling, levels, source)
    config = table.config(**values)
    for channels, divisor in table.heads(config):
        if channels % divisor:
            raise ValueError(f"{source}: {channels} channels cannot be divided by {divisor} into heads")
    only = table.written | table.fixed | ({} if table.ignores_others else table.derived(config))
    known = {row.key for row in table.rows} | HARMLESS
    for key, value in content.items():
        if key in known or key.startswith("_") or value is None or value == only.get(key, False):
            continue
        if key in only:
            raise _refused(source, key, value, repr(only[key]))
        require(table.ignores_others, f"{source}: unknown key {key!r}, which is {value!r}")
    return config


def to_json(part: str, config: Config) -> dict[str, Any]:
    """Return the content of a config.json, as `from_json` reads it."""
    table = TABLES[part]
    content = {row.key: row.spelling.write(getattr(config, row.attribute or row.key)) for row in table.rows}
    return dict(sorted((content | table.written | table.labels | table.derived(config)).items()))


def _read(key: str, value: Any, spelling: Spelling, levels: int, source: Path | str) -> Any:
    try:
        return spelling.read(value, levels)
    except INVALID:
        raise _refused(source, key, value, spelling.allowed) from None


def _refused(source: Path, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{source}: {key} is {value!r}, but minisd needs {allowed}")


# --- scheduler_config.json -------------------------------------------------------------------------------

# The values that its keys may have. The user chooses the scheduler, not the file; each one uses the keys that
# diffusers' class of the same name uses.
SCHEDULER = {
    # The noise schedule, and what the network predicts.
    "num_train_timesteps": SIZE, "beta_start": NUMBER, "beta_end": NUMBER, "trained_betas": NUMBERS,
    "beta_schedule": _choice("linear", "scaled_linear", "squaredcos_cap_v2"), "rescale_betas_zero_snr": FLAG,
    "prediction_type": _choice("epsilon", "v_prediction", "sample"),
    # The steps.
    "timestep_spacing": _choice("leading", "linspace", "trailing"), "steps_offset": WHOLE,
    "set_alpha_to_one": FLAG, "clip_sample": FLAG, "clip_sample_range": NUMBER, "use_karras_sigmas": FLAG,
    "variance_type": _choice("fixed_small", "fixed_large"), "final_sigmas_type": _choice("zero", "sigma_min"),
    "lower_order_final": FLAG, "euler_at_final": FLAG, "original_inference_steps": SIZE,
    "timestep_scaling": NUMBER,
    "solver_type": _choice("midpoint", "heun", "logrho", "bh1", "bh2"),  # others than its own: its default
    "use_exponential_sigmas": FLAG, "disable_corrector": WHOLES,
    # Supported at their defaults only, as they change the result. The scheduler determines the algorithm.
    "algorithm_type": _choice("dpmsolver++", "sde-dpmsolver++", "deis", "data_prediction"),
    "solver_order": _choice(2), "interpolation_type": _choice("linear"), "timestep_type": _choice("discrete"),
    "lambda_min_clipped": _choice(-math.inf), "sigma_min": _choice(None), "sigma_max": _choice(None),
    "predict_epsilon": _choice(True), "thresholding": _choice(False), "use_lu_lambdas": _choice(False),
    "use_beta_sigmas": _choice(False), "predict_x0": _choice(True), "solver_p": _choice(None),
    "use_flow_sigmas": _choice(False), "use_dynamic_shifting": _choice(False),
    "shift_terminal": _choice(None),
    # Harmless: the settings of thresholding and flow matching, and of solvers that minisd does not have.
    **dict.fromkeys((
        "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "skip_prk_steps",
        "noise_sampler_seed", "tensor_format", "predictor_order", "corrector_order", "tau_func",
    ), ANYTHING),
}  # fmt: skip


def read_scheduler(content: dict[str, Any], source: Path | str) -> dict[str, Any]:
    """Check the content of a scheduler_config.json and return it; null means the same as an absent key.

    ValueError, naming source and key, for an unknown key, or a value that minisd does not support.
    """
    for key, value in content.items():
        if not key.startswith("_") and value is not None:
            require(key in SCHEDULER, f"{source}: unknown key {key!r}, which is {value!r}")
            _read(key, value, SCHEDULER[key], 0, source)
    return content
