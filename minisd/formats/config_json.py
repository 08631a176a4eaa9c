"""config.json of the diffusers layout as our dataclasses, and back: the one place that knows its spelling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisd import files
from minisd.formats.parts import Config
from minisd.models.controlnet import HINT_CHANNELS, ControlNetConfig
from minisd.models.text import ACTIVATIONS, TextConfig
from minisd.models.unet import EncoderConfig, UNetConfig
from minisd.models.unet2d import UNet2DConfig
from minisd.models.vae import VAEConfig

LAYOUT = "0.16.0"  # the release of the layout whose fields are written

# Fields that a config has beyond ours, with the only value that our models have. Those of IGNORED change the
# rounding at most.
UNET_FIXED = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False, "dropout": 0.0, "transformer_layers_per_block": 1,
    "dual_cross_attention": False, "use_linear_projection": False, "class_embed_type": None,
    "addition_embed_type": None, "num_class_embeds": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False,
}  # fmt: skip
CONTROLNET_FIXED = UNET_FIXED | {
    "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False,
    "conditioning_channels": 3,
}  # fmt: skip
UNET2D_FIXED = {
    "center_input_sample": False, "time_embedding_type": "positional", "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0,
    "act_fn": "silu", "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None,
    "num_class_embeds": None, "attn_norm_num_groups": None, "time_embedding_dim": None,
    "num_train_timesteps": None,
}  # fmt: skip
VAE_FIXED = {
    "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
TEXT_FIXED = {"attention_dropout": 0.0, "dropout": 0.0}
IGNORED = {"upcast_attention", "force_upcast", "addition_embed_type_num_heads"}

CROSS_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
SELF_ATTENTION = {"AttnDownBlock2D": True, "DownBlock2D": False}


def read(folder: Path, part: str) -> Config:
    """config.json of a part's folder as our dataclass. ValueError, naming the field, if it is not SD v1's."""
    path = Path(folder) / "config.json"
    return READERS[part](files.read_json(path), path)


def write(folder: Path, part: str, config: Config) -> None:
    """Write config.json into a part's folder."""
    files.write_json(Path(folder) / "config.json", WRITERS[part](config))


class _Fields:
    """The fields of a config.json, each taken once; then no other may be there with a value of its own."""

    def __init__(self, content: dict[str, Any], path: Path):
        self.content, self.path, self.taken = content, path, set(IGNORED)

    def take(self, name: str, default: Any, good: Callable[[Any], bool], what: str) -> Any:
        self.taken.add(name)
        value = self.content.get(name)
        value = default if value is None else value
        if not good(value):
            raise self.error(name, value, what)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        return self.take(name, default, _is_size, "a whole number above zero")

    def number(self, name: str, default: float) -> float:
        return float(self.take(name, default, lambda v: type(v) in (int, float) and v > 0, "above zero"))

    def integers(self, name: str, default: Any, length: int | None = None) -> tuple[int, ...]:
        """A list, or one number that stands for all of `length`."""

        def good(value: Any) -> bool:
            if isinstance(value, (list, tuple)):
                return bool(value) and len(value) == (length or len(value)) and all(map(_is_size, value))
            return bool(length) and _is_size(value)

        value = self.take(name, default, good, f"{length or 'some'} whole numbers above zero")
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * (length or 1)

    def same(self, name: str, default: Any, length: int) -> int:
        """The one number that stands at all of `length` levels."""
        values = self.integers(name, default, length)
        if len(set(values)) > 1:
            raise self.error(name, list(values), "the same at every level")
        return values[0]

    def kinds(self, name: str, default: list[str], kinds: dict[str, bool]) -> tuple[bool, ...]:
        """Whether each level's block has attention, from its kind."""

        def good(value: Any) -> bool:
            return isinstance(value, list) and len(value) == len(default) and all(k in kinds for k in value)

        value = self.take(name, default, good, f"{len(default)} of {' '.join(kinds)}")
        return tuple(kinds[kind] for kind in value)

    def mirrored(self, name: str, attention: tuple[bool, ...], kinds: dict[str, bool]) -> None:
        """The kinds of the decoder's blocks: those of the encoder from its end."""
        up = [kind.replace("Down", "Up") for kind in reversed(_kinds(attention, kinds))]
        self.take(name, up, lambda v: v == up, f"the reverse of down_block_types, {up}")

    def refuse_others(self, fixed: dict[str, Any]) -> None:
        for name, value in self.content.items():
            if name in fixed and value is not None and value != fixed[name]:
                raise self.error(name, value, repr(fixed[name]))
            if (
                name not in fixed
                and name not in self.taken
                and name[:1] != "_"
                and value not in (None, False)
            ):
                raise self.error(name, value, "absent: minisd does not know it")

    def error(self, name: str, value: Any, what: str) -> ValueError:
        return ValueError(f"{self.path}: {name} is {value!r}; for SD v1.x it has to be {what}")


