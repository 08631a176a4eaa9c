"""--shard fsdp: processes with a part each train what processes with everything do."""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minisd import files
from minisd.formats import config_json
from minisd.models.unet import UNet, UNetConfig
from minisd.options import Average
from minisd.training import averaging, checkpoint, distributed, optim, sharding
from tests.conftest import PAIRED, ROOT
from tests.helpers import TINY_PIXELS
from tests.method_helpers import make_pairs, options, outputs, same, train
from tests.test_distributed import ENV, TWO, start
from tests.test_methods import NEEDS

# Its last layer has one row, of which the second of two processes has none.
SMALL = UNetConfig(
    block_out_channels=(16, 16),
    attention=(True, False),
    num_heads=(2, 2),
    cross_attention_dim=8,
    norm_num_groups=8,
    layers_per_block=1,
    out_channels=1,
)


class Run:
    """A network with its optimizer and average, and what is done with the gradients."""

    def __init__(self, network: UNet, kind, processes: distributed.Processes):
        self.network, self.trained = network, dict(network.named_parameters())
        given = [[network], self.trained] if kind is sharding.Sharding else [[*self.trained.values()]]
        self.averaging = kind(*given, processes, torch.float32)
        self.parameters = [*self.trained.values()]
        self.optimizer = optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        self.ema, self.updates = optim.EMA(self.parameters, Average(use_ema=True)), 0

    def backward(self, batches: list[tuple]) -> torch.Tensor:
        """The gradients of a mean. Returns the last loss."""
        for batch in batches:
            if batch is batches[-1]:
                self.averaging.begin()
            loss = self.network(*batch).square().mean()
            loss.backward()
        return self.averaging.finish(loss.detach())

    def norm(self) -> torch.Tensor:
        return self.averaging.norm(optim.grad_norm(self.parameters))

    def move(self, norm: torch.Tensor) -> None:
        self.optimizer.step(optim.clip_divisor(norm, 1e-3))
        self.optimizer.zero_grad()
        self.updates += 1
        self.ema.update(self.updates)

    def state(self) -> dict[str, torch.Tensor]:
        found = dict(self.trained)
        for (name, p), average in zip(self.trained.items(), self.ema.average, strict=True):
            found |= {f"{name}|{k}": v for k, v in self.optimizer.state[p].items()}
            found[f"{name}|average"] = average
        return found


def in_parts() -> None:
    """In one of two processes."""
    processes = distributed.Processes()
    torch.manual_seed(0)
    network = UNet(SMALL)
    networks = network, copy.deepcopy(network).to(memory_format=torch.channels_last)
    both = averaging.Averaging, sharding.Sharding
    whole, parts = (Run(n, kind, processes) for n, kind in zip(networks, both, strict=True))
    draw = torch.Generator().manual_seed(processes.rank)
    for _ in range(3):
        batches = []
        for _ in range(2):
            x, context = (torch.randn(shape, generator=draw) for shape in ((1, 4, 8, 8), (1, 3, 8)))
            batches.append((x, torch.tensor([5]), context))
        losses = [run.backward(batches) for run in (whole, parts)]
        assert torch.equal(*losses)
        for name, p in parts.trained.items():
            mean = parts.averaging.part(name, whole.trained[name].grad)
            assert (p.grad - mean).abs().sum() <= 1e-5 * whole.trained[name].grad.abs().max() * mean.numel()
        assert parts.norm().item() == pytest.approx(whole.norm().item(), rel=1e-6)
        # autograd sums in another order: from here on the bits are equal
        for name, p in parts.trained.items():
            p.grad.copy_(parts.averaging.part(name, whole.trained[name].grad))
        norm = whole.norm()
        for run in (whole, parts):
            run.move(norm)
    ours, own = whole.state(), parts.state()
    assert ours.keys() == own.keys()
    for key, tensor in own.items():
        joined = parts.averaging.joined(key, tensor)
        assert joined.shape == ours[key].shape
        joined = joined if joined is tensor else joined.full_tensor()
        assert torch.equal(joined, ours[key]), key
        assert torch.equal(parts.averaging.part(key, joined), tensor), key
    assert own["conv_out.weight"].numel() == (0 if processes.rank else ours["conv_out.weight"].numel())
    size, most = (sum(t.nbytes for t in tensors.values()) for tensors in (own, ours))
    assert 0.45 < size / most < 0.55

    # Whole networks compute without the other process, and are saved.
    with torch.no_grad(), whole.ema.applied(), parts.ema.applied(), parts.averaging.whole():
        for _ in range(1 + processes.rank):
            assert torch.equal(*(n(*batches[0]) for n in networks))
            tensors = networks[1].state_dict()
            assert all(torch.equal(tensors[n], ours[n]) and type(tensors[n]) is torch.Tensor for n in tensors)
            files.write(Path(tempfile.gettempdir(), f"{processes.rank}.safetensors"), tensors)
    assert torch.equal(*(run.backward(batches) for run in (whole, parts)))  # and are in parts again

    # What is not finite in one process is passed over by both.
    scaler, before = parts.averaging.scaler("cpu", True), own["conv_in.bias"].clone()
    for p in parts.parameters:
        p.grad = torch.full_like(p, float("inf") if processes.rank else 1.0)
    scale = scaler.scale(torch.ones(())).item()
    scaler.unscale_(parts.optimizer)
    scaler.step(parts.optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2 and torch.equal(own["conv_in.bias"], before)
    processes.close()


def test_two_processes_with_a_part_each(tmp_path):
    """Gradients are those of everything in both, up to rounding; and what follows from them to the bit."""
    code = "from tests.test_sharding import in_parts; in_parts()"
    done = subprocess.run(
        [*TWO, "--no-python", sys.executable, "-c", code],
        capture_output=True, text=True, env=ENV | {"TMPDIR": str(tmp_path)}, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("text_to_image", ["--compile"], "--shard and --compile exclude each other"),
        ("text_to_image", ["--plan"], "--shard and --plan exclude each other"),
        ("text_to_image", ["--use_8bit_adam"], "--shard and --use_8bit_adam exclude each other"),
        ("text_to_image", ["--optimizer", "torch.optim.SGD"], "--shard and --optimizer exclude each other"),
        ("text_to_image", [], "--shard is for several processes"),
        ("erase", ["--erase", "a cat"], "--shard is refused: processes draw differently many steps"),
        ("autoencoder", [], "--shard is refused: its memory is taken by activations"),
    ],
)
def test_refused(method, flags, message, model, captioned, tmp_path, command):
    data = [] if method == "erase" else ["--data", captioned]
    flags = "--method", method, "--model", model, *data, "--shard", "fsdp", *flags
    status, _, error = command("train.py", *flags, "--output_dir", tmp_path / "out")
    assert status == 2 and error.endswith(f": error: {message}\n") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_trains_beside_frozen_weights_is_refused():
    network, row = UNet(SMALL).requires_grad_(False), torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="for networks that train as a whole, and rows is in none"):
        sharding.Sharding([network], {"rows": row}, distributed.Processes(), torch.float32)


