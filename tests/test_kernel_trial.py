"""What "auto" does on a GPU, with the CPU in its place: trials of real kernels, and the door of ops.py."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minisd import graph, ops
from tests.helpers import mostly_slow
from tests.kernel_helpers import automatic, interpreter  # noqa: F401

pytest.importorskip("triton")
from minisd.kernels.trial import Call, Spec, Wrong  # noqa: E402

from minisd.kernels import attention, geglu, kernel, launch, trial, verdicts  # noqa: E402

pytestmark = [interpreter, pytest.mark.usefixtures("automatic")]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(trial, "DEVICE", "cpu")


def call(op: str, case, *, grad=True, dtype=torch.float32) -> Call:
    tensors, constants = case.inputs(dtype)
    specs = [None if t is None else Spec(t.shape, t.stride(), t.dtype, True) for t in tensors.values()]
    return Call(op, (*specs, *constants.values()), grad=grad, autocast=False, graph=False)


# ------------------------------ The check

KERNELS = [k for found in kernel.discover().values() for k in (found, *found.variants)]


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("found", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("case", mostly_slow([0, 1], 0))
def test_right_kernels_pass(found, case, grad):
    shares = trial.check(found, call(found.name.removesuffix("_anchored"), found.cases[case], grad=grad))
    assert shares and max(shares) <= 1
    assert len(shares) > 2 or not grad or "geglu" in found.name


def broken(**pieces):
    return dataclasses.replace(geglu.KERNEL, name="broken_geglu", **pieces)


def forward_with(change):
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = geglu.KERNEL.forward(x)
        change(x, y)
        return y

    return forward


def backward_with(change):
    def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dx = geglu.KERNEL.backward(dy, x)
        change(dx)
        return dx

    return backward


def past_the_end(t):
    behind = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage(), t.numel(), (4,))
    behind.fill_(1.0)


@pytest.mark.parametrize(
    "pieces, message",
    [
        (dict(forward=forward_with(lambda x, y: y.mul_(1.001))), "an error of"),
        (dict(backward=backward_with(lambda dx: dx.mul_(1.001))), "an error of"),
        (dict(forward=forward_with(lambda x, y: y[-1].fill_(float("nan")))), "NaN"),
        (dict(forward=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2)), "NaN"),
        (dict(forward=forward_with(lambda x, y: y[0, 0, :1].mul_(1 + torch.rand(())))), "two runs differ"),
        (dict(forward=forward_with(lambda x, y: past_the_end(y))), "past the end"),
        (dict(backward=backward_with(past_the_end)), "past the end"),
        (dict(forward=forward_with(lambda x, y: past_the_end(x))), "past the end"),
        (dict(forward=forward_with(lambda x, y: x[0].zero_())), "changes its input"),
    ],
)
def test_wrong_kernels_do_not(pieces, message):
    forward = pieces.get("forward")
    if forward and forward.__name__ == "<lambda>":

        def nothing(x: torch.Tensor) -> torch.Tensor:
            return forward(x)

        pieces = dict(forward=nothing)
    with pytest.raises(Wrong, match=message):
        trial.check(broken(**pieces), call("geglu", geglu.KERNEL.cases[0]))


def test_a_trial_changes_nothing_of_a_run():
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        trial.check(geglu.KERNEL, call("geglu", geglu.KERNEL.cases[0]))
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_check_begins_with_a_first_call(monkeypatch):
    """What a launcher remembers was not looked at by the check."""
    monkeypatch.setattr(launch, "_tapes", {"an earlier call": None})
    trial.check(geglu.KERNEL, call("geglu", geglu.KERNEL.cases[0]))
    assert not launch._tapes


def test_slices_and_expanded_tensors():
    """Like those of a fused QKV product, and of one prompt for a whole batch."""
    q, k, v = torch.randn(2, 16, 3, 2, 40).unbind(2)
    text = torch.randn(1, 9, 2, 40).expand(2, -1, -1, -1)
    for tensors in [(q, k, v), (q, text, text)]:
        specs = tuple(Spec(t.shape, t.stride(), t.dtype, True) for t in tensors)
        assert len(trial.check(attention.KERNEL, Call("attention", specs, True, False, False))) == 4


def test_times_of_all_candidates_in_turns(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None

        def elapsed_time(self, end):
            return 20.0

    class Properties:
        L2_cache_size = 10_000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    run = trial.step
    monkeypatch.setattr(trial, "step", lambda fn, a: order.append(fn) or run(fn, a))
    monkeypatch.setattr(trial, "REPEATS", 2)
    times = trial.time_ms([geglu.KERNEL], call("geglu", geglu.KERNEL.cases[2]))
    assert {name: len(ms) for name, ms in times.items()} == {"torch": 15, "geglu": 15}
    assert order == [geglu.reference] * 2 + [geglu.KERNEL] * 2  # two sets of inputs
    assert times["torch"][0] == 10.0


def test_a_timing_keeps_no_results(monkeypatch):
    """Those of all calls in a row may not fit into the memory."""
    found = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))
    monkeypatch.setattr(trial, "captured", lambda each, graph: found.extend(run() for run in each))
    monkeypatch.setattr(trial, "interleaved", lambda runs, rounds, wait: {})
    trial.time_ms([geglu.KERNEL], call("geglu", geglu.KERNEL.cases[2]))
    assert found == [None] * 2 * trial.REPEATS


# ------------------------------ The door


class Table(verdicts.Table):
    """Nothing on disk."""

    def __init__(self):
        super().__init__(None, dict(GPU="a chip"))

    def read(self):
        return {}

    def write(self, rows):
        return {k: row for k, row in rows.items() if row}


def gpu(monkeypatch, ms: float, record=None, check=None) -> list[str]:
    """`auto` on a CPU in place of a GPU; kernels take `ms`, torch 1. Return the list of tried keys."""
    tried = []

    def time_ms(kernels, call):
        tried.append(verdicts.key(call))
        return {"torch": [1.0] * 15} | {k.name: [ms] * 15 for k in kernels}

    bench = SimpleNamespace(check=check or (lambda kernel, call: []), time_ms=time_ms)
    monkeypatch.setattr(ops, "_device", "cpu")
    monkeypatch.setattr(
        verdicts, "of", lambda device, pinned, share: verdicts.Verdicts(Table(), pinned, share, bench)
    )
    ops.choose("auto")
    ops.pin(record or {}, None)
    return tried


@pytest.fixture
def launches(monkeypatch) -> list:
    """The kernels that are launched."""
    from triton.runtime.interpreter import InterpretedFunction

    found, on_grid = [], InterpretedFunction.__getitem__
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda kernel, grid: found.append(kernel) or on_grid(kernel, grid)
    )
    return found


def network(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Every op once; x (b, 32, h, w), w (32,)."""
    x = ops.group_norm(x, 4, w, w, 1e-5, silu=True)
    tokens = x.flatten(2).mT  # (b, n, 32)
    y, tokens = ops.add_layer_norm(tokens, tokens * 2, w, w, 1e-5)
    tokens = tokens + ops.layer_norm(y, w, w, 1e-5)
    q = tokens.unflatten(-1, (2, 16))
    tokens = ops.attention(q, q, q).flatten(-2)
    return ops.geglu(F.pad(tokens, (0, 32)).contiguous() + tokens.repeat(1, 1, 2))


