"""The names in LoRA files: kohya's, and every generation of the diffusers format. One table serves both ways.

A module's native name is its part and its path: `unet.conv_in`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`. A key in a file is a stem, which names the module, and an
ending, which tells the kind of tensor. Stems are built from the model's names and never parsed: where dots
became underscores, nothing tells which underscores were dots.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minisd import reading
from minisd.formats import parts, single_file
from minisd.models.unet import UNetConfig
from minisd.options import require

# What may come before a module's path, with dots in it or with underscores instead.
DOTTED = {
    "unet": ("unet.", "", "base_model.model.", "unet.base_model.model.", single_file.PREFIXES["unet"]),
    "text_encoder": ("text_encoder.", "base_model.model.", "text_encoder.base_model.model."),
}
FLAT = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # the first is written

# Endings of the keys of A (r, c_in, ...) and B (c_out, r, ...), by the program that writes them.
FACTORS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft_module": (".lora_A.default.weight", ".lora_B.default.weight"),  # a PEFT module's state dict
    "unet": (".lora.down.weight", ".lora.up.weight"),  # diffusers
    "text_encoder": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "old": ("_lora.down.weight", "_lora.up.weight"),  # up to 0.19
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}

# Ending of a key -> kind of tensor.
ENDINGS = {
    **{down: "down" for down, _ in FACTORS.values()}, **{up: "up" for _, up in FACTORS.values()},
    ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude",  # PEFT's DoRA
    **{f".{name}": name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
        "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip

# The names that diffusers had for the projections of attention in both networks, before it used PEFT.
OLD_ATTENTION = {
    "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out",
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out",
}  # fmt: skip

METADATA = "lora_adapter_metadata"  # the entry with PEFT's settings, as diffusers writes it


# --- The table -------------------------------------------------------------------------------------------


def kohya_stem(name: str) -> str:
    """Return a module's stem in the kohya files that are written."""
    part, _, path = name.partition(".")
    return FLAT[part][0] + path.replace(".", "_")


def table(names: Iterable[str], unet: UNetConfig) -> dict[str, str | None]:
    """Return stem -> native name, for all stems that a file may have for the modules `names`; None for stems
    whose tensors never had an effect."""
    modules = single_file.unet_modules(unet)
    table: dict[str, str | None] = {}
    for name in names:
        for stem in _stems(name, modules):
            assert table.setdefault(stem, name) == name, f"{stem} means {table[stem]} and {name}"
        if name.startswith("text_encoder."):
            # diffusers 0.16 wrote four pairs for each projection of the text encoder, and used to_q's.
            table |= dict.fromkeys((f"{name}.{old}" for old in ("to_k", "to_v", "to_out")), None)
    return table


