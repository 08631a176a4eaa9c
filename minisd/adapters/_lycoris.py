"""LoRA's relatives, as changes of a weight: LoHa, LoKr, DoRA, and convolutions with a Tucker decomposition.

Formulas as in LyCORIS (Yeh et al. 2023, arXiv 2309.14859) and DoRA (Liu et al. 2024, arXiv 2402.09353).
All in fp32; `t` is kind -> tensor, the kinds being those of formats/lora_names.py.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def product(up: Tensor, down: Tensor) -> Tensor:
    """Return B A, in the layer's shape (c_out, c_in, ...), of factors (c_out, r, ...) and (r, c_in, ...)."""
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def inner_factor(t: Mapping[str, Tensor]) -> Tensor:
    """Return A (r, c_in, k, k), the product of a Tucker core (r, s, k, k) and `down` (s, c_in, 1, 1) if there
    is a core."""
    if "mid" not in t:
        return t["down"]
    return torch.einsum("rskl,si->rikl", t["mid"], t["down"].flatten(1))


def delta(t: Mapping[str, Tensor], weight: Tensor, alpha: Callable[[int], float]) -> Tensor:
    """Return the change of `weight` (c_out, c_in, ...) at scale 1. `alpha` maps a rank to its alpha, and 0 to
    alpha / rank. KeyError if a factor is missing, RuntimeError if the factors do not fit."""
    if any(kind.startswith("hada_") for kind in t):
        update, rank = _loha(t)
    elif any(kind.startswith("lokr_") for kind in t):
        update, rank = _lokr(t)
    else:
        update, rank = product(t["up"], inner_factor(t)), t["up"].shape[1]
    update = (update * (alpha(rank) / (rank or 1))).reshape(weight.shape)
    if "dora_scale" in t or "magnitude" in t:
        update = _dora(t, weight + update) - weight
    return update


def _factor(t: Mapping[str, Tensor], name: str) -> tuple[Tensor, int]:
    """Return a factor and its rank. It is stored whole (rank 0), as a product of two matrices, or as two
    matrices (p, c_out), (q, c_in) and a core (p, q, k, k), which make (c_out, c_in, k, k)."""
    if name in t:
        return t[name], 0
    a, b, core = t[f"{name}_a"], t[f"{name}_b"], t.get(name.replace("_w", "_t"))
    if core is None:
        return a @ b, len(b)
    return torch.einsum("pqkl,po,qi->oikl", core, a, b).contiguous(), len(b)


def _loha(t: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv 2108.06098)."""
    (w1, rank), (w2, _) = _factor(t, "hada_w1"), _factor(t, "hada_w2")
    return w1 * w2, rank


def _lokr(t: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Kronecker product of a small matrix and a larger one. Either may be low-rank; the rank is 0 if neither
    is."""
    (w1, rank), (w2, rank2) = _factor(t, "lokr_w1"), _factor(t, "lokr_w2")
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2), rank2 or rank


def _dora(t: Mapping[str, Tensor], changed: Tensor) -> Tensor:
    """Return the changed weight with new norms of its rows or its columns, depending on the scale's shape."""
    scale = t["magnitude"].reshape(-1, 1) if "magnitude" in t else t["dora_scale"]  # PEFT: one per output
    scale = scale.reshape(*scale.shape, *[1] * (changed.ndim - scale.ndim))
    dims = [d for d in range(changed.ndim) if scale.shape[d] == 1]
    return changed * (scale / torch.linalg.vector_norm(changed, dim=dims, keepdim=True))
