"""Networks as CUDA graphs, by a stand-in that replays on a CPU; and torch.compile of the UNet."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minisd import graph, ops, registry
from minisd.adapters import lora
from minisd.data.datasets import Captioned
from minisd.device import configure
from minisd.models import controlnet, unet
from minisd.models.layers import to_channels_last
from minisd.sampling.generate import Control, Denoiser, Settings, pictures, text_branches
from minisd.training.distributed import Processes
from minisd.training.step import Trainer
from tests import lora_helpers, method_helpers
from tests.helpers import TINY_UNET, mostly_slow
from tests.kernel_helpers import needs_gpu
from tests.method_helpers import outputs, refuses, same
from tests.test_methods import METHODS, NEEDS


class StandIn(graph.CUDA):
    """Replays by calling the function again, with the tensors that it was recorded with. As with CUDA,
    results hold nothing before the first replay, nor after one of another graph in the same memory."""

    device = "cpu"

    def __init__(self):
        self.recorded, self.replays = 0, 0

    def is_available(self):
        return True

    def is_capturing(self):
        return False

    def memory(self, device):
        return {"results": []}

    def capture(self, function, memory):
        self.recorded += 1
        results = function()
        memory["results"] += results

        def replay():
            self.replays += 1
            for result in memory["results"]:
                result.fill_(float("nan"))
            for result, new in zip(results, self.call(function), strict=True):
                result.copy_(new)

        return replay, results

    def call(self, function):
        return function()


class Raises(StandIn):
    def capture(self, function, memory):
        self.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand a second line")


class Differs(StandIn):
    """By the last bit of one value."""

    def call(self, function):
        first, *rest = [result.clone() for result in function()]
        first.view(torch.int32).view(-1)[-1:] ^= 1
        return [first, *rest]


class KeepsRandomNumbers(StandIn):
    """A recording whose random numbers no longer depend on the seed."""

    def capture(self, function, memory):
        self.state = torch.get_rng_state()
        return super().capture(function, memory)

    def call(self, function):
        torch.set_rng_state(self.state)
        return function()


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(): from now on graphs are used, replayed by a new StandIn, which is returned."""

    def use(cls=StandIn):
        backend = cls()
        monkeypatch.setattr(graph, "backend", backend)
        graph.choose("auto")
        return backend

    yield use
    monkeypatch.undo()
    graph.choose("auto")


# ------------------------------ Sampling

SIZES = {"width": 32, "height": 32, "steps": 5}


def draw(sd, *prompts, **changes) -> list[bytes]:
    settings = Settings(**SIZES | changes)
    return [p.tobytes() for p in pictures(sd, prompts, range(len(prompts)), settings, batch_size=1)]


def test_pictures_are_the_same(sd, stand_in):
    """The second and third picture need no recording of their own; another size needs one."""
    prompts = "a cat", "a dog", "(a:1.3) bird"
    expected, wide = draw(sd, *prompts), draw(sd, "a cat", width=64)
    assert len({*expected}) == 3
    backend = stand_in()
    assert draw(sd, *prompts) == expected
    assert backend.recorded == 1 and backend.replays == 1 + 4 + 5 + 5  # one is compared with the eager step
    assert draw(sd, "a cat", width=64) == wide and backend.recorded == 2
    assert draw(sd, *prompts) == expected and backend.recorded == 2


def test_guidance_and_longer_prompts_have_graphs_of_their_own(sd, stand_in):
    long = "a very long prompt about cats, " * 12
    cases = [("a cat", {}), ("a cat", {"guidance_scale": 1.0}), (long, {}), ("a cat", {})]
    expected = [draw(sd, prompt, **changes) for prompt, changes in cases]
    backend = stand_in()
    assert [draw(sd, prompt, **changes) for prompt, changes in cases] == expected
    assert backend.recorded == 3