def _kinds(attention: tuple[bool, ...], kinds: dict[str, bool]) -> list[str]:
    names = {has: kind for kind, has in kinds.items()}
    return [names[has] for has in attention]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _read_unet(content: dict[str, Any], path: Path) -> UNetConfig:
    width = content.get("cross_attention_dim")
    if width in (1024, 2048):
        raise ValueError(f"{path}: this is an {_family(width)} checkpoint; minisd is for SD v1.x")
    fields = _Fields(content, path)
    config = UNetConfig(
        **_read_encoder(fields),
        out_channels=fields.integer("out_channels", 4),
        sample_size=fields.same("sample_size", 64, 2),
    )
    fields.mirrored("up_block_types", config.attention, CROSS_ATTENTION)
    fields.refuse_others(UNET_FIXED)
    return config


def _read_encoder(fields: _Fields) -> dict[str, Any]:
    """The fields of EncoderConfig."""
    channels = fields.integers("block_out_channels", (320, 640, 1280, 1280))
    levels = len(channels)
    default = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    num_heads = fields.integers("attention_head_dim", 8, levels)  # a misnomer of the layout: their number
    if uneven := [(c, n) for c, n in zip(channels, num_heads, strict=True) if c % n]:
        raise ValueError(f"{fields.path}: {uneven[0][0]} channels cannot be split into {uneven[0][1]} heads")
    return {
        "in_channels": fields.integer("in_channels", 4),
        "block_out_channels": channels,
        "attention": fields.kinds("down_block_types", default, CROSS_ATTENTION),
        "num_heads": num_heads,
        "layers_per_block": fields.same("layers_per_block", 2, levels),
        "cross_attention_dim": fields.same("cross_attention_dim", 1280, levels),
        "norm_num_groups": fields.integer("norm_num_groups", 32),
        "norm_eps": fields.number("norm_eps", 1e-5),
    }


def _write_unet(config: UNetConfig) -> dict[str, Any]:
    encoder = _write_encoder(config)
    up = [kind.replace("Down", "Up") for kind in reversed(encoder["down_block_types"])]
    own = {"_class_name": "UNet2DConditionModel", "center_input_sample": False, "up_block_types": up}
    own |= {"out_channels": config.out_channels, "sample_size": config.sample_size}
    return dict(sorted((encoder | own).items()))


def _write_encoder(config: EncoderConfig) -> dict[str, Any]:
    heads = list(config.num_heads)
    down = _kinds(config.attention, CROSS_ATTENTION)
    return {
        "_diffusers_version": LAYOUT,
        "act_fn": "silu",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
    }


def _read_controlnet(content: dict[str, Any], path: Path) -> ControlNetConfig:
    width = content.get("cross_attention_dim")
    if width in (1024, 2048):
        raise ValueError(f"{path}: this is a ControlNet of {_family(width)}; minisd is for SD v1.x")
    fields = _Fields(content, path)
    config = ControlNetConfig(
        **_read_encoder(fields),
        hint_channels=fields.integers("conditioning_embedding_out_channels", HINT_CHANNELS),
    )
    fields.refuse_others(CONTROLNET_FIXED)
    return config


