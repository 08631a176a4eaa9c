"""The only interface between the models and the kernels: each op has one signature for Triton and torch.

`choose` sets which of them computes. "auto", the default, uses a Triton kernel where it is right and faster
than torch on the GPU at hand (kernels/verdicts.py); "triton" raises an error, with the reason, where no
kernel can run; "torch" never uses kernels. They are imported when first needed, which is never on a CPU.

Shapes: b batch, c channels, h w height and width, n tokens, nh heads, hd head width, d width.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd import graph

# ------------------------------ Triton or torch

CHOICES = ("auto", "triton", "torch")
_choice = "auto"
_device = "cuda"  # where "auto" asks for kernels
_record: dict[str, str] = {}  # the verdicts that a run goes on with
_share: Callable | None = None
_verdicts = None  # kernels.verdicts.Verdicts, once "auto" has met a GPU
_kernels: dict = {}  # name -> Kernel (kernels/kernel.py); empty until they are needed
_missing = ""  # why they cannot be imported
_printed, _said = "", 0  # the last line, and of how many verdicts it was


def choose(kernels: str) -> str:
    """Choose what computes from now on, one of CHOICES. Returns what did before. ValueError if it cannot."""
    global _choice, _record, _share, _verdicts, _printed, _said
    if kernels not in CHOICES:
        raise ValueError(f"--kernels {kernels}: choose from {', '.join(CHOICES)}")
    if kernels == "triton" and _load():
        raise ValueError(f"--kernels triton: {_missing}")
    before = _choice
    _choice, _record, _share, _verdicts, _printed, _said = kernels, {}, None, None, "", 0
    graph.forget()
    return before


def pin(record: dict[str, str], share: Callable | None) -> None:
    """Let "auto" decide like the run that `record` comes from, and like the first of several processes:
    `share(key, decide)` returns its decision. ValueError if that needs a GPU, and there is none."""
    global _record, _share
    used = [key for key, choice in record.items() if choice != "torch"]
    if _choice == "auto" and used and _device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--kernels auto: this run computes `{used[0]}` by a kernel, which needs a GPU; --kernels torch "
            "continues it without kernels, and with other last digits"
        )
    _record, _share = record, share


def verdicts() -> dict[str, str]:
    """What "auto" decided, by key: "torch" or the name of a kernel. Empty without a GPU."""
    return _verdicts.record() if _verdicts else _record


def say_verdicts() -> None:
    """Print how many calls kernels compute, if that is new."""
    global _said
    if _verdicts and len(_verdicts.rows) != _said:
        _said = len(_verdicts.rows)
        _say(_verdicts.summary())


def digest() -> str:
    """Eight digits that stand for the kernels in use, empty if there are none."""
    used = sorted(f"{key}: {choice}" for key, choice in verdicts().items() if choice != "torch")
    return hashlib.sha256("\n".join(used).encode()).hexdigest()[:8] if used else ""


def _load() -> str:
    """Import the kernels, once. Return why they cannot be imported, or an empty string."""
    global _missing
    if not _kernels and not _missing:
        try:
            from minisd.kernels.kernel import discover

            for kernel in discover().values():
                _kernels.update({k.name: k for k in (kernel, *kernel.variants)})
        except ImportError as error:
            _missing = f"triton cannot be imported ({error})"
    return _missing


def _say(line: str) -> None:
    """Print a line on stderr, unless it was the last one; of several processes, the first one does."""
    global _printed
    if line != _printed and os.environ.get("RANK", "0") == "0":
        print(f"kernels: {line}", file=sys.stderr)
    _printed = line


def _kernel(name: str, *arguments) -> Callable | None:
    """Return the kernel that computes this, or None if torch does."""
    if _choice == "torch":
        return None
    device, compiling = arguments[0].device, torch.compiler.is_compiling()
    if _choice == "auto" and (device.type != _device or _missing):
        if not compiling:
            _say(f"torch, {_missing or f'the tensors are on {device.type}'}")
        return None
    specs = [(a.shape, a.stride(), a.dtype, a.requires_grad, a.device) if isinstance(a, Tensor) else a
             for a in arguments]  # fmt: skip
    if compiling:
        specs = _guarded(specs)
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type), graph.wanted(device)
    call = name, tuple(specs), *modes
    choice = _known(call, device)
    if choice is None:
        choice = _decided(call, device, _kernels[name].why_not(*arguments))
    if compiling or not choice:
        return _kernels.get(choice)
    return functools.partial(_kernels[choice], key=call)


def _guarded(specs: list) -> list:
    """Let torch.compile make another graph for other sizes: a verdict holds for these alone."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    found = []
    for a in specs:
        if isinstance(a, tuple):
            shape, stride = (tuple([guard_scalar(n) for n in sizes]) for sizes in a[:2])
            a = shape, stride, *a[2:]
        found.append(a)
    return found


def _known(call: tuple, device: torch.device) -> str | None:
    """Return the name of the kernel, "" for torch, or None if that is to be decided."""
    global _verdicts
    if _verdicts is None:
        if _load():
            return ""
        from minisd.kernels.verdicts import of

        _verdicts = Forced() if _choice == "triton" else of(device, _record, _share)
    return _verdicts.choices.get(call)


def _decided(call: tuple, device: torch.device, why_not: str) -> str:
    with torch.cuda.device(-1 if device.index is None else device.index):
        return _verdicts.decide(call, why_not)


# torch.compile calls them while it traces, once. The decorator that says so would import the compiler.
_known._dynamo_marked_constant = _decided._dynamo_marked_constant = True


class Forced:
    """The verdicts of "triton": a kernel, or an error that says why it cannot run."""

    rows: dict = {}  # none is worth a line

    def __init__(self):
        self.choices: dict[tuple, str] = {}

    def decide(self, call: tuple, why_not: str) -> str:
        if why_not:
            raise ValueError(f"--kernels triton: {call[0].replace('_', ' ')} cannot run: {why_not}")
        return self.choices.setdefault(call, call[0])

    def record(self) -> dict[str, str]:
        return _record


@functools.cache
def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply in bf16, of AVX-512 or AMX, and oneDNN's own limit
    allows them. Others emulate it. Older releases of torch cannot be asked."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    allowed = any(name in limit for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10"))
    return allowed and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def fast_bf16(x: Tensor) -> bool:
    """Whether x is in bf16 on a CPU that multiplies in it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_bf16()


# ------------------------------ The ops

watcher = None  # of sampling/watch.py: is given q, k and v, and may return the result


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Return softmax(q k^T / sqrt(hd)) v, (b, n, nh, hd), for q (b, n, nh, hd) and k, v (b, m, nh, hd)."""
    if watcher and (seen := watcher(q, k, v)) is not None:
        return seen
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
    # On a CPU the backward of torch's own attention is slow in bf16; this trains a small model a third
    # faster. Its scores are rounded, and the result errs several times as much.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 256:
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).float()
        if causal:
            scores = scores + torch.full(scores.shape[2:], float("-inf")).triu(1)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    if fast_bf16(q):  # a tenth faster
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
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
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


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
