"""The only door between the models and the kernels: each op has one signature, whoever computes it.

`choose` sets who computes: "auto", the default, takes a Triton kernel wherever one can run that has been
measured on such a GPU, and torch elsewhere; "triton" is an error where none can run, with the reason; "torch"
never asks. The kernels are imported when they are first needed: on a CPU auto is torch, and they are not.

Shapes: b batch, c channels, h w height and width, n tokens, nh heads, hd head width, d width.
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------ Who computes

CHOICES = ("auto", "triton", "torch")
_choice = "auto"
_said: set[str] = set()
_kernels: dict = {}  # name -> Kernel (kernels/kernel.py); empty until they are needed
_missing = ""  # why they cannot be imported


def choose(kernels: str) -> None:
    """Set who computes from now on: "auto", "triton" or "torch". ValueError if the kernels cannot be had."""
    global _choice
    if kernels not in CHOICES:
        raise ValueError(f"--kernels {kernels}: choose from {', '.join(CHOICES)}")
    on_gpu = kernels == "auto" and torch.cuda.is_available() and _measured(torch.device("cuda"))
    missing = _load() if kernels == "triton" or on_gpu else ""
    if missing and kernels == "triton":
        raise ValueError(f"--kernels triton: {missing}")
    _choice = kernels
    _said.clear()


def _measured(device: torch.device) -> bool:
    from minisd.kernels.launch import measured  # does not import triton

    return measured(device)


def _load() -> str:
    """Import the kernels, once. Return why they cannot be imported, or an empty string."""
    global _missing
    if not _kernels and not _missing:
        try:
            from minisd.kernels.kernel import discover

            _kernels.update(discover())
        except ImportError as error:
            _missing = f"triton cannot be imported ({error})"
    return _missing


def _why_torch(name: str, x: Tensor, *arguments) -> str:
    """Why the kernel `name` does not compute this, or an empty string."""
    if _choice == "auto" and not x.is_cuda:
        return f"the tensors are on {x.device.type}"
    if _choice == "auto" and not _measured(x.device):
        return "the kernels have not been measured on this GPU; --kernels triton takes them all the same"
    if torch.compiler.is_compiling() and not _kernels:  # what `choose` imports cannot be imported in a trace
        return _missing or "the kernels were not loaded before compilation"
    return _load() or _kernels[name].why_not(x, *arguments)


def _kernel(name: str, *arguments):
    """The kernel `name` if it computes this, None if torch does. Each choice of auto is said once."""
    if _choice == "torch":
        return None
    reason = _why_torch(name, *arguments)
    if reason and _choice == "triton":
        raise ValueError(f"--kernels triton: {name.replace('_', ' ')} cannot run: {reason}")
    if _choice == "auto" and reason not in _said and not torch.compiler.is_compiling():
        _said.add(reason)
        if os.environ.get("RANK", "0") == "0":
            print(f"kernels: {f'torch, {reason}' if reason else 'triton'}", file=sys.stderr)
    return None if reason else _kernels[name]


# ------------------------------ The ops


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v for q (b, n, nh, hd) and k, v (b, m, nh, hd). Returns (b, n, nh, hd)."""
    # No kernel is meant for the text encoder's causal attention and the VAE's one head of 512: they are
    # hundredths of a run.
    if not causal and q.shape[-1] <= 160:
        if torch.is_autocast_enabled(q.device.type):  # as it does for torch's own attention
            q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
        if k.shape[1] <= 128 and (kernel := _kernel("cross_attention", q, k, v)):  # all keys at once
            return kernel(q, k, v)
        if kernel := _kernel("attention", q, k, v):
            return kernel(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, nh, n, hd)
    # On a CPU the backward pass of torch's own is slow in bf16: a small model trains a third faster so.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 256:
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).float()
        if causal:
            scores = scores + torch.full(scores.shape[2:], float("-inf")).triu(1)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)  # (b, n, nh, hd)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = False,
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GroupNorm of x + add, then SiLU if asked; x (b, c, h, w), add (b, c), weight and bias (c,)."""
    arguments = x, weight, bias, add, num_groups, eps, silu
    if kernel := _kernel("group_norm", *arguments):
        return kernel(*arguments)
    if add is not None:
        x = x + add[:, :, None, None]
    x = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(x) if silu else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., d)."""
    if kernel := _kernel("layer_norm", x, None, weight, bias, eps):
        return kernel(x, None, weight, bias, eps)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, and x + residual itself."""
    if x.dtype != residual.dtype:  # an autocast product beside an fp32 sum, as in a text encoder that trains
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if kernel := _kernel("layer_norm", x, residual, weight, bias, eps):
        return kernel(x, residual, weight, bias, eps)
    x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps), x


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) with the exact gelu, for x = [a, g] (..., 2 d). Returns (..., d)."""
    if kernel := _kernel("geglu", x):
        return kernel(x)
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)