def _stems(name: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Yield all stems of a module: of its path, and of its path in CompVis' UNet (`modules`), or without the
    `text_model.` that transformers 5 leaves out."""
    part, _, path = name.partition(".")
    other = path.removeprefix("text_model.")
    if part == "unet":
        other = single_file.rename(f"{path}.weight", modules).removesuffix(".weight")
    for p in (path, other):
        yield from (prefix + p.replace(".", "_") for prefix in FLAT[part])
        for prefix in DOTTED[part]:
            yield prefix + p
            for projection, old in OLD_ATTENTION.items():
                if p.endswith(f".{projection}"):
                    attention = prefix + p.removesuffix(projection)
                    yield from (f"{attention}{old}", f"{attention}processor.{old}", f"{prefix}{p}.to_q")


# --- Reading ---------------------------------------------------------------------------------------------


def split(key: str, endings: Mapping[str, str] = ENDINGS) -> tuple[str, str]:
    """Split a key into stem and kind; the kind is empty if the ending is unknown."""
    for ending, kind in endings.items():
        if key.endswith(ending):
            return key[: -len(ending)], kind
    return key, ""


def group(
    tensors: Mapping[str, Tensor],
    stems: Mapping[str, str | None],
    source: Path,
    endings: Mapping[str, str] = ENDINGS,
) -> dict[str, dict[str, Tensor]]:
    """Return native name -> kind -> tensor. ValueError, naming the first keys, if any key is unknown."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        stem, kind = split(key, endings)
        if not kind or stem not in stems or kind in modules.get(stems[stem] or "", {}):
            unknown.append(key)
        elif (name := stems[stem]) is not None:
            modules.setdefault(name, {})[kind] = tensor
    if unknown:
        count = f"{len(unknown)} of its {len(tensors)} keys"
        raise ValueError(f"{source}: {count} are unknown or unsupported: {parts.first_names(unknown)}")
    require(modules, f"{source}: none of its {len(tensors)} keys belongs to a module of this model")
    return modules


def refuse_others(tensors: Mapping[str, Tensor], width: int, source: Path) -> None:
    """Raise a ValueError if the file is for a Stable Diffusion whose text states are not `width` wide."""
    for key, tensor in tensors.items():
        theirs = width
        if key.startswith(("lora_te2_", "text_encoder_2.")):
            theirs = 2048
        elif "attn2" in key and ("to_k" in key or "to_v" in key) and tensor.ndim >= 2:
            theirs = tensor.shape[1] if split(key)[1] in ("down", "hada_w1_b") else width
        if theirs != width:
            kind = {768: "SD v1.x", 1024: "SD2", 2048: "SDXL"}.get(theirs, "another model")
            raise ValueError(f"{source} is a LoRA for {kind}: its text states are {theirs} wide, not {width}")


Alpha = Callable[[str, Tensor | None, int], float]


def alphas(metadata: Mapping[str, str], source: Path) -> Alpha:
    """Return a function of native name, the alpha stored in the file or None, and rank, that gives alpha.

    Without a stored alpha, it is the one in PEFT's settings, which are in the metadata or in
    adapter_config.json beside the file, or else the rank. For a rank of 0 (none) it gives alpha / rank.
    """
    beside = source.with_name("adapter_config.json")
    settings: dict = {}
    if text := metadata.get(METADATA):
        where = f"{source}, metadata {METADATA}"
        settings = reading.an_object(reading.parse_json(text, where), where)
    elif source.stem.startswith("adapter_model") and beside.is_file():
        settings = reading.read_json(beside)

    def alpha(name: str, stored: Tensor | None, rank: int) -> float:
        if stored is not None:  # 0 stands for the rank
            require(stored.numel() == 1, f"{source}: the alpha of {name} is {stored.numel()} numbers")
            return (stored.item() or rank) if rank else 1.0
        part, _, path = name.partition(".")
        prefix = f"{part}."
        config = settings | {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}

        def exception(key: str, default: float | None) -> float | None:
            """Look up PEFT's exceptions, which are by the end of a path."""
            ends = [end for end in config.get(key) or {} if f".{path}".endswith("." + end.lstrip("^"))]
            return config[key][ends[-1]] if ends else default

        value = exception("alpha_pattern", config.get("lora_alpha") or config.get("alpha"))
        if value is None:
            return float(rank or 1)
        if not rank:
            return value / exception("rank_pattern", config.get("r"))
        return value * rank**0.5 if config.get("use_rslora") else float(value)

    return alpha


# --- Writing ---------------------------------------------------------------------------------------------

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # native name -> A, B, alpha


def to_diffusers(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata as diffusers' `save_lora_weights` writes them. diffusers takes alpha from
    the metadata, or else takes the rank."""
    tensors, settings = {}, {}
    by_part: dict[str, dict[str, tuple[int, float]]] = {}  # part -> path -> rank, alpha
    for name, (a, b, alpha) in factors.items():
        part, _, path = name.partition(".")
        down, up = FACTORS[part]
        tensors |= {name + down: a, name + up: b}
        # Without `text_model.`: diffusers compares ends of paths, and not all transformers have it.
        by_part.setdefault(part, {})[path.removeprefix("text_model.")] = len(a), alpha
    for part, modules in by_part.items():
        (rank, alpha), _ = Counter(modules.values()).most_common(1)[0]
        config = {
            "r": rank, "lora_alpha": alpha, "target_modules": sorted(modules),
            "rank_pattern": {path: r for path, (r, _) in modules.items() if r != rank},
            "alpha_pattern": {path: a for path, (_, a) in modules.items() if a != alpha},
        }  # fmt: skip
        settings |= {f"{part}.{key}": value for key, value in config.items()}
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)}


def to_kohya(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata as kohya's sd-scripts writes them; A1111 and ComfyUI read them."""
    tensors, linear, convolutions = {}, Counter(), Counter()
    down, up = FACTORS["kohya"]
    for name, (a, b, alpha) in factors.items():
        stem = kohya_stem(name)
        tensors |= {stem + down: a, stem + up: b, f"{stem}.alpha": torch.tensor(float(alpha))}
        kind = linear if a.shape[2:] in ((), (1, 1)) else convolutions
        kind[len(a), alpha] += 1
    rank, alpha = (linear or convolutions).most_common(1)[0][0]
    args = {}
    if convolutions:
        conv_rank, conv_alpha = convolutions.most_common(1)[0][0]
        args = {"conv_dim": str(conv_rank), "conv_alpha": f"{conv_alpha:g}"}
    return tensors, {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(args), "ss_base_model_version": "sd_v1", "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "minisd",
    }  # fmt: skip


def to_old_diffusers(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors as diffusers 0.16 wrote them. It reads nothing but the attention of the UNet, and all of
    that, and knows no alpha. ValueError if a module is another."""
    tensors: dict[str, Tensor] = {}
    down, up = FACTORS["old"]
    for name, (a, b, alpha) in factors.items():
        match = re.fullmatch(r"unet\.(.+\.attn[12])\.(to_[qkv]|to_out)(\.0)?", name)
        require(match, f"diffusers 0.16 has no LoRA of {name}: of the UNet's attention alone")
        stem = f"{match[1]}.processor.{match[2]}"
        tensors |= {stem + down: a, stem + up: b * (alpha / len(a))}
    return tensors, {}


WRITERS = {"diffusers": to_diffusers, "diffusers-0.16": to_old_diffusers, "kohya": to_kohya}