def close(a: Path, b: Path, first: int, last: int) -> None:
    """Two runs' checkpoints have the same tensors. They differ by 2 % of what a parameter moved between two
    of them, and of the optimizer's state. Not so biases of keys, whose gradients are nothing but rounding:
    softmax takes no notice of them."""
    ours, theirs = outputs(a / f"checkpoint-{last}"), outputs(b / f"checkpoint-{last}")
    begun = load_file(b / f"checkpoint-{first}" / "trained.safetensors")
    assert ours.keys() == theirs.keys() == {"trained.safetensors", "optimizer.safetensors"}
    for file, tensors in theirs.items():
        assert checkpoint.layout(ours[file]) == checkpoint.layout(tensors)
        for name, value in tensors.items():
            if name.partition("|")[0].endswith(("k_proj.bias", "to_k.bias")):
                continue
            size = (value - begun[name] if name in begun else value).abs().max()
            assert (ours[file][name] - value).abs().max() <= 0.02 * size, name


def run(out: Path, *flags) -> Path:
    """A run of two processes."""
    done = start(*flags, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").open()]


PARTS = "--shard", "fsdp"


@pytest.mark.slow
def test_runs_in_parts_and_whole(model, captioned, tmp_path):
    """A run goes on from the checkpoint of the other kind, too, and in another number of processes."""
    flags = ["--method", "text_to_image", "--model", model, "--data", captioned, "--resolution", 32]
    flags += ["--train_text_encoder", "--use_ema", "--learning_rate", 1e-3, "--max_train_steps", 4]
    flags += ["--checkpointing_steps", 2, "--report_to", "none", "--num_validation_images", 3]
    flags += ["--validation_split", 1, "--validation_steps", 2, "--train_batch_size", 1]
    whole, parts = run(tmp_path / "whole", *flags), run(tmp_path / "parts", *flags, *PARTS)
    close(parts, whole, 2, 4)
    for ours, theirs in zip(log(parts), log(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    before = Path("validation", "step-000000.png")
    assert (parts / before).read_bytes() == (whole / before).read_bytes()

    def resumed(name: str, of: Path, *more) -> Path:
        return run(tmp_path / name, *flags, *more, "--resume_from_checkpoint", of / "checkpoint-2")

    again = outputs(resumed("again", parts, *PARTS))
    same(again, {file: tensors for file, tensors in outputs(parts).items() if file in again})
    assert {"checkpoint-4/optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"} <= again.keys()
    for on, of in ((resumed("parts to whole", parts), parts), (resumed("back", whole, *PARTS), whole)):
        third = [next(line["loss"] for line in log(out) if line["step"] == 3) for out in (on, of)]
        assert third[0] == third[1]  # by the same weights
        close(on, of, 2, 4)
    one = "--train_batch_size", 2, "--resume_from_checkpoint", parts / "checkpoint-2"
    o = options("text_to_image", *flags[2:], *one, "--output_dir", tmp_path / "one")
    assert train("text_to_image", o) == 0
    close(tmp_path / "one", parts, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["controlnet", "dpo", "dreambooth", "instruct_pix2pix", "unconditional"])
def test_methods(method, model, cat, tmp_path):
    """With accumulation, clipping and checkpointing."""
    data = make_pairs(tmp_path / "pairs") if method in PAIRED else cat
    flags = ["--method", method, "--data", data, "--resolution", 32, "--report_to", "none"]
    flags += ["--max_train_steps", 2, "--checkpointing_steps", 1, "--learning_rate", 1e-3]
    flags += ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.1]
    flags += ["--adam_epsilon", 1e-4]  # so that a gradient of rounding alone moves nothing by a whole step
    flags += ["--gradient_checkpointing", *NEEDS.get(method, [])]
    flags += ["--train", "full", "--rejected_image_column", "source"] if method == "dpo" else []
    if method == "unconditional":
        config_json.write(tmp_path, "unet2d", TINY_PIXELS)
        flags += ["--model_config_name_or_path", tmp_path / "config.json"]
    else:
        flags += ["--model", model, "--num_validation_images", 1]
    whole, parts = run(tmp_path / "whole", *flags), run(tmp_path / "parts", *flags, *PARTS)
    close(parts, whole, 1, 2)
    ours, theirs = outputs(parts), outputs(whole)
    assert ours.keys() == theirs.keys()
    assert all(checkpoint.layout(ours[file]) == checkpoint.layout(theirs[file]) for file in ours)
