"""The call of a kernel on the host: what is remembered of the first, and what must not be."""

import functools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers import mostly_slow
from tests.kernel_helpers import interpreter, ordinary

pytest.importorskip("triton")
from minisd.kernels import kernel, launch, trial  # noqa: E402

KERNELS = list(kernel.discover().values())
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)


class Compiled:
    """Stands for what Triton compiles: it notes how it is run."""

    function = packed_metadata = None

    def __init__(self, notes: list, name: str):
        self.notes, self.name = notes, name

    def run(self, x, y, z, stream, function, metadata, *arguments):
        self.notes.append((self.name, (x, y, z), arguments[3:]))


class Function:
    """Stands for a Triton function, which looks at its arguments in every call."""

    def __init__(self, notes: list, function):
        self.notes, self.name, self.arg_names = notes, function.fn.__qualname__, function.arg_names

    def __getitem__(self, grid):
        return functools.partial(self.call, (*grid, 1, 1)[:3])

    def call(self, grid, *args, **meta):
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        rest = [meta[name] for name in self.arg_names[len(args) :]]
        self.notes.append((f"slow {self.name}", grid, (*addresses, *rest)))
        return Compiled(self.notes, self.name)


@pytest.fixture
def notes(monkeypatch) -> list:
    """What is launched, in place of launching."""
    import triton

    found, real = [], launch.launch
    driver = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda device: 0)
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
    monkeypatch.setattr(launch, "_tapes", {})
    monkeypatch.setattr(launch, "launch", lambda f, *a, **m: real(Function(found, f), *a, **m))
    return found


def run(kernel, case) -> list[torch.Tensor]:
    """All tensors of a forward and a backward, the inputs' first."""
    tensors, constants = case.inputs(torch.float16, randn=torch.randn)
    outputs = launch.as_tuple(kernel.forward(*tensors.values(), *constants.values()))
    dys = [torch.randn_like(y) for y in outputs[: kernel.differentiable]]
    saved = kernel.save((*tensors.values(), *constants.values()), outputs)
    grads = launch.as_tuple(kernel.backward(*dys, *saved))
    return [t for t in (*tensors.values(), *outputs, *dys, *grads) if t is not None and t.numel()]


def anonymous(notes: list, tensors: list[torch.Tensor]) -> list:
    """Notes with the numbers of tensors in place of their addresses; what is none of them is a buffer."""
    number = {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}

    def name(a):
        return number.get(a, "a buffer") if type(a) is int and a > 2**32 else a

    return [(f.removeprefix("slow "), grid, [name(a) for a in arguments]) for f, grid, arguments in notes]


def slow(notes: list) -> bool:
    """Whether Triton had to look at the arguments, or else none of them; the notes are deleted."""
    found = {name.startswith("slow") for name, *_ in notes}
    notes.clear()
    (found,) = found
    return found


@each_kernel
def test_the_second_call_repeats_the_first_on_its_own_tensors(kernel, notes):
    for case in kernel.cases:
        launch._tapes.clear()
        first = anonymous(notes, run(kernel, case))
        assert first and slow(notes)
        second = anonymous(notes, run(kernel, case))
        assert not slow(notes) and second == first


