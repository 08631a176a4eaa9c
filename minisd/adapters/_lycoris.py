"""What LoRA's relatives add to a weight: LoHa, LoKr, DoRA, and convolutions factored after Tucker.

Formulas as in LyCORIS (Yeh et al. 2023, arXiv 2309.14859) and DoRA (Liu et al. 2024, arXiv 2402.09353).
All in fp32; `t` is kind -> tensor as formats/lora_names.py groups them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def is_full(t: Mapping[str, Tensor]) -> bool:
    """Whether the update is none that two thin factors beside the layer could compute."""
    return any(kind.startswith(("hada_", "lokr_", "dora_", "magnitude")) for kind in t)


def product(up: Tensor, down: Tensor) -> Tensor:
    """B A of factors (c_out, r, ...) and (r, c_in, ...), in the layer's shape (c_out, c_in, ...)."""
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def fold(mid: Tensor, down: Tensor) -> Tensor:
    """A (r, c_in, k, k) of a Tucker core (r, s, k, k) and its inner factor (s, c_in, 1, 1): exact."""
    return torch.einsum("rskl,si->rikl", mid, down.flatten(1))


def delta(t: Mapping[str, Tensor], weight: Tensor, alpha: Callable[[int], float]) -> Tensor:
    """What a file adds to `weight` (c_out, c_in, ...) at scale 1; `alpha` is asked for that of a rank, and at
    rank 0 for the factor. KeyError if a factor is missing, RuntimeError if they do not fit."""
    if any(kind.startswith("hada_") for kind in t):
        update, rank = _loha(t)
    elif any(kind.startswith("lokr_") for kind in t):
        update, rank = _lokr(t)
    else:
        down = fold(t["mid"], t["down"]) if "mid" in t else t["down"]
        update, rank = product(t["up"], down), len(down)
    update = (update * (alpha(rank) / (rank or 1))).reshape(weight.shape)
    if "dora_scale" in t or "magnitude" in t:
        update = _dora(t, weight, weight + update) - weight
    return update


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (p, q, k, k) with a (p, c_out) and b (q, c_in): (c_out, c_in, k, k)."""
    return torch.einsum("pqkl,po,qi->oikl", core, a, b).contiguous()


def _loha(t: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""
    factors = []
    for i in "12":
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        factors.append(_tucker(t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b)
    return factors[0] * factors[1], len(t["hada_w1_b"])


def _lokr(t: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Kronecker product of a small matrix and a larger one, either of them possibly low-rank. Where neither
    is, there is no rank (0)."""
    rank = 0
    if "lokr_w1" in t:
        w1 = t["lokr_w1"]
    else:
        w1, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], len(t["lokr_w1_b"])
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        a, b = t["lokr_w2_a"], t["lokr_w2_b"]
        w2, rank = (_tucker(t["lokr_t2"], a, b) if "lokr_t2" in t else a @ b), len(b)
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2), rank


def _dora(t: Mapping[str, Tensor], weight: Tensor, changed: Tensor) -> Tensor:
    """The changed weight with other norms: of its rows or of its columns, as the scale's shape says."""
    if "magnitude" in t:  # PEFT: one for each output
        scale = t["magnitude"].reshape(-1, *[1] * (weight.ndim - 1))
    else:
        scale = t["dora_scale"]
        scale = scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    kept = [d for d in range(weight.ndim) if scale.shape[d] != 1]
    norm = torch.linalg.vector_norm(
        changed, dim=[d for d in range(weight.ndim) if d not in kept], keepdim=True
    )
    return changed * (scale / norm)