def test_adapters(model, tmp_path, stand_in):
    """Attached, at other scales, off: what is drawn is what the eager network draws."""
    source, file = lora_helpers.new(model), tmp_path / "a.safetensors"
    lora.save(file, source[1])

    def story(sd):
        drawn = [draw(sd, "a cat")]
        sd.attach(file, 0.8)
        drawn.append(draw(sd, "a cat"))
        for scale in (0.3, 0.0, 0.3):
            sd.rescale("a", scale)
            drawn.append(draw(sd, "a cat"))
        return drawn

    expected = story(lora_helpers.fresh(model))
    assert expected[0] == expected[3] and len({str(d) for d in expected}) == 3
    backend = stand_in()
    assert story(lora_helpers.fresh(model)) == expected and backend.recorded == 5


def test_weights_that_move_or_change(sd, stand_in):
    """Other values in the same place need no new recording, the same values in another place do."""
    other = {n: 1.05 * t for n, t in sd.unet.state_dict().items()}
    before = draw(sd, "a cat")
    backend = stand_in()
    assert draw(sd, "a cat") == before
    sd.unet.load_state_dict(other)
    after = draw(sd, "a cat")
    assert after != before and backend.recorded == 1
    bias = sd.unet.conv_out.bias
    bias.data = bias.data.clone()
    assert draw(sd, "a cat") == after and backend.recorded == 2
    graph.choose("off")
    assert draw(sd, "a cat") == after and backend.recorded == 2


TINY_CONTROL = controlnet.ControlNetConfig.of(TINY_UNET, (16, 32, 96))


def networks():
    torch.manual_seed(0)
    both = unet.UNet(TINY_UNET), controlnet.ControlNet(TINY_CONTROL)
    for network in both:
        method_helpers.shake(network.eval().requires_grad_(False))
    return both


