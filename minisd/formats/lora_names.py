"""The names of LoRA files: kohya's, and every generation of the diffusers format. One table, both ways.

A module's native name is its path with the part in front: `unet.conv_in`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`. A key of a file is a stem, which names the module, and an
ending, which says what the tensor is. Stems are built from the model's own names and never taken apart: where
the dots of a path became underscores, there is no telling which underscores were dots.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minisd import files
from minisd.formats import single_file
from minisd.models.unet import UNetConfig

# What may come before a module's path with its dots, or with underscores instead.
DOTTED = {
    "unet": ("unet.", "", "base_model.model.", "unet.base_model.model.", single_file.PREFIXES["unet"]),
    "text_encoder": ("text_encoder.", "base_model.model.", "text_encoder.base_model.model."),
}
FLAT = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # the first is written

# Endings of the keys of A (r, c_in, ...) and B (c_out, r, ...), by who writes them.
FACTORS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft_module": (".lora_A.default.weight", ".lora_B.default.weight"),  # of a module's own state dict
    "unet": (".lora.down.weight", ".lora.up.weight"),  # diffusers
    "text_encoder": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "old": ("_lora.down.weight", "_lora.up.weight"),  # up to 0.19
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}

# Ending of a key -> what the tensor is.
ENDINGS = {
    **{down: "down" for down, _ in FACTORS.values()}, **{up: "up" for _, up in FACTORS.values()},
    ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude",  # PEFT's DoRA
    **{f".{name}": name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
        "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip

# What diffusers called the four projections of an attention before it had PEFT, in both networks.
OLD_ATTENTION = {
    "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out",
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out",
}  # fmt: skip

METADATA = "lora_adapter_metadata"  # where diffusers puts PEFT's settings


# --- The table -------------------------------------------------------------------------------------------


def kohya_stem(name: str) -> str:
    """The stem that kohya's files have for a module, as they are written."""
    part, _, path = name.partition(".")
    return FLAT[part][0] + path.replace(".", "_")


def table(names: Iterable[str], unet: UNetConfig) -> dict[str, str | None]:
    """Stem -> native name, for every stem by which a file may call one of the modules `names`; None for stems
    whose tensors never had an effect."""
    modules = single_file.unet_modules(unet)
    table: dict[str, str | None] = {}
    for name in names:
        for stem in _stems(name, modules):
            assert table.setdefault(stem, name) == name, f"{stem} means {table[stem]} and {name}"
        if name.startswith("text_encoder."):
            # 0.16 gave each projection of the text encoder four pairs, and used the one called to_q.
            table |= dict.fromkeys((f"{name}.{old}" for old in ("to_k", "to_v", "to_out")), None)
    return table


def _stems(name: str, modules: Mapping[str, str]) -> Iterator[str]:
    """All stems of a module: of its path, and of its path in CompVis' UNet (`modules`), or without the
    `text_model.` that transformers 5 left out."""
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
    """Stem and kind of a key; the kind is empty if its ending is unknown."""
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
    """Native name -> kind -> tensor. ValueError, naming keys, if some belong to no module of this model."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        stem, kind = split(key, endings)
        if not kind or stem not in stems or kind in modules.get(stems[stem] or "", {}):
            unknown.append(key)
        elif (name := stems[stem]) is not None:
            modules.setdefault(name, {})[kind] = tensor
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"{source}: {len(unknown)} of its {len(tensors)} keys are unknown or unsupported: {shown}"
        )
    if not modules:
        raise ValueError(f"{source}: none of its {len(tensors)} keys belongs to a module of this model")
    return modules


def refuse_others(tensors: Mapping[str, Tensor], width: int, source: Path) -> None:
    """ValueError if the file is for a Stable Diffusion whose text states are not `width` wide."""
    for key, tensor in tensors.items():
        theirs = width
        if key.startswith(("lora_te2_", "text_encoder_2.")):
            theirs = 2048
        elif "attn2" in key and ("to_k" in key or "to_v" in key) and tensor.ndim >= 2:
            theirs = tensor.shape[1] if split(key)[1] in ("down", "hada_w1_b") else width
        if theirs != width:
            kind = {768: "SD v1.x", 1024: "SD2", 2048: "SDXL"}.get(theirs, "another model")
            raise ValueError(
                f"{source} is a LoRA for {kind}, with text states {theirs} wide; this model's are {width}"
            )


Alpha = Callable[[str, Tensor | None, int], float]


def alphas(metadata: Mapping[str, str], source: Path) -> Alpha:
    """alpha(native name, what the file stores as alpha, rank). If the file stores none, it is what PEFT's
    settings say, in the metadata or in adapter_config.json beside the file; else the rank. For an update that
    has no rank (0) the result is alpha / rank itself."""
    beside = source.with_name("adapter_config.json")
    settings: dict = {}
    if text := metadata.get(METADATA):
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source}: its metadata {METADATA} is not JSON: {error}") from None
    elif source.stem.startswith("adapter_model") and beside.is_file():
        settings = files.read_json(beside)

    def alpha(name: str, stored: Tensor | None, rank: int) -> float:
        if stored is not None:  # 0 stands for the rank, and has no meaning without one
            return (stored.item() or rank) if rank else 1.0
        part, _, path = name.partition(".")
        prefix = f"{part}."
        own = settings | {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}

        def pattern(key: str, value: float | None) -> float | None:
            """PEFT's exceptions, by the end of a path."""
            ends = [end for end in own.get(key) or {} if f".{path}".endswith("." + end.lstrip("^"))]
            return own[key][ends[-1]] if ends else value

        value = pattern("alpha_pattern", own.get("lora_alpha") or own.get("alpha"))
        if value is None:
            return float(rank or 1)
        if not rank:
            return value / pattern("rank_pattern", own.get("r"))
        return value * rank**0.5 if own.get("use_rslora") else float(value)

    return alpha


