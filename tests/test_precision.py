"""On a CPU that is faster in bf16 images are drawn in it; on others nothing changes."""

import functools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import minisd
from minisd import cli, device, files, ops, registry
from minisd.models import layers
from minisd.options import TINY
from minisd.sampling import infotext, run
from minisd.training import loop
from tests import method_helpers
from tests.conftest import ROOT
from tests.helpers import mostly_slow
from tests.picture_helpers import psnr

FLAGS = ["--prompt", "a cat", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def fast(monkeypatch):
    """A CPU that says that it is fast in bf16. Every CPU gives the result."""
    monkeypatch.setattr(ops, "has_bf16", lambda: True)
    monkeypatch.setattr(device, "has_fast_bf16", lambda kind: True)


@pytest.mark.parametrize("native, cost, faster", [(True, 2, True), (True, 0.5, False), (False, 2, False)])
def test_the_instructions_alone_are_not_enough(native, cost, faster, monkeypatch):
    """Fp32 costs `cost` times as much as bf16."""
    clock, product = [0.0], torch.Tensor.__matmul__

    def multiply(a, b):
        clock[0] += cost if a.dtype == torch.float32 else 1
        return product(a, b)

    monkeypatch.setattr(ops, "has_bf16", lambda: native)
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    assert device.has_fast_bf16.__wrapped__("cpu") is faster


def sample(*flags):
    (path,) = run.run(cli.parse_sample([*FLAGS, *map(str, flags)]))
    return path


def pixels(path):
    return np.asarray(Image.open(path))


def test_elsewhere_nothing_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "has_bf16", lambda: False)
    plain, given = (
        sample("--output", tmp_path / "a.png"),
        sample("--output", tmp_path / "b.png", "--dtype=fp32"),
    )
    assert "precision" not in capsys.readouterr().err and "dtype" not in infotext.read(plain)
    assert np.array_equal(pixels(plain), pixels(given))
    assert minisd.load(TINY, device="cpu").unet.conv_in.weight.dtype == torch.float32


def test_the_image_says_its_precision_and_is_drawn_again(fast, tmp_path, monkeypatch, capsys):
    low = sample("--output", tmp_path / "low.png")
    assert "precision: bf16" in capsys.readouterr().err and "dtype: bf16" in infotext.read(low)
    assert minisd.load(TINY, device="cpu").unet.conv_in.weight.dtype == torch.bfloat16
    high = sample("--output", tmp_path / "high.png", "--dtype", "fp32")
    assert not np.array_equal(pixels(low), pixels(high))
    again = sample("--like", low, "--output", tmp_path / "low2.png")
    assert np.array_equal(pixels(again), pixels(low)) and infotext.read(again) == infotext.read(low)
    with monkeypatch.context() as elsewhere:  # an image of another CPU says nothing
        elsewhere.setattr(device, "has_fast_bf16", lambda kind: False)
        other = sample("--output", tmp_path / "other.png")
    assert np.array_equal(pixels(sample("--like", other, "--output", tmp_path / "o.png")), pixels(other))


def test_a_cpu_that_is_fast_in_bf16(tmp_path):
    """This one, if it does: oneDNN's limit, which the other tests set, is lifted."""
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    asks = [sys.executable, "-c", "from minisd import device; print(device.has_fast_bf16('cpu'))"]
    if subprocess.run(asks, env=environment, capture_output=True, text=True, cwd=ROOT).stdout != "True\n":
        pytest.skip("this CPU does not")
    flags = [*FLAGS, "--output", str(tmp_path / "low.png")]
    subprocess.run([sys.executable, str(ROOT / "sample.py"), *flags], env=environment, check=True)
    assert "dtype: bf16" in infotext.read(tmp_path / "low.png")
    high = sample("--output", tmp_path / "high.png")
    assert 30 < psnr(pixels(tmp_path / "low.png"), pixels(high)) < math.inf


@functools.cache
def drawn(dtype, scheduler):
    """With the tiny model's own guidance; at 7.5 some schedulers amplify any difference, fp16's too."""
    sd = minisd.load(TINY, device="cpu", dtype=dtype)
    prompts = ["a red heart", "a green frog", "a house"]
    return sd.generate(prompts, scheduler=scheduler, steps=20, guidance_scale=3, seed=1, batch_size=3)


