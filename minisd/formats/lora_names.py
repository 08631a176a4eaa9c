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

PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # the first is written

# Ending of a key -> what the tensor is. `down` is A (r, c_in, ...), `up` is B (c_out, r, ...).
ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",  # of a module's own state dict
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers, UNet
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",  # text encoder
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # up to 0.19
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",  # kohya
    ".alpha": "alpha", ".dora_scale": "dora_scale",
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


def split(key: str) -> tuple[str, str]:
    """Stem and kind of a key; the kind is empty if the ending is none of those known here."""
    for ending, kind in ENDINGS.items():
        if key.endswith(ending):
            return key[: -len(ending)], kind
    return key, ""


# --- The table -------------------------------------------------------------------------------------------


def kohya_stem(name: str) -> str:
    """The stem that kohya's files have for a module, as they are written."""
    part, _, path = name.partition(".")
    return PREFIXES[part][0] + path.replace(".", "_")


def table(names: Iterable[str], unet: UNetConfig) -> dict[str, str | None]:
    """Stem -> native name, for all stems by which a file may mean one of the modules `names`; None for those
    that never had an effect."""
    modules = single_file.unet_modules(unet)
    found: dict[str, str | None] = {}
    for name in names:
        part, _, path = name.partition(".")
        if part == "unet":
            stems = _unet_stems(path)
            paths = (path, single_file.rename(f"{path}.weight", modules).removesuffix(".weight"))
        else:
            stems = _text_stems(path)
            paths = (path, path.removeprefix("text_model."))  # as diffusers converts a LoRA to kohya's names
        flat = (prefix + p.replace(".", "_") for prefix in PREFIXES[part] for p in paths)
        for stem in (*stems, *flat):
            assert found.setdefault(stem, name) == name, f"{stem} means {found[stem]} and {name}"
        if part == "text_encoder":
            # 0.16 gave each projection of the text encoder four pairs, and used the one called to_q.
            found |= dict.fromkeys((f"{name}.{old}" for old in ("to_k", "to_v", "to_out")), None)
    return found


def _unet_stems(path: str) -> Iterator[str]:
    for prefix in ("unet.", "", "base_model.model."):
        yield prefix + path
        for ours, old in OLD_ATTENTION.items():
            if path.endswith(f".{ours}"):
                attention = path.removesuffix(f".{ours}")
                yield f"{prefix}{attention}.processor.{old}"
                yield f"{prefix}{attention}.{old}"


def _text_stems(path: str) -> Iterator[str]:
    """With `text_model.` and, as transformers 5 has it, without."""
    for prefix in ("text_encoder.", "base_model.model."):
        for p in (path, path.removeprefix("text_model.")):
            yield prefix + p
            parent, _, last = p.rpartition(".")
            if last in OLD_ATTENTION:
                yield f"{prefix}{parent}.{OLD_ATTENTION[last]}"
                yield f"{prefix}{p}.to_q"


# --- Reading ---------------------------------------------------------------------------------------------


def is_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are of a LoRA or one of its relatives, known here or not. A token may be called <flora>:
    what has no dot is none of their keys."""
    marks = ("lora", "lycoris", "hada_", "lokr_", "oft_")
    return any(mark in key for key in tensors if "." in key for mark in marks)


def group(
    tensors: Mapping[str, Tensor], stems: Mapping[str, str | None], source: Path
) -> dict[str, dict[str, Tensor]]:
    """Native name -> kind -> tensor. ValueError naming the keys that mean nothing in this model."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        stem, kind = split(key)
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
        raise ValueError(f"{source}: none of its {len(tensors)} keys means a module of this model")
    return modules


def refuse_others(tensors: Mapping[str, Tensor], width: int, source: Path) -> None:
    """ValueError if the file is for a Stable Diffusion whose text states are not `width` wide."""
    for key, tensor in tensors.items():
        theirs = width
        if "attn2" in key and ("to_k" in key or "to_v" in key):
            if split(key)[1] in ("down", "hada_w1_b") and tensor.ndim >= 2:
                theirs = tensor.shape[1]
        if key.startswith(("lora_te2_", "text_encoder_2.")):
            theirs = 2048
        if theirs != width:
            kind = {768: "SD v1.x", 1024: "SD2", 2048: "SDXL"}.get(theirs, "another model")
            raise ValueError(
                f"{source} is a LoRA for {kind}, with text states {theirs} wide; this model's are {width}"
            )


def alphas(metadata: Mapping[str, str], source: Path) -> Callable[[str, Tensor | None, int], float]:
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

    def setting(part: str, key: str):
        return settings.get(f"{part}.{key}", settings.get(key))

    def by_path(name: str, patterns: str, value: float | None) -> float | None:
        """`value`, unless one of PEFT's patterns names the end of the path."""
        part, _, path = name.partition(".")
        for end, exception in (setting(part, patterns) or {}).items():
            if f".{path}".endswith("." + end.lstrip("^")):
                value = exception
        return value

    def alpha(name: str, stored: Tensor | None, rank: int) -> float:
        if stored is not None:  # 0 means the rank, and without a rank it has no meaning
            return (stored.item() or rank) if rank else 1.0
        part = name.partition(".")[0]
        value = by_path(name, "alpha_pattern", setting(part, "lora_alpha") or setting(part, "alpha"))
        if value is None:
            return float(rank or 1)
        if not rank:
            return value / by_path(name, "rank_pattern", setting(part, "r"))
        return value * rank**0.5 if setting(part, "use_rslora") else float(value)

    return alpha


# --- Writing ---------------------------------------------------------------------------------------------

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # native name -> A, B, alpha


def to_diffusers(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as diffusers' `save_lora_weights` writes them. Its readers take alpha from the
    metadata; without it they would take the rank."""
    tensors, settings = {}, {}
    for name, (a, b, _) in factors.items():
        middle = "lora" if name.startswith("unet.") else "lora_linear_layer"
        tensors[f"{name}.{middle}.down.weight"] = a
        tensors[f"{name}.{middle}.up.weight"] = b
    for part in PREFIXES:
        # Without `text_model.`: diffusers compares ends of paths, and not all transformers have it.
        own = {
            name.removeprefix(f"{part}.").removeprefix("text_model."): (len(a), alpha)
            for name, (a, _, alpha) in factors.items()
            if name.startswith(f"{part}.")
        }
        if own:
            (rank, alpha), _ = Counter(own.values()).most_common(1)[0]
            config = {
                "r": rank,
                "lora_alpha": alpha,
                "rank_pattern": {path: r for path, (r, _) in own.items() if r != rank},
                "alpha_pattern": {path: a for path, (_, a) in own.items() if a != alpha},
                "target_modules": sorted(own),
            }
            settings |= {f"{part}.{key}": value for key, value in config.items()}
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)}


def to_kohya(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as kohya's sd-scripts writes them; A1111 and ComfyUI read them."""
    tensors = {}
    for name, (a, b, alpha) in factors.items():
        stem = kohya_stem(name)
        tensors[f"{stem}.lora_down.weight"] = a
        tensors[f"{stem}.lora_up.weight"] = b
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    ranks = Counter((len(a), alpha) for a, _, alpha in factors.values() if a.shape[2:] in ((), (1, 1)))
    wide = Counter((len(a), alpha) for a, _, alpha in factors.values() if a.shape[2:] not in ((), (1, 1)))
    rank, alpha = (ranks or wide).most_common(1)[0][0]
    args = {}
    if wide:
        conv_rank, conv_alpha = wide.most_common(1)[0][0]
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
