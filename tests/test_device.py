"""A training step waits for nothing on a GPU. Here torch's `meta` stands for the GPU: it holds no numbers, so
whatever reads one fails by itself."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisd import registry
from minisd.data.order import Stream, batches
from minisd.device import send
from minisd.methods._base import Method
from minisd.training import loop
from minisd.training.distributed import Processes
from minisd.training.optim import AdamW
from minisd.training.step import Trainer
from tests.helpers import mostly_slow
from tests.test_methods import METHODS, NEEDS

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """`meta` has none."""
    monkeypatch.setattr(Method, "autocast", lambda self: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


class Copies(TorchDispatchMode):
    """Count the copies from the CPU to the device, and fail at one that waits."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.pinned = 0, {}
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        from_list = torch.tensor

        def checked(data, **kwargs):
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "a copy of a list, which waits"
            return from_list(data, **kwargs)

        monkeypatch.setattr(torch, "tensor", checked)

    def pin(self, tensor):
        """As Tensor.pin_memory, which needs a GPU."""
        self.pinned[tensor.data_ptr()] = tensor  # kept, so that no other tensor gets its address
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        on_cpu = [
            t for t in tensors if t.device.type == "cpu" and t.ndim
        ]  # a number of no dimensions is passed on
        if on_cpu and any(t.device == META for t in [*tensors, *made]):
            assert function is torch.ops.aten._to_copy.default, (
                f"{function} of tensors on the CPU and the device"
            )
            assert on_cpu[0].data_ptr() in self.pinned and kwargs["non_blocking"], "a copy that waits"
            self.count += 1
        return result


CASES = [(method, {}) for method in METHODS if method != "reward"]  # whose function looks at images
CASES += [
    ("text_to_image", {"cache_latents": False, "train_text_encoder": False, "input_perturbation": 0.1}),
    ("text_to_image", {"snr_gamma": 5.0, "dream_training": True}),
    ("lora", {"with_prior_preservation": True, "class_prompt": "a cat", "train_text_encoder": True}),
    ("unconditional", {"prediction_type": "sample", "gradient_checkpointing": True}),
]


@pytest.mark.parametrize("method, changes", mostly_slow(CASES, *CASES[: len(METHODS) - 1]), ids=str)
def test_a_step_waits_for_nothing(method, changes, short_run, cat, monkeypatch):
    o = short_run(method, *NEEDS.get(method, []), class_data_dir=cat, **changes)
    m = registry.load_class("methods", method)(o, META)
    trained, (dataset, _) = m.setup(), m.datasets()
    trainer, stream = Trainer(m, trained, len(dataset), Processes()), Stream(dataset, o.seed)
    if getattr(o, "cache_latents", False):
        stream.moments = {v: (torch.zeros(4, 8, 8), torch.ones(4, 8, 8)) for v in dataset.views() or []}
    source = batches(stream, first=0, count=8, batch_size=o.train_batch_size)
    m.sd.schedule.at(torch.zeros(1, dtype=torch.long, device=META))  # copied once
    with Copies(monkeypatch) as copies:
        trainer.update(source)
        sent = [v for k, v in m.inputs(next(source)).items() if isinstance(v, torch.Tensor) and k != "text"]
        copies.count = 0
        loss, norm, _ = trainer.update(source)
    assert loss.device == norm.device == META
    text = copies.count - len(
        sent
    )  # token ids, or none where the text encoder is frozen and knows the prompts
    assert text in (0, 1) and (
        text or method in ("autoencoder", "unconditional") or not m.trains("text_encoder")
    )


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: torch.arange(3).to(META),
        lambda x: torch.arange(3).to(META, non_blocking=True),
        lambda x: x[torch.tensor([2, 0])],
        lambda x: x.copy_(torch.arange(3.0)),
        lambda x: torch.tensor([1.0, 2.0], device=META),
    ],
)
def test_what_waits_is_found(wait, monkeypatch):
    x = torch.zeros(3, device=META)
    with Copies(monkeypatch), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        wait(x)
    with Copies(monkeypatch) as copies:
        assert send(torch.arange(3), META).device == META and copies.count == 1
    cpu = torch.arange(3)
    assert send(cpu, cpu.device) is cpu


def test_fp16_waits_for_nothing():
    """An update whose gradient has overflowed changes nothing, and no number is read to find that out."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    mine, scaler = AdamW([ours], **settings), torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = AdamW([theirs], **settings)
    for gradient in (1.0, float("inf"), -3.0):
        before, steps = ours.detach().clone(), mine.steps.clone()
        ours.grad = torch.full((3,), 4 * gradient)
        scaler.scale(torch.zeros(()))
        with Reads():
            scaler.unscale_(mine)
            scaler.step(mine, torch.tensor(2.0))
        scaler.update(4.0)
        if gradient == float("inf"):
            assert torch.equal(ours, before) and torch.equal(mine.steps, steps)
        else:
            theirs.grad = torch.full((3,), gradient)
            plain.step(torch.tensor(2.0))
            assert torch.equal(ours, theirs) and not torch.equal(ours, before)
    assert mine.steps.item() == 2 and mine.found_inf is None


@pytest.mark.parametrize("fixed", [False, True])
def test_new_captions_are_encoded_together(fixed, short_run, monkeypatch):
    """On a GPU, and kept there; by --deterministic each alone, whatever else is in its batch."""
    m = registry.load_class("methods", "lora")(short_run("lora"), META)
    m.setup()
    m.options.deterministic, asked, encode = fixed, [], m.sd.encode_text
    monkeypatch.setattr(m.sd, "encode_text", lambda prompts: asked.append(prompts) or encode(prompts))
    with Copies(monkeypatch):
        for prompts in (["a", "b", "a"], ["b", "c"], ["c", "a"]):
            assert m.frozen_context(prompts).shape[:2] == (len(prompts), 77)
    assert asked == ([["a"], ["b"], ["c"]] if fixed else [["a", "b"], ["c"]])
    assert {context.device for context in m.contexts.values()} == {META}


def test_losses_are_read_every_ten_updates():
    flushed = []
    options = SimpleNamespace(validation_interval=lambda epoch: 0)
    method = SimpleNamespace(device=META, options=options, save_interval=lambda epoch: 0)
    log = SimpleNamespace(flush=lambda: flushed.append(step))
    folder = SimpleNamespace(written=lambda wait: None)
    trainer = SimpleNamespace(method=method, total=25, updates_per_epoch=5, processes=Processes())
    for step in range(1, 26):
        trainer.step = step
        loop.after_update(trainer, None, folder, log)
    assert flushed == [10, 20, 25]