def inputs(size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, 32, 4, 5, generator=g).requires_grad_(), torch.randn(
        32, generator=g
    ).requires_grad_()


def gradients(fn, x, w) -> list[torch.Tensor]:
    y = fn(x, w)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]


@pytest.mark.parametrize("ms, used", [(0.5, True), (0.99, False), (3.0, False)])
def test_auto_takes_what_is_faster_here(monkeypatch, launches, ms, used):
    ops.choose("torch")
    theirs = gradients(network, *inputs())
    tried = gpu(monkeypatch, ms)
    ours = gradients(network, *inputs())
    assert bool(launches) == used
    assert sorted({key.split()[0] for key in tried}) == (
        ["cross_attention", "geglu", "group_norm", "layer_norm"]
        if used
        else ["attention", "cross_attention", "geglu", "group_norm", "layer_norm"]
    )
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(ours, theirs, strict=True))
    if not used:
        assert all(map(torch.equal, ours, theirs))
    count = len(tried)
    again = gradients(network, *inputs())
    assert all(map(torch.equal, ours, again)) and len(tried) == count
    assert set(ops.verdicts()) >= set(tried) and ("torch" in ops.verdicts().values()) != used


def test_auto_tries_inference_apart_from_training_and_a_graph_apart_from_both(monkeypatch):
    tried = gpu(monkeypatch, 0.5)
    x = torch.randn(4, 64, requires_grad=True)
    for _ in range(2):
        ops.geglu(x)
        with torch.no_grad():
            ops.geglu(x)
            monkeypatch.setattr(graph, "wanted", lambda device: True)
            ops.geglu(x)
            monkeypatch.setattr(graph, "wanted", lambda device: False)
        ops.geglu(x.detach())  # no gradient is wanted: inference
        with torch.autocast("cpu", torch.bfloat16):
            ops.geglu(x)
    size = "float32 32 x4"
    assert tried == [
        f"geglu training 1 {size}",
        f"geglu inference {size}",
        f"geglu graph inference {size}",
        "geglu training 1 float32 autocast 32 x4",
    ]


