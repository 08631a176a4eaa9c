"""Latents on disk give the numbers that those in memory give, survive kills, and are never used damaged."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd.data.order import Stream
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.training import latents
from minisd.training.distributed import Processes
from tests.data_helpers import noisy
from tests.method_helpers import new, options, train


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for i, size in enumerate([(40, 32), (32, 40), (33, 32), (32, 32), (50, 32)]):
        noisy(size, i).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"number {i}")
    return tmp_path / "data"


def cached(data, model, out, *flags, process=None, during=None):
    """A stream with cached latents, and the number of images that were encoded for it. When the first is,
    `during` is called."""
    where = ["--model", model, "--data", data, "--resolution", 32, "--output_dir", out]
    m = new("text_to_image", options("text_to_image", *where, *flags))
    m.setup()
    dataset, _ = m.datasets()
    stream, encode, count = Stream(dataset, 0), m.sd.encode_images, []

    def spy(pixels):
        count.append(len(pixels))
        if during and len(count) == 1:
            during()
        return encode(pixels)

    m.sd.encode_images = spy
    latents.cache(stream, m, process or Processes(), out)
    return stream, sum(count)


def same(a, b):
    for k in range(20):
        for one, other in zip(a[k], b[k], strict=True):
            assert one.keys() == other.keys() and "pixels" not in one
            assert torch.equal(one["mean"], other["mean"]) and torch.equal(one["std"], other["std"])


FIXED = ["--center_crop", "--random_flip"]


@pytest.mark.parametrize("flags", [FIXED, ["--bucket", "--random_flip"]], ids=["square", "bucket"])
def test_the_disk_gives_what_the_memory_gives(data, model, tmp_path, flags, capsys):
    memory, count = cached(data, model, tmp_path / "a", *flags)
    disk, again = cached(data, model, tmp_path / "b", *flags, "--latents_dir", tmp_path / "latents")
    assert count == again == 10
    same(memory, disk)
    batch = [*flags, "--latents_dir", tmp_path / "latents", "--train_batch_size", 3]
    third, none = cached(data, model, tmp_path / "c", *batch)
    assert none == 0
    same(memory, third)
    limited, _ = cached(data, model, tmp_path / "d", *flags, "--latents_memory", 0)
    assert (tmp_path / "d" / "latents").is_dir() and "more than --latents_memory" in capsys.readouterr().out
    same(memory, limited)


def test_a_run_is_the_same_with_latents_on_disk(data, model, tmp_path):
    flags = ["--model", model, "--data", data, "--resolution", 32, *FIXED, "--dataloader_num_workers", 2]
    flags += ["--checkpointing_steps", 2, "--num_validation_images", 1, "--caption_dropout", 0.3]
    for name, more in (("memory", []), ("disk", ["--latents_dir", tmp_path / "latents"])):
        assert (
            train("text_to_image", options("text_to_image", *flags, *more, "--output_dir", tmp_path / name))
            == 0
        )
    for name in ("log.jsonl", "checkpoint-2/trained.safetensors", "result.png"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()


def files_of(folder, dimensions=5):
    """Those of latents, (n, 2, 4, h, w), or of contexts, (n, s, d)."""
    paths = sorted(folder.rglob("*.safetensors"))
    return [path for path in paths if load_file(path)["values"].ndim == dimensions]


def test_what_a_killed_run_has_written_is_used(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 1)
    flags = [*FIXED, "--latents_dir", tmp_path / "latents"]
    whole, _ = cached(data, model, tmp_path / "a", *flags)
    paths = files_of(tmp_path / "latents")
    assert len(paths) == 10
    paths[3].unlink(), paths[7].unlink()
    fresh, old = (paths[3].with_name(f".{n}.minisd-0000000{n}.tmp") for n in (1, 2))
    fresh.write_bytes(b"half"), old.write_bytes(b"half")
    os.utime(old, (0, 0))
    again, count = cached(data, model, tmp_path / "b", *flags)
    assert count == 2 and files_of(tmp_path / "latents") == paths
    assert fresh.exists() and not old.exists()  # another run may be writing the one
    same(whole, again)


def test_damaged_files_are_not_used(data, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD", 1)
    flags = [*FIXED, "--latents_dir", tmp_path / "latents"]
    whole, _ = cached(data, model, tmp_path / "m", *FIXED)
    cached(data, model, tmp_path / "a", *flags)
    one, two, three, four = files_of(tmp_path / "latents")[:4]
    one.write_bytes(one.read_bytes()[:-1])
    for path, name in ((two, "keys"), (three, "sums")):
        tensors = load_file(path)
        tensors[name] = tensors[name].clone() + 1
        save_file(tensors, path, {"index": latents.files.read_with_metadata(path)[1]["index"]})
    capsys.readouterr()
    again, count = cached(data, model, tmp_path / "b", *flags)
    assert count == 3 and capsys.readouterr().out.count("passing over what was encoded: ") == 3
    same(whole, again)
    content = bytearray(four.read_bytes())  # a bit of the values, which come last or before the digests
    values = load_file(four)["values"]
    at = bytes(content).index(values.numpy().tobytes())
    content[at + 100] ^= 1
    four.write_bytes(content)
    spoilt, count = cached(data, model, tmp_path / "c", *flags)
    with pytest.raises(ValueError, match=f"^--latents_dir: {four} is damaged"):
        [spoilt.moments[view] for view in spoilt.dataset.views()]


@pytest.mark.parametrize("keys", [torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor(1.0)])
def test_another_program_s_file_of_the_same_names_is_not_used(keys, tmp_path, capsys):
    whole = {"keys": keys, "sums": keys.clone(), "values": torch.ones(2)}
    save_file(whole, tmp_path / "x.safetensors")
    assert "a" not in latents.Stored(tmp_path, {"a": "a"})
    assert "x.safetensors is damaged" in capsys.readouterr().out


def test_what_latents_depend_on(data, model, tmp_path):
    flags = [*FIXED, "--latents_dir", tmp_path / "latents"]
    assert cached(data, model, tmp_path / "a", *flags)[1] == 10
    noisy((40, 32), 77).save(data / "0.png")
    assert cached(data, model, tmp_path / "b", *flags)[1] == 2
    assert cached(data, model, tmp_path / "c", *flags, "--image_interpolation_mode", "box")[1] == 10
    other = StableDiffusion.load(model)
    other.vae.quant_conv.weight.data[0, 0] += 1e-3
    other.save(tmp_path / "other", {"vae"})
    assert cached(data, tmp_path / "other", tmp_path / "e", *flags)[1] == 10
    assert cached(data, model, tmp_path / "f", *flags)[1] == 0


def contexts(data, model, out, *flags):
    """Those of all captions, and the number of prompts that were encoded for the cache and later."""
    where = ["--model", model, "--data", data, "--resolution", 32, "--output_dir", out]
    m = new("text_to_image", options("text_to_image", *where, *FIXED, *flags))
    m.setup()
    stream, encode, count = Stream(m.datasets()[0], 0), m.sd.encode_text, []
    m.sd.encode_text = lambda prompts: count.append(len(prompts)) or encode(prompts)
    latents.cache(stream, m, Processes(), out)
    m.contexts.clear()
    cached = sum(count)
    return m.text(["number 0", "", "number 3", "number 0"]), cached, sum(count) - cached


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prompts_are_encoded_once(data, model, tmp_path, precision):
    """If the text encoder is frozen and captions are not shuffled; their contexts have the same bits."""
    flags = ["--mixed_precision", precision, "--caption_dropout", 0.5]
    disk = "--latents_dir", tmp_path / "latents"
    plain, *count = contexts(data, model, tmp_path / "a", *flags)
    assert count == [0, 3]
    for name, expected in (("b", 6), ("c", 0)):
        stored, *count = contexts(data, model, tmp_path / name, *flags, *disk)
        assert count == [expected, 0] and torch.equal(stored, plain) and stored.dtype == plain.dtype
    assert len(files_of(tmp_path / "latents", 3)) == 1
    again, *count = contexts(data, model, tmp_path / "d", "--mixed_precision", "no", *disk)
    assert count == ([5, 1] if precision == "bf16" else [0, 1])  # which has no empty prompt
    (data / "0.txt").write_text("one, two")
    assert contexts(data, model, tmp_path / "e", *flags, *disk, "--shuffle_caption")[1:] == (0, 3)
    other = StableDiffusion.load(model)
    other.text_encoder.text_model.final_layer_norm.bias.data[0] += 1e-3
    other.save(tmp_path / "other", {"text_encoder"})
    assert contexts(data, tmp_path / "other", tmp_path / "f", *flags, *disk)[1] == 6
    assert contexts(data, model, tmp_path / "g", *flags, *disk, "--train_text_encoder")[1:] == (0, 0)


@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "two folders"])
def test_processes_share_the_work(data, model, tmp_path, shared):
    """The first process encodes its views; the other finds these in the folder that they share, or not."""
    process = [SimpleNamespace(rank=r, world=2, first=r == 0, wait=lambda: None) for r in (0, 1)]
    memory, _ = cached(data, model, tmp_path / "m", *FIXED)
    counts = []
    for p in process:
        place = tmp_path / ("latents" if shared else f"latents{p.rank}")
        stream, count = cached(data, model, tmp_path / "a", *FIXED, "--latents_dir", place, process=p)
        counts.append(count)
        same(memory, stream)
    assert counts == (
        [10, 0] if shared else [10, 10]
    )  # alone, the first encodes the other's views at the end


@pytest.mark.parametrize("shard", [1, 2**20])
def test_two_writers_at_once(data, model, tmp_path, monkeypatch, shard):
    """The second comes and ends while the first encodes, which has seen none of its files."""
    monkeypatch.setattr(latents, "SHARD", shard)
    flags = [*FIXED, "--latents_dir", tmp_path / "latents"]
    memory, _ = cached(data, model, tmp_path / "m", *FIXED)
    seen = []
    first, count = cached(
        data,
        model,
        tmp_path / "a",
        *flags,
        during=lambda: seen.append(cached(data, model, tmp_path / "b", *flags)),
    )
    (second, other) = seen[0]
    assert count == other == 10 and not list((tmp_path / "latents").rglob("*.tmp"))
    for stream in (first, second, cached(data, model, tmp_path / "c", *flags)[0]):
        same(memory, stream)


def test_flags_without_an_effect_are_refused(data, model, tmp_path, capsys):
    where = ["--model", model, "--data", data]
    for flags, words in {
        ("--latents_dir", "x", "--no-cache_latents"): "--latents_dir is for --cache_latents",
        ("--latents_memory", 1, "--no-cache_latents"): "--latents_memory is for",
        ("--latents_memory", 1, "--latents_dir", "x"): "--latents_memory is for",
        ("--latents_memory", -1): "must not be negative",
    }.items():
        with pytest.raises(SystemExit):
            options("text_to_image", *where, *flags)
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="^--latents_dir: crops are random here"):
        cached(data, model, tmp_path / "out", "--latents_dir", tmp_path / "latents")