# --- Writing ---------------------------------------------------------------------------------------------

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # native name -> A, B, alpha


def _pair(stem: str, form: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return dict(zip((stem + ending for ending in FACTORS[form]), (a, b), strict=True))


def to_diffusers(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as diffusers' `save_lora_weights` writes them. Its readers take alpha from the
    metadata; without it they would take the rank."""
    tensors, settings = {}, {}
    by_part: dict[str, dict[str, tuple[int, float]]] = {}  # part -> path -> rank, alpha
    for name, (a, b, alpha) in factors.items():
        part, _, path = name.partition(".")
        tensors |= _pair(name, part, a, b)
        # Without `text_model.`: diffusers compares ends of paths, and not all transformers have it.
        by_part.setdefault(part, {})[path.removeprefix("text_model.")] = len(a), alpha
    for part, modules in by_part.items():
        (rank, alpha), _ = Counter(modules.values()).most_common(1)[0]
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {path: r for path, (r, _) in modules.items() if r != rank},
            "alpha_pattern": {path: a for path, (_, a) in modules.items() if a != alpha},
            "target_modules": sorted(modules),
        }
        settings |= {f"{part}.{key}": value for key, value in config.items()}
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)}


def to_kohya(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as kohya's sd-scripts writes them; A1111 and ComfyUI read them."""
    tensors, linear, convolutions = {}, Counter(), Counter()
    for name, (a, b, alpha) in factors.items():
        stem = kohya_stem(name)
        tensors |= _pair(stem, "kohya", a, b) | {f"{stem}.alpha": torch.tensor(float(alpha))}
        kind = linear if a.shape[2:] in ((), (1, 1)) else convolutions
        kind[len(a), alpha] += 1
    rank, alpha = (linear or convolutions).most_common(1)[0][0]
    args = {}
    if convolutions:
        conv_rank, conv_alpha = convolutions.most_common(1)[0][0]
        args = {"conv_dim": str(conv_rank), "conv_alpha": f"{conv_alpha:g}"}
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(args),
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "minisd",
    }


def about(options, title: str, sd) -> dict[str, str]:
    """How a LoRA of the model `sd` was trained, by the names of kohya's files, which A1111 shows."""
    kind = sd.schedule.prediction_type
    side = f"{options.resolution}x{options.resolution}"
    recorded = {
        "output_name": title, "sd_model_name": sd.name, "resolution": side, "optimizer": "AdamW",
        "batch_size_per_device": options.train_batch_size, "num_epochs": options.num_train_epochs,
        "min_snr_gamma": options.snr_gamma, "clip_skip": None,
    }  # fmt: skip
    for name in ("seed", "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps",
                 "gradient_accumulation_steps", "mixed_precision", "noise_offset"):  # fmt: skip
        recorded[name] = getattr(options, name)
    return {f"ss_{name}": str(value) for name, value in recorded.items()} | {
        "modelspec.title": title,
        "modelspec.resolution": side,
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
    }


WRITERS = {"diffusers": to_diffusers, "kohya": to_kohya}