@pytest.mark.parametrize("scheduler", mostly_slow(registry.names("schedulers"), "ddim", "dpmpp_2m"))
def test_images_in_bf16_are_near_those_in_fp32(fast, scheduler):
    """At least 30 dB; on a processor with AVX-512 BF16 it was at least 39.9."""
    pairs = zip(drawn(torch.bfloat16, scheduler), drawn(torch.float32, scheduler), strict=True)
    assert min(psnr(low, high) for low, high in pairs) > 30


def errors(ours, theirs, exact):
    return [((y.double() - exact).norm() / exact.norm()).item() for y in (ours, theirs)]


def operands(c_in, c_out, side, batch=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c_in, side, side, generator=generator)
    weight = torch.randn(c_out, c_in, 3, 3, generator=generator) / (9 * c_in) ** 0.5
    x, weight = (t.bfloat16().to(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, torch.randn(c_out, generator=generator).bfloat16()


@pytest.mark.parametrize("c_in, c_out, side", [(24, 256, 4), (40, 64, 2), (8, 16, 1)])
def test_a_convolution_of_few_pixels_is_a_product(fast, c_in, c_out, side):
    x, weight, bias = operands(c_in, c_out, side)
    theirs = F.conv2d(x, weight, bias, padding=1)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    with torch.no_grad(), torch.profiler.profile() as profile:
        y = layers.conv3x3(x, weight, bias)
    assert not any("convolution" in event.key for event in profile.key_averages())
    assert y.is_contiguous(memory_format=torch.channels_last)
    ours, torchs = errors(y, theirs, exact)
    assert ours <= 2 * torchs


def test_its_gradients(fast):
    x, weight, bias = operands(24, 256, 4)
    dy = torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradients(convolve, dtype=torch.bfloat16):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(convolve(*inputs), inputs, dy.to(dtype))

    def convolve(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)

    found = gradients(layers.conv3x3), gradients(convolve), gradients(convolve, torch.float64)
    for each in zip(*found, strict=True):
        ours, torchs = errors(*each)
        assert ours <= 2 * torchs + 1e-3


@pytest.mark.parametrize("side", [8, 13])
def test_doubling_and_convolving_at_once(fast, side):
    """It errs at most twice as much as torch does one after the other, and an adapter or a hook stops it."""
    layer = layers.Upsample(16).bfloat16().to(memory_format=torch.channels_last).requires_grad_(False)
    x = operands(16, 16, side)[0]
    calls = []
    handle = layer.conv.register_forward_hook(lambda *a: calls.append(a))
    with torch.no_grad():
        theirs = layer(x)
        assert len(calls) == 1
        handle.remove()
        ours = layer(x)
    with torch.no_grad():
        exact = layer.double()(x.double())
    assert len(calls) == 1 and not torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    error, torchs = errors(ours, theirs, exact)
    assert error <= 2 * torchs


def test_pages_of_a_file_are_let_go_and_read_again(tmp_path):
    """Tensors that are in memory alone keep their values."""
    kept = torch.randn(2**22)
    files.write(tmp_path / "a.safetensors", {"a": kept})
    mapped = files.read(tmp_path / "a.safetensors")["a"]
    expected, private = kept.clone(), kept.clone()
    before = resident(mapped.sum())
    files.let_go([mapped, private, torch.empty(0)])
    assert before - resident() > 2**23 / 2**20
    assert torch.equal(private, expected) and torch.equal(mapped, expected)


def resident(*_) -> float:
    """MB of this process in memory."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024


@pytest.mark.parametrize(
    "native, flag, said",
    [(True, "no", "fast in bf16: --mixed"), (False, "bf16", "takes longer"), (False, "no", "")],
)
def test_training_says_which_precision_is_faster(native, flag, said, short_run, monkeypatch, capsys):
    monkeypatch.setattr(loop, "has_fast_bf16", lambda kind: native)
    method_helpers.train("lora", short_run("lora", "--instance_prompt", "x", "--mixed_precision", flag))
    out = capsys.readouterr().out
    assert said in out and ("bf16" in out) == bool(said)