def _write_controlnet(config: ControlNetConfig) -> dict[str, Any]:
    own = {
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": list(config.hint_channels),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }
    return dict(sorted((_write_encoder(config) | own).items()))


def _read_unet2d(content: dict[str, Any], path: Path) -> UNet2DConfig:
    fields = _Fields(content, path)
    channels = fields.integers("block_out_channels", (224, 448, 672, 896))
    default = ["DownBlock2D"] + ["AttnDownBlock2D"] * (len(channels) - 1)
    head_dim = fields.integer("attention_head_dim", 8) if content.get("attention_head_dim", 8) else None
    fields.taken.add("attention_head_dim")
    config = UNet2DConfig(
        in_channels=fields.integer("in_channels", 3),
        out_channels=fields.integer("out_channels", 3),
        block_out_channels=channels,
        attention=fields.kinds("down_block_types", default, SELF_ATTENTION),
        head_dim=head_dim,
        layers_per_block=fields.integer("layers_per_block", 2),
        norm_num_groups=fields.integer("norm_num_groups", 32),
        norm_eps=fields.number("norm_eps", 1e-5),
        sample_size=fields.same("sample_size", 64, 2),
        pad_end_only=not fields.take("downsample_padding", 1, lambda v: v in (0, 1), "0 or 1"),
        frequency_shift=fields.take("freq_shift", 0, lambda v: v in (0, 1), "0 or 1"),
        sines_first=not fields.take("flip_sin_to_cos", True, lambda v: isinstance(v, bool), "true or false"),
    )
    fields.mirrored("up_block_types", config.attention, SELF_ATTENTION)
    fields.refuse_others(UNET2D_FIXED)
    attending = [c for c, has in zip(channels, config.attention, strict=True) if has] + [channels[-1]]
    if head_dim and (uneven := [c for c in attending if c % head_dim]):
        raise ValueError(f"{path}: {uneven[0]} channels cannot be split into heads of {head_dim}")
    return config


def _write_unet2d(config: UNet2DConfig) -> dict[str, Any]:
    down = _kinds(config.attention, SELF_ATTENTION)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": LAYOUT,
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": config.head_dim,
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 0 if config.pad_end_only else 1,
        "flip_sin_to_cos": not config.sines_first,
        "freq_shift": config.frequency_shift,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "time_embedding_type": "positional",
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }


def _read_vae(content: dict[str, Any], path: Path) -> VAEConfig:
    fields = _Fields(content, path)
    channels = fields.integers("block_out_channels", (64,))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = [kind] * len(channels)
        fields.take(name, kinds, lambda v, kinds=kinds: v == kinds, f"{kinds}")
    config = VAEConfig(
        in_channels=fields.integer("in_channels", 3),
        out_channels=fields.integer("out_channels", 3),
        latent_channels=fields.integer("latent_channels", 4),
        block_out_channels=channels,
        layers_per_block=fields.integer("layers_per_block", 1),
        norm_num_groups=fields.integer("norm_num_groups", 32),
        sample_size=fields.same("sample_size", 32, 2),
        scaling_factor=fields.number("scaling_factor", 0.18215),
    )
    fields.refuse_others(VAE_FIXED)
    return config


def _write_vae(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": LAYOUT,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _read_text(content: dict[str, Any], path: Path) -> TextConfig:
    if isinstance(content.get("text_config"), dict):  # of the whole CLIP model
        content = content["text_config"]
    if content.get("hidden_size") in (1024, 1280):
        raise ValueError(f"{path}: this is the text encoder of SD2 or SDXL; minisd is for SD v1.x")
    fields = _Fields(content, path)
    config = TextConfig(
        vocab_size=fields.integer("vocab_size", 49408),
        hidden_size=fields.integer("hidden_size", 512),
        intermediate_size=fields.integer("intermediate_size", 2048),
        num_layers=fields.integer("num_hidden_layers", 12),
        num_heads=fields.integer("num_attention_heads", 8),
        max_positions=fields.integer("max_position_embeddings", 77),
        activation=fields.take(
            "hidden_act", "quick_gelu", lambda v: v in list(ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}"
        ),
        eps=fields.number("layer_norm_eps", 1e-5),
    )
    # The rest of such a file is about heads, generation and the library: none of it is the encoder's.
    fields.content = {name: content[name] for name in TEXT_FIXED if name in content}
    fields.refuse_others(TEXT_FIXED)
    if config.hidden_size % config.num_heads:
        raise ValueError(f"{path}: width {config.hidden_size} cannot be split into {config.num_heads} heads")
    return config


def _write_text(config: TextConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,  # as published; programs of the field read it as "the highest id"
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.max_positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": 1,
        "projection_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def _family(width: int) -> str:
    return "SD2" if width == 1024 else "SDXL"


READERS: dict[str, Callable[[dict[str, Any], Path], Config]] = {
    "unet": _read_unet, "vae": _read_vae, "text_encoder": _read_text, "controlnet": _read_controlnet,
    "unet2d": _read_unet2d,
}  # fmt: skip
WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "unet": _write_unet, "vae": _write_vae, "text_encoder": _write_text, "controlnet": _write_controlnet,
    "unet2d": _write_unet2d,
}  # fmt: skip