def test_the_record_of_a_run_decides(monkeypatch, launches):
    gpu(monkeypatch, 0.5)
    began = gradients(network, *inputs())
    record, count = ops.verdicts(), len(launches)
    tried = gpu(monkeypatch, 3.0, record)
    assert all(map(torch.equal, gradients(network, *inputs()), began))
    assert not tried and len(launches) == 2 * count and ops.verdicts() == record

    def wrong(kernel, call):
        raise Wrong("NaN")

    gpu(monkeypatch, 3.0, record, wrong)
    with pytest.raises(ValueError, match="--kernels auto: this run computes `group_norm training"):
        network(*inputs())
    monkeypatch.setattr(ops, "_device", "cuda")
    with pytest.raises(ValueError, match="which needs a GPU; --kernels torch continues"):
        ops.pin(record, None)
    ops.choose("torch")
    ops.pin(record, None)


def test_checkpointing_computes_again_what_it_computed(monkeypatch, launches):
    tried = gpu(monkeypatch, 0.5)
    x, w = inputs()
    ours = gradients(lambda x, w: checkpoint(network, x, w, use_reentrant=False), x, w)
    count = len(tried)
    assert all(map(torch.equal, ours, gradients(network, x, w))) and len(tried) == count


@pytest.mark.parametrize("dynamic", mostly_slow([None, True], True))
def test_auto_compiles_without_a_break(monkeypatch, launches, dynamic):
    """With the verdicts of an eager call; what the compiler meets first is tried while it traces, as it is
    with --compile from the first call on."""
    tried = gpu(monkeypatch, 0.5)
    eager = gradients(network, *inputs(2))
    count, keys = len(launches), len(tried)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(gradients(compiled, *inputs(2)), eager)
    assert len(launches) == 2 * count
    first = gradients(compiled, *inputs(3))
    assert len(launches) == 3 * count and len(tried) > keys
    torch.testing.assert_close(first, gradients(network, *inputs(3)))
    assert len(launches) == 4 * count and set(ops.verdicts()) == set(tried)


def test_a_line_sums_up(monkeypatch, capsys):
    gpu(monkeypatch, 0.5)
    network(*inputs())
    for _ in range(2):
        ops.say_verdicts()
    err = capsys.readouterr().err
    assert err.startswith(
        "kernels: cross_attention 1 of 1, geglu 1 of 1, group_norm 1 of 1, layer_norm 2 of 2 on a chip"
    )
    assert err.count("\n") == 1