@pytest.mark.parametrize("guess", [False, True])
def test_controlnets(guess, stand_in):
    """Of eight steps one acts in all, the other in the last four: each combination is recorded once."""
    net, control = networks()
    other = networks()[1]
    context, negative, x = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.randn(2, 4, 8, 8)
    branches = text_branches(context, negative, 3.0)

    def steps(seed):
        hint = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        controls = (
            Control(network=control, hint=hint, scale=0.7, guess=guess),
            Control(network=other, hint=1 - hint, start=0.5),
        )
        denoise, preds = Denoiser(net, branches, controls, steps=8), []
        for step in range(8):
            denoise.step = step
            with torch.no_grad():
                preds.append(denoise(x, 900 - 100 * step))
        return preds

    expected = [steps(0), steps(1)]
    assert not torch.equal(expected[0][0], expected[1][0])
    backend = stand_in()
    for ours, theirs in zip([steps(0), steps(1)], expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert backend.recorded == 4  # each picture comes back to the first combination


def test_gradients_through_a_denoiser_are_eager(stand_in):
    net, _ = networks()
    backend, x = stand_in(), torch.randn(1, 4, 8, 8, requires_grad=True)
    denoise = Denoiser(net, text_branches(torch.randn(1, 5, 24), None, 1.0))
    for _ in range(3):
        assert torch.autograd.grad(denoise(x, 5).square().sum(), x)[0].abs().max() > 0
    assert backend.recorded == 0


def test_a_network_that_is_gone_leaves_nothing(stand_in):
    stand_in()
    net, _ = networks()
    denoise = Denoiser(net, text_branches(torch.randn(1, 5, 24), None, 1.0))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            denoise(x, 5)
    assert len(graph._of) == 1
    gone = weakref.ref(net)
    del net, denoise
    gc.collect()
    # The stand-in's replays keep the function, and so the network; a CUDA graph does not.
    graph.forget()
    gc.collect()
    assert gone() is None and len(graph._of) == 0


# ------------------------------ Where there can be none


@pytest.mark.parametrize(
    "cls, reason",
    [
        (Raises, "operation not permitted when stream is capturing"),
        (Differs, "a replay differs from the eager computation"),
    ],
)
def test_what_fails_stays_eager(cls, reason, sd, stand_in, capsys):
    """Said once and remembered; with --graph on it is an error."""
    expected = draw(sd, "a cat", "a dog")
    backend = stand_in(cls)
    capsys.readouterr()
    assert draw(sd, "a cat", "a dog") == expected
    assert capsys.readouterr().err == f"graph: eager, {reason}\n"
    assert backend.recorded == 1
    graph.choose("on")
    with pytest.raises(ValueError, match=f"^--graph on: {reason}$"):
        draw(sd, "a cat")


def test_hooks_are_called(sd, stand_in, capsys):
    backend, calls = stand_in(), []
    draw(sd, "a cat")
    hook = sd.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    capsys.readouterr()
    draw(sd, "a cat")
    assert len(calls) == 5 and "graph: eager, hooks of modules run in Python" in capsys.readouterr().err
    hook.remove()
    draw(sd, "a cat")
    assert len(calls) == 5 and backend.recorded == 2


def test_there_are_not_more_graphs_than_that(stand_in, capsys, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 2)
    backend, graphs = stand_in(), graph.Graphs()
    for _ in range(3):
        for n in (1, 2, 3, 1):
            found = graphs([], lambda x: [2 * x], torch.ones(n))
            assert found is None or torch.equal(found[0], 2 * torch.ones(n))
    assert (
        backend.recorded == 2
        and capsys.readouterr().err == "graph: eager, there are graphs for 2 shapes already\n"
    )


def test_the_key():
    """Shapes, layouts, precisions and constants make another graph; values do not."""

    def key(*values):
        tensors = []
        return graph.flatten(values, tensors), len(tensors)

    x = torch.randn(2, 4, 3, 3)
    assert key(x, {"a": [x, 1.0]}) == key(x + 1, {"a": [x - 1, 1.0]}) and key(x, {"a": [x]})[1] == 2
    others = [x[:1], x.half(), x.to(memory_format=torch.channels_last), [x], 1.0]
    assert len({key(x), *map(key, others)}) == 6
    values = {"a": [x, (x, 1.0)], "b": Control(network="n", hint=x)}
    tensors = [torch.full((1,), float(i)) for i in range(3)]
    again = graph.refill(values, iter(tensors))
    assert again["a"][0] is tensors[0] and again["a"][1] == (tensors[1], 1.0)
    assert again["b"].hint is tensors[2] and again["b"].network == "n"


def test_bits():
    nan = torch.tensor([float("nan"), 1.0])
    assert graph.same_bits(nan, nan.clone()) and not graph.same_bits(torch.zeros(1), -torch.zeros(1))
    assert graph.same_bits(nan.half(), nan.half()) and not graph.same_bits(nan, torch.ones(2))


def test_the_flag_where_there_is_no_gpu(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, flags in [("sample.py", ["--prompt", "x"]), ("train.py", ["--method", "lora", "--data", "d"])]:
        status, out, err = command(name, *flags, "--graph", "on")
        assert status == 2 and err.splitlines()[-1].endswith("--graph on: CUDA graphs need an NVIDIA GPU"), (
            err
        )
    status, _, err = command("train.py", "--method", "autoencoder", "--data", "d", "--compile")
    assert status == 2 and "--compile is for UNets, and this method trains none" in err


# ------------------------------ Training

ACCUMULATED = ["--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
RUNS = [(method, []) for method in METHODS]
RUNS += [(method, ["--gradient_checkpointing"]) for method in ("autoencoder", "controlnet", "lora")]
RUNS += [
    ("text_to_image", ["--dream_training", "--mixed_precision", "bf16", "--snr_gamma", "5"]),
    ("lora", ["--lora_dropout", "0.5", "--train_text_encoder"]),
    ("lora", ["--lora_dropout", "0.5", "--gradient_checkpointing", "--mixed_precision", "bf16"]),
    ("dreambooth", ["--adam_beta1", "0.5", "--max_grad_norm", "1e-3"]),
]
ORDINARY = [(method, []) for method in ("controlnet", "text_to_image", "unconditional")]
ORDINARY += [
    ("lora", ["--gradient_checkpointing"]),
    ("lora", ["--lora_dropout", "0.5", "--train_text_encoder"]),
]


def trained(
    method, o, updates: int = 3, scaler=None, device: str = "cpu"
) -> tuple[list[torch.Tensor], Trainer]:
    """What some updates leave: losses and norms, parameters, and their averages."""
    torch.manual_seed(0)  # as the loop does; LoRA draws from it
    m = registry.load_class("methods", method)(o, torch.device(device))
    parameters = m.setup()
    m.datasets()
    trainer, stream = Trainer(m, parameters, 8, Processes()), method_helpers.Stream(m.data, o.seed)
    trainer.scaler = scaler or trainer.scaler
    count = updates * o.gradient_accumulation_steps
    batches = iter([method_helpers.collate([stream[2 * k], stream[2 * k + 1]]) for k in range(count)])
    left = [value for _ in range(updates) for value in trainer.update(batches)[:2]]
    left += [p.detach().clone() for p in parameters.values()]
    return left + (trainer.ema.average if trainer.ema else []), trainer


@pytest.mark.parametrize("method, flags", mostly_slow(RUNS, *ORDINARY), ids=str)
def test_training_is_the_same(method, flags, short_run, stand_in):
    """To the bit, with accumulation, and averages where a method has them."""
    o = short_run(method, *ACCUMULATED, *NEEDS.get(method, []), *flags)
    eager, _ = trained(method, o)
    backend = stand_in()
    ours, _ = trained(method, o)
    assert all(map(graph.same_bits, ours, eager))
    assert backend.recorded == 1 and backend.replays == 2 * 3  # the first is eager, the second compared


def both_runs(method, o, stand_in, folder) -> StandIn:
    """Train to the end without graphs and with them: the same files, log and images."""
    left = []
    for name in ("eager", "graph"):
        backend = stand_in() if name == "graph" else None
        assert method_helpers.train(method, replace(o, output_dir=folder / name)) == 0
        left.append(outputs(folder / name))
    same(*left)
    for file in ("log.jsonl", "result.png"):
        assert (folder / "eager" / file).read_bytes() == (folder / "graph" / file).read_bytes()
    return backend


def test_a_run_leaves_the_same_bytes(short_run, stand_in, tmp_path):
    """With averages, whose images have a graph of their own, as there the weights are elsewhere; those before
    the first update have another."""
    flags = "--use_ema", "--center_crop", "--validation_prompt", "a cat", "--mixed_precision", "bf16"
    o = short_run("text_to_image", *ACCUMULATED, *flags, "--max_train_steps", 4, validation_steps=2)
    assert both_runs("text_to_image", o, stand_in, tmp_path).recorded == 3


@pytest.mark.slow
def test_every_bucket_has_a_graph(short_run, stand_in, tmp_path, monkeypatch):
    """Also one that is recorded in the middle of an update, to whose gradients it adds."""
    sizes = "--resolution", 64, "--train_batch_size", 1, "--max_train_steps", 10
    init = Captioned.__init__  # with more buckets than this network's own step has
    monkeypatch.setattr(Captioned, "__init__", lambda self, *a, **k: init(self, *a, **k | {"step": 8}))
    o = short_run("text_to_image", *ACCUMULATED, "--bucket", *sizes)
    assert both_runs("text_to_image", o, stand_in, tmp_path).recorded >= 3


@pytest.mark.parametrize("accumulation", mostly_slow([1, 3], 1))
def test_the_scale_of_the_loss(accumulation, short_run, stand_in):
    """It grows with every second update until gradients overflow, and is halved; a replay reads it anew."""
    o = short_run("lora", *NEEDS["lora"], gradient_accumulation_steps=accumulation)
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=2.0**125, growth_interval=2)  # noqa: E731
    eager, trainer = trained("lora", o, 6, scaler())
    backend = stand_in()
    ours, again = trained("lora", o, 6, scaler())
    assert all(map(graph.same_bits, ours, eager)) and backend.replays == 6 * accumulation
    assert again.scaler.get_scale() == trainer.scaler.get_scale() != 2.0**125


@pytest.mark.parametrize(
    "cls, flags, reason",
    [(KeepsRandomNumbers, ["--lora_dropout", "0.5"], "a replay differs"), (Raises, [], "operation not perm")],
)
def test_training_goes_on_without_a_graph(cls, flags, reason, short_run, stand_in, capsys):
    """Also where the dropout of a graph would be the same in every step. Nothing is kept for graphs."""
    o = short_run("lora", *ACCUMULATED, *NEEDS["lora"], *flags)
    eager, _ = trained("lora", o)
    backend = stand_in(cls)
    capsys.readouterr()
    ours, trainer = trained("lora", o)
    assert all(map(graph.same_bits, ours, eager)) and backend.recorded == 1 and not trainer.gradients
    assert capsys.readouterr().err.count(f"graph: eager, {reason}") == 1


# ------------------------------ torch.compile


@pytest.fixture
def compiles(monkeypatch):
    """A list of the graphs that torch.compile makes, none with a break in it."""
    made, real = [], torch.compile

    def backend(module, inputs):
        made.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda *a, **k: real(*a, **k | {"backend": backend, "fullgraph": True})
    )
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_unet_draws_the_same(sd, compiles):
    ops.choose("auto")
    updates = lora.insert(lora.networks(sd), ["attention"], 2, 2.0)
    lora_helpers.randomised(updates)
    expected = draw(sd, "a cat", "a dog")
    sd.unet.compile(dynamic=False)
    assert draw(sd, "a cat", "a dog") == expected and len(compiles) == 1
    for update in updates.values():
        update.scale = 0.5
    assert draw(sd, "a cat") != expected[:1] and len(compiles) == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]])