@each_kernel
def test_results_are_those_of_the_launcher(kernel, notes):
    """In number, shape, stride and type; and none is an argument."""
    tensors, constants = kernel.cases[0].inputs()
    first, second = (kernel.forward(*tensors.values(), *constants.values()) for _ in range(2))
    assert type(first) is type(second)
    for a, b in zip(launch.as_tuple(first), launch.as_tuple(second), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a is not b and not any(b is t for t in tensors.values())


def test_what_must_not_be_repeated(notes, monkeypatch):
    """Another type, shape, stride or constant, an address no multiple of 16, one tensor in two places,
    a profiler, another device."""
    import triton

    forward = KERNELS[[k.name for k in KERNELS].index("layer_norm")].forward
    x, r, w, b = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64), torch.randn(64)

    def looks(*arguments) -> bool:
        forward(*arguments)
        return slow(notes)

    assert looks(x, r, w, b, 1e-5) and not looks(x, r, w, b, 1e-5)
    assert looks(x, r, w, b, 1e-6)
    assert looks(x, r, w.double(), b, 1e-5)
    assert looks(x[:2], r[:2], w, b, 1e-5)
    assert looks(x.T.contiguous().T, r, w, b, 1e-5) and looks(x.T.contiguous().T, r, w, b, 1e-5)  # copied
    off = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    assert looks(off, r, w, b, 1e-5) and looks(off, r, w, b, 1e-5)
    assert looks(x, x, w, b, 1e-4) and looks(x, x, w, b, 1e-4)
    assert looks(x, r, w, b, 1e-4) and not looks(x, r, w, b, 1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver.active, "get_current_device", lambda: 1)
        assert looks(x, r, w, b, 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
        assert looks(x, r, w, b, 1e-5)
    assert not looks(x, r, w, b, 1e-5)


def test_a_key_of_the_forward_holds_for_a_backward_with_the_same_strides(notes):
    """Hooks of saved tensors, such as save_on_cpu, return them with others."""
    norm = kernel.discover()["group_norm"]
    tensors, constants = norm.cases[0].inputs(torch.float16, randn=torch.randn)
    assert launch.layout(tensors["x"]) == torch.channels_last

    def looks(unpack, key=("a key",)) -> bool:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = norm(*tensors.values(), *constants.values(), key=key)
        notes.clear()
        torch.autograd.grad(y, tensors["x"], torch.randn_like(y))
        return slow(notes)

    assert looks(lambda t: t) and not looks(lambda t: t)
    assert looks(lambda t: t.contiguous()) and not looks(lambda t: t)
    assert looks(lambda t: t, key=("another",))


def test_a_variant_is_remembered_apart(notes):
    attention = kernel.discover()["attention"]
    (anchored,) = attention.variants
    tensors, _ = attention.cases[0].inputs(torch.float16)
    constants = []
    for variant in (attention, anchored, attention, anchored):
        variant.forward(*tensors.values())
        constants.append([a for a in notes[-1][2] if type(a) is bool])
        assert slow(notes) == (len(constants) <= 2)
    assert constants[0] != constants[1] and constants[:2] == constants[2:]


@pytest.mark.parametrize("change", ["run", "packed_metadata"])
def test_a_triton_that_is_launched_in_another_way_always_looks(notes, monkeypatch, change):
    if change == "run":
        monkeypatch.setattr(Compiled, "run", lambda self, grid, stream: None)
    else:
        monkeypatch.delattr(Compiled, "packed_metadata")
    x = torch.randn(3, 64)
    for _ in range(3):
        assert kernel.discover()["geglu"].forward(x).shape == (3, 32)
        assert slow(notes)


def test_a_failed_launch_leaves_nothing_behind(notes, monkeypatch):
    x = torch.randn(3, 64)
    geglu = KERNELS[[k.name for k in KERNELS].index("geglu")]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", lambda *a, **m: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            geglu.forward(x)
    geglu.forward(x)
    assert slow(notes)


def test_the_gpu_s_family_is_constant_to_torch_compile(monkeypatch):
    monkeypatch.setitem(launch._capabilities, 0, 90)

    def step(x):
        return x + launch.pick({64: {80: (80,), 90: (90,)}}, 40, torch.device("cuda", 0))[0]

    x = torch.ones(2)
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(x), x + 90)


def test_each_gpu_is_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = {0: SimpleNamespace(major=8, minor=9), 1: SimpleNamespace(major=12, minor=0)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: (asked.append(i), properties[i])[1])
    found = [launch.capability(torch.device("cuda", i)) for i in (0, 1, 1, 0)]
    assert found == [89, 120, 120, 89] and asked == [0, 1]


@ordinary
def test_loading_the_kernels_imports_no_compiler():
    code = "import sys; from minisd.kernels.kernel import discover; discover(); "
    code += "print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@interpreter
@each_kernel
def test_without_gradients_no_autograd(kernel, monkeypatch):
    tensors, constants = kernel.cases[0].inputs()
    arguments = (*tensors.values(), *constants.values())
    expected = kernel(*arguments)
    monkeypatch.setattr(kernel, "_function", None)
    with torch.no_grad():
        assert all(map(torch.equal, launch.as_tuple(expected), launch.as_tuple(kernel(*arguments))))


@interpreter
@each_kernel
def test_second_derivatives_are_refused(kernel):
    tensors, constants = kernel.cases[0].inputs()
    x = next(iter(tensors.values()))
    y = launch.as_tuple(kernel(*tensors.values(), *constants.values()))[0]
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@interpreter
@each_kernel
@pytest.mark.parametrize("how", mostly_slow(["autocast", "compiled"], "autocast"))
def test_checkpointed_gradients(kernel, how):
    """Bit-equal to those without checkpointing, under fp16 autocast and as torch.compile traces them."""
    dtype = torch.float16 if how == "autocast" else torch.float32
    tensors, constants = kernel.cases[0].inputs(dtype)
    given = [t for t in tensors.values() if t is not None]

    def plain(*arguments):
        return [y.square() for y in trial.outputs(kernel, dict(enumerate(arguments)), constants)]

    step = functools.partial(checkpoint, plain, use_reentrant=False)
    if how == "compiled":
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = []
    for call in (plain, step):
        with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
            ys = call(*tensors.values())
        found.append(torch.autograd.grad([y.float().sum() for y in ys], given))
    assert all(map(torch.equal, *found))
