"""No launch leaves the limits of a grid, and no program the memory of its tensors, however large they are."""

import builtins
import math
import operator

import numpy as np
import pytest
import torch

from tests.kernel_helpers import interpreter

pytest.importorskip("triton")
from minisd.kernels import kernel, launch  # noqa: E402

KERNELS = kernel.discover()


def image(b: int, c: int, side: int, layout=torch.channels_last, add=False) -> tuple:
    x = torch.empty(b, c, side, side, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    w = torch.empty(c, device="meta")
    return x, w, w, torch.empty(b, c, dtype=torch.bfloat16, device="meta") if add else None, 32, 1e-5, True


def heads(b: int, n: int, m: int, nh: int, hd: int) -> tuple:
    return tuple(torch.empty(b, s, nh, hd, dtype=torch.bfloat16, device="meta") for s in (n, m, m))


def tokens(rows: int, d: int) -> tuple:
    x, w = torch.empty(rows, d, dtype=torch.bfloat16, device="meta"), torch.empty(d, device="meta")
    return x, x.clone(), w, w.clone(), 1e-5


MILLIONS = 2**31 // 320 - 64  # of tokens, so that a sample is just below 2^31 elements
LARGE = [
    ("group_norm", image(1, 128, 2048, add=True)),
    ("group_norm", image(1, 128, 2048, torch.contiguous_format)),
    ("group_norm", image(1, 256, 2900)),
    ("group_norm", image(2, 512, 2100, torch.contiguous_format, add=True)),
    ("group_norm", image(65535, 64, 2)),
    ("attention", heads(1, MILLIONS, 200, 8, 40)),
    ("attention", heads(2, 200, MILLIONS, 8, 40)),
    ("attention", heads(8191, 200, 200, 8, 160)),
    ("cross_attention", heads(1, MILLIONS, 77, 8, 40)),
    ("cross_attention", heads(8191, 4096, 77, 8, 40)),
    ("layer_norm", tokens(2**23, 320)),
    ("layer_norm", tokens(2**30, 8)),
    ("geglu", tokens(2**22, 2560)[:1]),
    ("geglu", tokens(4, 2**24)[:1]),
]
TOO_LARGE = [
    ("group_norm", image(65536, 32, 1)),
    ("group_norm", image(1, 32, 5800)),
    ("attention", heads(1, 2**31 // 320 + 1, 200, 8, 40)),
    ("attention", heads(8192, 200, 200, 8, 40)),
    ("cross_attention", heads(1, 2**31 // 320 + 1, 77, 8, 40)),
    ("layer_norm", tokens(2**31, 2)),
    ("geglu", tokens(2**31, 2)[:1]),
    ("geglu", tokens(1, 2**26)[:1]),
]


def named(pairs):
    return [pytest.param(name, a, id=f"{name} {'x'.join(map(str, a[0].shape))}") for name, a in pairs]


def recorded(name: str, arguments: tuple) -> list[tuple]:
    with launch.record(90) as calls:
        KERNELS[name].launch(*arguments)
    assert len(calls) >= 2
    return calls


def test_every_kernel_has_large_cases():
    assert {name for name, _ in LARGE} == {name for name, _ in TOO_LARGE} == set(KERNELS)


@pytest.mark.parametrize("name, arguments", named(LARGE))
def test_grids(name, arguments):
    assert KERNELS[name].unsupported(*arguments) == ""
    for function, grid, *_ in recorded(name, arguments):
        x, y, z = (*grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535, (function, grid)


@pytest.mark.parametrize("name, arguments", named(TOO_LARGE))
def test_what_is_too_large_is_refused(name, arguments):
    assert "more than" in KERNELS[name].unsupported(*arguments)


class Address:
    """A pointer for the interpreter."""

    def __init__(self, tensor: torch.Tensor, address: int):
        self.dtype, self.address = tensor.dtype, address

    def data_ptr(self) -> int:
        return self.address


def first_and_last(*bounds):
    """Of a loop, so that a large one ends."""
    every = builtins.range(*map(operator.index, bounds))
    return [every[0], every[-1]] if len(every) > 1 else every


def run_corner(monkeypatch, function, grid: tuple, args: tuple, constants: dict, at: tuple) -> None:
    """Run one program in the interpreter, without memory: every address must lie in one of its tensors."""
    import triton.runtime.interpreter as interpreter

    extents, given = [], []
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            start = (i + 1) << 44
            last = sum((size - 1) * step for size, step in zip(a.shape, a.stride(), strict=True))
            extents.append((start, start + (last + 1) * a.element_size() if a.numel() else start))
            a = Address(a, start)
        given.append(a)

    def check(pointers, mask) -> None:
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        inside = np.zeros(used.shape, bool)
        for start, end in extents:
            inside |= (used >= start) & (used < end)
        assert inside.all(), f"{function.fn.__name__} {at} of {grid}: {used[~inside][:3]}"

    def load(pointers, mask, *rest):
        check(pointers, mask)
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        return interpreter.TensorHandle(np.zeros_like(pointers.data, dtype=dtype), pointers.get_element_ty())

    builder = interpreter.interpreter_builder
    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", lambda at, value, mask, *rest: check(at, mask))
        names = function.arg_names[len(args) :]
        values = [interpreter._implicit_cvt(a) for a in given]
        scope = interpreter._patch_lang(function.fn)
        try:
            builder.set_grid_dim(*(*grid, 1, 1)[:3])
            builder.set_grid_idx(*at)
            function.fn(*values, *[constants[name] for name in names])
        finally:
            scope.restore()


@interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, arguments", named(LARGE))
def test_addresses(name, arguments, monkeypatch):
    """The first and the last program on each axis, in 32-bit arithmetic that wraps around as a GPU's does."""
    for module in ("attention", "cross_attention", "layer_norm", "group_norm", "launch"):
        monkeypatch.setattr(f"minisd.kernels.{module}.range", first_and_last, raising=False)
    for function, grid, args, constants in recorded(name, arguments):
        grid = (*grid, 1, 1)[:3]
        x, y, z = (size - 1 for size in grid)
        for at in {(0, 0, 0), (x, 0, 0), (0, y, z), (x, y, z)}:
            run_corner(monkeypatch, function, grid, args, constants, at)


def test_the_limits_are_reached():
    """Otherwise these tests prove nothing."""
    elements = [max(math.prod(t.shape[1:]) for t in a if isinstance(t, torch.Tensor)) for _, a in LARGE]
    assert max(elements) > 2**31