@pytest.mark.parametrize("method", ["lora", "controlnet", "unconditional"])
def test_a_compiled_unet_trains_the_same(method, flags, short_run, compiles):
    o = short_run(method, *NEEDS.get(method, []), *flags)
    eager, _ = trained(method, o, 2)
    ours, _ = trained(method, replace(o, compile=True), 2)
    assert len(compiles) == 1 + (method == "controlnet")
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ------------------------------ The layout


def test_torch_s_group_norm_keeps_the_layout(monkeypatch):
    """On a GPU it returns NCHW, from which the next 1x1 convolution would take the slower of its two ways."""
    theirs = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *a: theirs(*a).contiguous())
    x, w = torch.randn(2, 8, 4, 4), torch.ones(8)
    for add in (None, torch.randn(2, 8)):
        for layout in (torch.channels_last, torch.contiguous_format):
            y = ops.group_norm(x.contiguous(memory_format=layout), 2, w, w, 1e-5, silu=True, add=add)
            assert y.is_contiguous(memory_format=layout)


# ------------------------------ On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sampling_on_the_gpu(dtype):
    """Five steps and a second picture: replayed, the same bits."""
    graph.choose("off")
    net, control = (to_channels_last(network.to("cuda", dtype)) for network in networks())
    g = torch.Generator().manual_seed(1)

    def picture():
        draw = lambda *shape: torch.randn(shape, generator=g).to("cuda", dtype)  # noqa: E731
        steered = Control(network=control, hint=draw(2, 3, 32, 32), end=0.5)
        denoise = Denoiser(net, text_branches(draw(2, 5, 24), draw(2, 5, 24), 3.0), [steered], steps=10)
        x, preds = draw(2, 4, 8, 8).float(), []
        for step in range(10):
            denoise.step = step
            with torch.no_grad():
                preds.append(denoise(x, 900 - 50 * step))
        return preds

    expected = [*picture(), *picture()]
    g.manual_seed(1)
    graph.choose("on")
    ours = [*picture(), *picture()]
    graph.choose("auto")
    assert all(map(graph.same_bits, ours, expected))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]], ids=str)
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_training_on_the_gpu(method, precision, flags, short_run):
    """--graph on against off, with accumulation and deterministic algorithms: the same bits."""
    if any(refuses(method, flag.removeprefix("--")) for flag in flags):
        return
    o = short_run(method, *ACCUMULATED, *NEEDS.get(method, []), *flags, "--mixed_precision", precision)
    o = replace(o, deterministic=True)
    off, on = (trained(method, replace(o, graph=g), 4, device="cuda")[0] for g in ("off", "on"))
    configure(replace(o, deterministic=False))
    assert all(map(graph.same_bits, on, off))


@pytest.mark.gpu
@needs_gpu
def test_dropout_on_the_gpu(short_run):
    """A replay draws from the seed that it finds."""
    graphs, x = graph.Graphs(), torch.ones(1000, device="cuda")
    graph.choose("on")
    for seed in (1, 2, 3, 2):
        torch.manual_seed(seed)
        found = graphs([], lambda x: [F.dropout(x, 0.5)], x)
        torch.manual_seed(seed)
        assert found is None or torch.equal(found[0], F.dropout(x, 0.5))
    graph.choose("auto")
    assert found is not None
