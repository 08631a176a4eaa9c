"""The only interface between the models and the kernels: each op has one signature for Triton and torch.

`choose` sets which of them computes. "auto", the default, uses a Triton kernel where one can run and has been
measured on this GPU's family, otherwise torch; "triton" raises an error, with the reason, where no kernel can
run; "torch" never uses kernels. The kernels are imported when first needed, which is never on a CPU.

Shapes: b batch, c channels, h w height and width, n tokens, nh heads, hd head width, d width.
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd import graph

# ------------------------------ Triton or torch

CHOICES = ("auto", "triton", "torch")
_choice = "auto"
_printed: set[str] = set()  # reasons that "auto" has printed
_kernels: dict = {}  # name -> Kernel (kernels/kernel.py); empty until they are needed
_missing = ""  # why they cannot be imported


def choose(kernels: str) -> None:
    """Choose what computes from now on, one of CHOICES. ValueError if Triton cannot be imported."""
    global _choice
    if kernels not in CHOICES:
        raise ValueError(f"--kernels {kernels}: choose from {', '.join(CHOICES)}")
    if kernels == "triton" and _load():
        raise ValueError(f"--kernels triton: {_missing}")
    if kernels == "auto" and torch.cuda.is_available() and _measured(torch.device("cuda")):
        _load()
    _choice = kernels
    _printed.clear()
    graph.forget()


def _measured(device: torch.device) -> bool:
    from minisd.kernels.launch import MEASURED, capability, family  # does not import triton

    return family(capability(device)) in MEASURED


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
    """Return why the kernel `name` is not used for these arguments, or an empty string."""
    if _choice == "auto" and not x.is_cuda:
        return f"the tensors are on {x.device.type}"
    if _choice == "auto" and not _measured(x.device):
        return "the kernels have not been measured on this GPU; --kernels triton uses them anyway"
    if torch.compiler.is_compiling() and not _kernels:  # nothing can be imported while torch.compile traces
        return _missing or "the kernels were not loaded before compilation"
    return _load() or _kernels[name].why_not(x, *arguments)


def _kernel(name: str, *arguments):
    """Return the kernel `name`, or None if torch is to compute this. "auto" prints each reason once."""
    if _choice == "torch":
        return None
    reason = _why_torch(name, *arguments)
    if reason and _choice == "triton":
        raise ValueError(f"--kernels triton: {name.replace('_', ' ')} cannot run: {reason}")
    if _choice == "auto" and reason not in _printed and not torch.compiler.is_compiling():
        _printed.add(reason)
        if os.environ.get("RANK", "0") == "0":
            print(f"kernels: {f'torch, {reason}' if reason else 'triton'}", file=sys.stderr)
    return None if reason else _kernels[name]


# ------------------------------ The ops


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Return softmax(q k^T / sqrt(hd)) v, (b, n, nh, hd), for q (b, n, nh, hd) and k, v (b, m, nh, hd)."""
    # There is no kernel for the text encoder's causal attention and the VAE's one head of 512: they take a
    # few hundredths of the time.
    if not causal and q.shape[-1] <= 160:
        if torch.is_autocast_enabled(q.device.type):  # autocast also casts for torch's own attention
            q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
        if k.shape[1] <= 128 and (kernel := _kernel("cross_attention", q, k, v)):  # all keys at once
            return kernel(q, k, v)
        if kernel := _kernel("attention", q, k, v):
            return kernel(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, nh, n, hd)
    # On a CPU the backward of torch's own attention is slow in bf16; this trains a small model a third faster
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
    """GroupNorm of x + add, then SiLU if `silu`; x (b, c, h, w), add (b, c), weight and bias (c,)."""
    arguments = x, weight, bias, add, num_groups, eps, silu
    if kernel := _kernel("group_norm", *arguments):
        return kernel(*arguments)
    if add is not None:
        x = x + add[:, :, None, None]
    last = x.is_contiguous(memory_format=torch.channels_last)
    x = F.group_norm(x, num_groups, weight, bias, eps)
    x = x.contiguous(memory_format=torch.channels_last) if last else x  # on a GPU torch returns NCHW
    return F.silu(x) if silu else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (..., d)."""
    if kernel := _kernel("layer_norm", x, None, weight, bias, eps):
        return kernel(x, None, weight, bias, eps)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the LayerNorm of x + residual, and x + residual itself."""
    if x.dtype != residual.dtype:  # an autocast product and an fp32 sum, as in training a text encoder
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if kernel := _kernel("layer_norm", x, residual, weight, bias, eps):
        return kernel(x, residual, weight, bias, eps)
    x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps), x


def geglu(x: Tensor) -> Tensor:
    """Return a * gelu(g), (..., d), with the exact gelu, for x = [a, g] (..., 2 d)."""
    if kernel := _kernel("geglu", x):
        return kernel(x)
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)
