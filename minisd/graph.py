"""CUDA graphs: what a function launches on the GPU is recorded once, and then launched by a single call,
without Python's share of the time.

    choose("auto")                          what --graph says
    run(networks, function, *values)        function(*values), by a graph if there can be one
    Graphs()(networks, function, *values)   the same, or None where it has to run eagerly

A function is recorded at its second call with tensors of the same shapes: by then kernels are compiled and
algorithms are chosen. The recording is replayed at once and compared with the eager function, bit for bit.
Where that fails, the function stays eager, and a line on stderr says why.
"""

import os
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace

import torch
from torch import Tensor, nn

MOST = 16  # graphs of one `Graphs`; each bucket of aspect ratios needs one
capturing = False  # whether a function is being recorded
_choice = "auto"
_printed: set[str] = set()  # reasons that have been printed


class CUDA:
    """CUDA's graphs; the tests put a stand-in in its place that replays on a CPU."""

    device = "cuda"

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def memory(self, device: torch.device) -> dict:
        """Memory that graphs may share, as keywords of torch.cuda.graph."""
        return {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream(device)}

    def capture(self, function: Callable[[], list[Tensor]], memory: dict) -> tuple[Callable, list[Tensor]]:
        """Record a function. Returns what replays it, and the tensors that hold its results afterwards."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.stream(torch.cuda.current_stream())
        # Where a recording fails, torch leaves its stream behind: `before` goes back. "thread_local", because
        # other threads go on: those that pin batches, and NCCL's.
        with before, torch.cuda.graph(graph, capture_error_mode="thread_local", **memory):
            results = function()
        return graph.replay, results


backend = CUDA()


def choose(choice: str) -> str:
    """Choose whether graphs are used from now on: auto, on or off. Returns what held before. ValueError if
    there can be none."""
    global _choice
    if choice == "on" and not backend.is_available():
        raise ValueError("--graph on: CUDA graphs need an NVIDIA GPU")
    before, _choice = _choice, choice
    _printed.clear()
    forget()
    return before


def wanted(device: torch.device) -> bool:
    """Whether functions on this device run as graphs, if they can. ValueError if they must, and cannot."""
    if _choice == "on" and device.type != backend.device:
        raise ValueError(f"--graph on: the networks are on {device.type}")
    return _choice != "off" and device.type == backend.device


_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def run(networks: list[nn.Module], function: Callable, *values) -> list[Tensor]:
    """function(*values), a list of tensors, by a graph if there can be one, which is kept as long as the
    first of the networks lives. The first value is a tensor; all else is as in `Graphs`."""
    found = None
    if wanted(values[0].device) and not torch.is_grad_enabled():
        found = _of.setdefault(networks[0], Graphs())(networks, function, *values)
    return function(*values) if found is None else [tensor.clone() for tensor in found]


def forget() -> None:
    """Forget the graphs of all networks: what computes has changed."""
    _of.clear()


class Graphs:
    """The graphs of one function, by the shapes of its tensors. They share memory: the tensors that one
    returns hold their values until the next one is replayed."""

    def __init__(self):
        self.state: list | None = None  # of the networks, when the graphs were recorded
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, Graph | None] = {}  # None: eager for good
        self.memory: dict | None = None

    def __call__(self, networks: Iterable[nn.Module], function: Callable, *values) -> list[Tensor] | None:
        """function(*values), a list of tensors, or None if it has to be computed eagerly. `values` are
        tensors and hashable constants, in containers and dataclasses; `networks` are all those that it uses.
        It must not depend on anything else that changes, and tensors it changes must be among its results."""
        tensors: list[Tensor] = []
        key = flatten(values, tensors)
        if type(tensors[0]) is not Tensor or backend.is_capturing():  # a fake tensor, or within another graph
            return None
        kind = tensors[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = key, autocast, torch.is_inference_mode_enabled()
        state = state_of(networks)
        if state != self.state:  # weights moved, or an adapter was attached or got another scale
            self.__init__()
            self.state = state
        if key not in self.seen:
            self.seen.add(key)
            return None
        if key not in self.graphs:
            self.graphs[key] = self._record(function, values, tensors)
        graph = self.graphs[key]
        return graph and graph(tensors)

    def _record(self, function: Callable, values: tuple, tensors: list[Tensor]) -> "Graph | None":
        """A new graph. Where there can be none, None with a line on stderr; ValueError with --graph on."""
        try:
            if None in self.state:
                raise RuntimeError("hooks of modules run in Python")
            if sum(map(bool, self.graphs.values())) == MOST:
                raise RuntimeError(f"there are graphs for {MOST} shapes already")
            self.memory = self.memory or backend.memory(tensors[0].device)
            return Graph(function, values, tensors, self.memory)
        except Exception as error:  # whatever it is: eager goes on
            reason = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("RuntimeError: ")
        if _choice == "on":
            raise ValueError(f"--graph on: {reason}")
        if reason not in _printed and os.environ.get("RANK", "0") == "0":
            print(f"graph: eager, {reason}", file=sys.stderr)
        _printed.add(reason)
        return None


class Graph:
    """A function, recorded on tensors of its own, into which the arguments of each call are copied.
    RuntimeError if a replay differs from the eager function."""

    def __init__(self, function: Callable, values: tuple, tensors: list[Tensor], memory: dict):
        self.inputs = [t.detach().clone() for t in tensors]
        values = refill(values, iter(self.inputs))
        gpus = [t.device for t in tensors[:1] if t.is_cuda]
        with _alone(gpus):
            expected = [t.clone() for t in function(*values)]
        with _alone(gpus, recording=True):
            # Another seed than that of the comparison, which then fails if random numbers were recorded.
            torch.manual_seed(0)
            self.replay, self.results = backend.capture(lambda: function(*values), memory)
        with _alone(gpus):
            for result in self.results:
                result.fill_(float("nan"))
            self.replay()
        if not all(map(same_bits, self.results, expected)):
            raise RuntimeError("a replay differs from the eager computation")

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, tensors)
        self.replay()
        return self.results


@contextmanager
def _alone(gpus: list[torch.device], *, recording: bool = False) -> Iterator[None]:
    """Leave the random state as it was, and no weights in autocast's cache, whose memory ends with it."""
    global capturing
    cached, capturing = torch.is_autocast_cache_enabled(), recording
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng(gpus, device_type="cuda"):
            yield
    finally:
        capturing = False
        torch.set_autocast_cache_enabled(cached)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def flatten(value: object, tensors: list[Tensor]) -> Hashable:
    """Append the tensors in `value` to a list. Returns what else a graph depends on."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((k, flatten(v, tensors)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(flatten(v, tensors) for v in value)
    return flatten(vars(value), tensors) if is_dataclass(value) else value


def refill(value: object, tensors: Iterator[Tensor]) -> object:
    """`value` with the next tensors in place of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {k: refill(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(refill(v, tensors) for v in value)
    return replace(value, **refill(vars(value), tensors)) if is_dataclass(value) else value


def state_of(networks: Iterable[nn.Module]) -> list:
    """What a recording holds of networks: the addresses of their tensors, and the scales of adapters. A
    module with hooks, which a recording would leave out, is None."""
    state: list = []
    rest = [*networks]
    while rest:
        module = rest.pop().__dict__  # an attribute of a module would take ten times as long
        if module["_forward_hooks"] or module["_forward_pre_hooks"] or module["_backward_hooks"]:
            state.append(None)
        if "scale" in module:
            state.append(module["scale"])
        for tensor in (*module["_parameters"].values(), *module["_buffers"].values()):
            if tensor is not None:
                state.append(tensor.data_ptr())
        rest += module["_modules"].values()
    return state
