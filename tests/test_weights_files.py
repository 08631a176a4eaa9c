"""Files of weights: lazy, safe to change, written whole or not at all, and refused in one line if damaged."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import files, reading
from minisd.formats import config_json, diffusers, parts, single_file
from tests.conftest import ROOT
from tests.weights_helpers import UNET, listing, rewrite, tiny

# --- Lazy, and safe to change -------------------------------------------------------------------------------


LAZY = """
import sys
from pathlib import Path
from minisd import files

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))

files.read(sys.argv[1])  # the first call imports
before = resident()
tensors = files.read(sys.argv[2])
assert resident() - before < 32 << 20, resident() - before
tensors["t3"].add_(1)
tensors["t4"][:5] = 7
assert tensors["t3"][0] == 4 and tensors["t5"].sum() == 5 << 20
assert resident() - before < 64 << 20, resident() - before
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_reading_is_lazy_and_changes_stay_in_memory(tmp_path, suffix):
    small, big = tmp_path / f"small{suffix}", tmp_path / f"big{suffix}"
    tensors = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(24)}  # 100 MB
    for path, content in ((small, {"t": torch.zeros(1)}), (big, tensors)):
        save_file(content, path) if suffix == ".safetensors" else torch.save({"state_dict": content}, path)
    # In a process of its own: memory that this one has freed would hide what reading takes.
    subprocess.run([sys.executable, "-c", LAZY, small, big], check=True, cwd=ROOT)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in files.read(big).items())


def test_a_mapped_file_may_be_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {"a": torch.arange(1000.0)})
    mapped = files.read(path)
    files.write(path, {"a": mapped["a"] + 1, "b": mapped["a"]})
    assert mapped["a"][999] == 999 and files.read(path)["a"][999] == 1000


def test_write_takes_every_kind_of_tensor(tmp_path):
    tensors = {
        "views": torch.arange(12.0).reshape(3, 4).t(), "shared": torch.zeros(4)[1:],
        "empty": torch.zeros(0, 3), "half": torch.ones(3).half(), "bf16": torch.ones(5).bfloat16(),
        "bool": torch.tensor([True]), "scalar": torch.tensor(3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "grad": torch.ones(2, requires_grad=True), "ünïcode": torch.zeros(1), "f64": torch.zeros(2).double(),
    }  # fmt: skip
    files.write(tmp_path / "a.safetensors", tensors, {"note": "é\n"})
    theirs = load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == tensors.keys() == files.read(tmp_path / "a.safetensors").keys()
    assert all(torch.equal(theirs[k], v) and theirs[k].dtype == v.dtype for k, v in tensors.items())
    assert files.read_with_metadata(tmp_path / "a.safetensors")[1] == {"format": "pt", "note": "é\n"}
    assert files.read(tmp_path / "a.safetensors")["empty"].shape == (0, 3)


# --- Bad input ----------------------------------------------------------------------------------------------


def header(content: dict | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "empty": b"",
    "short": b"\x01\x02",
    "huge length": header(b"{}", 1 << 62),
    "long length": header(b"{}", 99_000_000),
    "bad json": header(b"{not json"),
    "not utf-8": header(b"\xff\xfe\xfd"),
    "a list": header(b"[1, 2]"),
    "overlap": header({"a": entry(0, 16), "b": entry(8, 24)}, data=bytes(24)),
    "hole": header({"a": entry(0, 16), "b": entry(32, 48)}, data=bytes(48)),
    "truncated": header({"a": entry(0, 16)}, data=bytes(8)),
    "too long": header({"a": entry(0, 16)}, data=bytes(99)),
    "negative": header({"a": entry(16, 0)}, data=bytes(16)),
    "wrong size": header({"a": entry(0, 16, (1 << 40,))}, data=bytes(16)),
    "overflow": header({"a": entry(0, 16, (1 << 33, 1 << 33))}, data=bytes(16)),
    "unknown dtype": header({"a": entry(0, 16, dtype="Q7")}, data=bytes(16)),
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "web page": b"<!DOCTYPE html><html>not found</html>" * 9,
    "deep": header(b'{"a":' * 100_000),
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_bad_safetensors_is_named(tmp_path, kind):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    for ask in (files.read, single_file.load):
        with pytest.raises(ValueError, match="broken.safetensors") as caught:
            ask(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "lfs pull" in str(caught.value) or kind != "git-lfs"


def test_missing_folder_and_other_suffix(tmp_path):
    with pytest.raises(ValueError, match="nowhere.safetensors does not exist"):
        files.read(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        files.read(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="a.txt is not one of .safetensors .ckpt"):
        files.read(tmp_path / "a.txt")


class Payload:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "builtin"])
def test_a_hostile_pickle_does_nothing(tmp_path, form):
    path, proof = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1), "b": Payload(proof)}}
    if form == "plain":
        path.write_bytes(pickle.dumps(content["state_dict"]["b"], protocol=2))
    elif form == "builtin":
        path.write_bytes(b"cbuiltins\nexec\n(S'open(%r, \"w\")'\ntR." % str(proof).encode())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"evil.ckpt asks for (posix.system|(builtins.)?exec);"):
        files.read(path)
    assert not proof.exists()
    if form == "zip":  # the payload does work, where it is let
        torch.load(path, weights_only=False)
        assert proof.exists()


def lightning(monkeypatch):
    """Classes under a trainer's name, which can be pickled here but not imported when reading."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    for cls in (ModelCheckpoint, AttributeDict):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return ModelCheckpoint, AttributeDict


def test_an_old_training_checkpoint_is_read(sd_parts, sd_file, tmp_path, monkeypatch):
    import numpy as np

    with monkeypatch.context() as patch:
        callback, attributes = lightning(patch)
        instance = callback()
        instance.best = 3
        content = {
            "epoch": 1, "global_step": np.float64(4), "callbacks": {callback: {"best": np.int64(3)}},
            "more": [instance], "hyper_parameters": attributes(a=1), "state_dict": dict(load_file(sd_file)),
        }  # fmt: skip
        torch.save(content, tmp_path / "old.ckpt")
    found = files.read(tmp_path / "old.ckpt")
    assert found.keys() == load_file(sd_file).keys()
    # A pickle has no metadata, hence no configs: it is taken for the standard size, which it is not.
    with pytest.raises(ValueError, match=r"old.ckpt: \d+ missing"):
        single_file.load(tmp_path / "old.ckpt")


@pytest.mark.parametrize("kind", ["truncated", "no tensors", "text", "list"])
def test_bad_pickle_is_named(tmp_path, kind):
    path = tmp_path / "broken.ckpt"
    if kind == "text":
        path.write_text("<html>")
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    else:
        torch.save({"a": torch.zeros(9999)} if kind == "truncated" else {"step": 3}, path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="broken.ckpt") as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


def refused(sd_file: Path, tmp_path: Path, change, match: str) -> None:
    path = rewrite(sd_file, tmp_path / "other.safetensors", change)
    with pytest.raises(ValueError, match=f"other.safetensors.*{match}"):
        single_file.load(path)


def test_other_kinds_of_files_are_told_apart(sd_file, tmp_path):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    zero = torch.zeros(2, 2)
    refused(sd_file, tmp_path, lambda t: t | {key: torch.zeros(4, 1024)}, "an SD2 checkpoint")
    refused(sd_file, tmp_path, lambda t: {"cond_stage_model.model.ln_final.bias": zero}, "an SD2 checkpoint")
    refused(sd_file, tmp_path, lambda t: t | {key: torch.zeros(4, 2048)}, "an SDXL checkpoint")
    refused(
        sd_file,
        tmp_path,
        lambda t: t | {"model.diffusion_model.label_emb.0.0.weight": zero},
        "an SDXL checkpoint",
    )
    refused(sd_file, tmp_path, lambda t: {"control_model.zero_convs.0.0.bias": zero}, "a ControlNet")
    refused(sd_file, tmp_path, lambda t: {"lora_unet_x.lora_down.weight": zero}, "a LoRA")
    refused(sd_file, tmp_path, lambda t: {"unet.x.lora_A.weight": zero}, "a LoRA")
    refused(sd_file, tmp_path, lambda t: {"emb_params": zero}, "a textual inversion embedding")
    refused(sd_file, tmp_path, lambda t: {"first_stage_model.encoder.conv_in.bias": zero}, "a VAE alone")
    refused(sd_file, tmp_path, lambda t: {"down_blocks.0.x": zero}, "one part of a folder")
    refused(sd_file, tmp_path, lambda t: {"something": zero}, "holds no unet")
    for part, prefix in single_file.PREFIXES.items():
        refused(
            sd_file, tmp_path, lambda t, p=prefix: {k: v for k, v in t.items() if not k.startswith(p)},
            "ControlNet|VAE|LoRA" if part == "none" else f"holds no {part}",
        )  # fmt: skip


def test_strict_about_every_name(sd_file, tmp_path):
    gone = "model.diffusion_model.out.2.bias"
    refused(sd_file, tmp_path, lambda t: t | {"model.extra": torch.zeros(1)}, r"1 unknown \(model.extra\)")
    refused(
        sd_file,
        tmp_path,
        lambda t: {k: v for k, v in t.items() if k != gone},
        rf"1 missing \({gone}\) of \d+ tensors",
    )
    refused(
        sd_file,
        tmp_path,
        lambda t: t | {gone: torch.zeros(5)},
        r"1 tensors of another shape: conv_out.bias is",
    )


def test_damaged_metadata(sd_file, tmp_path):
    tensors, own = load_file(sd_file), json.loads(files.read_with_metadata(sd_file)[1][single_file.CONFIG])
    own_unet = own["unet"]
    for change in (
        "{", "[]", "null", "[" * 100_000,
        own | {"unet": {"block_out_channels": []}},
        own | {"unet": own_unet | {"in_channels": "4"}},
        own | {"unet": own_unet | {"norm_num_groups": 7}},
        own | {"unet": own_unet | {"attention_head_dim": [0, 0]}},
        own | {"unet": own_unet | {"block_out_channels": [32, 64, 64]}},
        own | {"unet": own_unet | {"block_out_channels": [1 << 60, 64]}},
        own | {"scheduler": 3},
    ):  # fmt: skip
        change = change if isinstance(change, str) else json.dumps(change)
        save_file(tensors, tmp_path / "m.safetensors", metadata={single_file.CONFIG: change})
        with pytest.raises(ValueError, match="m.safetensors"):
            single_file.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "part, field, value, match",
    [
        ("unet", "cross_attention_dim", 1024, "SD2 checkpoint; minisd is for SD v1.x"),
        ("unet", "cross_attention_dim", 2048, "SDXL checkpoint; minisd is for SD v1.x"),
        ("unet", "cross_attention_dim", 64, "of another shape"),
        ("unet", "use_linear_projection", True, "use_linear_projection is True"),
        ("unet", "class_embed_type", "timestep", "class_embed_type"),
        ("unet", "transformer_layers_per_block", 2, "transformer_layers_per_block is 2"),
        ("unet", "act_fn", "gelu", "act_fn is 'gelu', but minisd needs 'silu'"),
        ("unet", "mid_block_type", "UNetMidBlock2D", "mid_block_type"),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"], "down_block_types"),
        ("unet", "up_block_types", ["CrossAttnUpBlock2D"] * 2, "up_block_types"),
        ("unet", "block_out_channels", [0, 64], "block_out_channels"),
        ("unet", "block_out_channels", "many", "block_out_channels"),
        ("unet", "norm_num_groups", 7, "no unet can be built"),
        ("unet", "attention_head_dim", [2, 5], "64 channels cannot be divided by 5 into heads"),
        ("unet", "attention_head_dim", [2, 2, 2], "attention_head_dim"),
        ("unet", "layers_per_block", [1, 2], "layers_per_block"),
        ("unet", "time_cond_proj_dim", 256, "unknown key 'time_cond_proj_dim', which is 256"),
        ("vae", "latent_channels", 16, "of another shape"),
        ("vae", "shift_factor", 0.1, "shift_factor"),
        ("vae", "scaling_factor", -1, "scaling_factor"),
        ("vae", "down_block_types", ["X", "Y"], "down_block_types"),
        ("text_encoder", "hidden_size", 1024, "SD2 or SDXL"),
        ("text_encoder", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("text_encoder", "num_attention_heads", 5, "32 channels cannot be divided by 5 into heads"),
        ("text_encoder", "attention_dropout", 0.5, "attention_dropout"),
    ],
)
def test_configs_of_other_models_are_refused(sd_folder, tmp_path, part, field, value, match):
    for source in listing(sd_folder):  # links: only the config is new
        target = tmp_path / "m" / source
        if (sd_folder / source).is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(sd_folder / source)
    config = tmp_path / "m" / part / "config.json"
    content = json.loads(config.read_text()) | {field: value}
    config.unlink()
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{match}"):
        diffusers.load(tmp_path / "m")


def test_parts_of_different_models_are_refused(tmp_path):
    diffusers.save(tmp_path / "m", tiny(replace(UNET, cross_attention_dim=64)))
    with pytest.raises(
        ValueError, match="m: the UNet takes text states of width 64, the text encoder gives 32"
    ):
        diffusers.load(tmp_path / "m")


def test_fields_that_may_deviate(sd_parts, sd_folder):
    for part, extra in (
        ("unet", {"upcast_attention": True, "class_embed_type": None, "num_attention_heads": None,
                  "unheard": None, "attention_head_dim": [2, 4], "layers_per_block": [2, 2],
                  "sample_size": [8, 8]}),
        ("vae", {"force_upcast": True, "latents_mean": None, "_name_or_path": "x"}),
        ("text_encoder", {"torch_dtype": "float32", "projection_dim": 7, "bad_words_ids": [3]}),
    ):  # fmt: skip
        content = reading.read_json(sd_folder / part / "config.json") | extra
        assert config_json.from_json(part, content, Path("x")) == sd_parts.networks[part].config


@pytest.mark.parametrize(
    "gone", ["unet", "vae/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler", "tokenizer",
             "tokenizer/merges.txt"]
)  # fmt: skip
def test_incomplete_folder(sd_folder, tmp_path, gone):
    path = shutil.copytree(sd_folder, tmp_path / "m")
    shutil.rmtree(path / gone) if (path / gone).is_dir() else (path / gone).unlink()
    with pytest.raises(ValueError, match=str(path)):
        diffusers.load(path)


def test_bad_json(sd_folder, tmp_path):
    path = shutil.copytree(sd_folder, tmp_path / "m")
    for name in ("unet/config.json", "model_index.json"):
        good = (path / name).read_text()
        for bad in ("{", "[]", "[" * 100_000, "\x00"):
            (path / name).write_text(bad)
            with pytest.raises(ValueError, match=name):
                diffusers.load(path)
        (path / name).write_text(good)
    (path / "model_index.json").write_text('{"text_encoder_2": ["transformers", "X"]}')
    with pytest.raises(ValueError, match="has a text_encoder_2: this is SDXL"):
        diffusers.load(path)


def test_flags_without_an_effect_are_errors(sd_folder, sd_file):
    with pytest.raises(ValueError, match="EMA by its variant"):
        diffusers.load(sd_folder, ema=True)
    with pytest.raises(ValueError, match="has no variant 'fp16'"):
        single_file.load(sd_file, variant="fp16")


def test_a_vocabulary_of_ones_own_does_not_go_into_a_single_file(sd_parts, tmp_path):
    own = shutil.copytree(parts.TOKENIZER, tmp_path / "tokenizer")
    assert parts.is_standard_tokenizer(own)
    single_file.save(tmp_path / "good.safetensors", replace(sd_parts, tokenizer=own))
    (own / "added_tokens.json").write_text('{"<cat>": 49408}')
    with pytest.raises(ValueError, match="cannot write .*bad.safetensors.* is not CLIP's own"):
        single_file.save(tmp_path / "bad.safetensors", replace(sd_parts, tokenizer=own))
    with pytest.raises(ValueError, match="model.ckpt: a single file is written as .safetensors"):
        single_file.save(tmp_path / "model.ckpt", sd_parts)
    assert listing(tmp_path)[0] == "good.safetensors" and "bad.safetensors" not in listing(tmp_path)
    diffusers.save(tmp_path / "m", replace(sd_parts, tokenizer=own))
    assert (tmp_path / "m/tokenizer/added_tokens.json").exists()


# --- Whole or not at all ------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """No file may grow beyond 256 KiB, so writing fails in the middle as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(sd_parts, tmp_path, full_disk):
    files.write(tmp_path / "small.safetensors", {"a": torch.zeros(9)})
    before = (tmp_path / "small.safetensors").read_bytes()
    for path in ("small.safetensors", "new.safetensors"):
        with pytest.raises(ValueError, match=f"cannot write {tmp_path}/{path}: File too large"):
            files.write(tmp_path / path, {"a": torch.zeros(1 << 20)})
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/new.bin"):
        files.write_pickle(tmp_path / "new.bin", {"a": torch.zeros(1 << 20)})
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/t.txt"):
        files.write_text(tmp_path / "t.txt", "x" * (1 << 20))
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/model/.*: File too large"):
        diffusers.save(tmp_path / "model", sd_parts)
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/m.safetensors"):
        single_file.save(tmp_path / "m.safetensors", sd_parts)
    assert listing(tmp_path) == ["small.safetensors"]
    assert (tmp_path / "small.safetensors").read_bytes() == before


def test_failure_in_the_middle_leaves_what_was_there(tmp_path):
    with files.new_folder(tmp_path / "a") as temporary:
        (temporary / "old.txt").write_text("old")
        assert not (tmp_path / "a").exists()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), files.new_folder(tmp_path / "a") as temporary:
            (temporary / "new.txt").write_text("new")
            raise error
    assert listing(tmp_path) == ["a", "a/old.txt"]
    with files.new_folder(tmp_path / "a") as temporary:
        (temporary / "new.txt").write_text("new")
    assert listing(tmp_path) == ["a", "a/new.txt"]
    with files.new_folder(tmp_path / "a", keep=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "new.txt").write_text("newer")
    assert listing(tmp_path) == ["a", "a/new.txt", "a/sub"]
    assert (tmp_path / "a/new.txt").read_text() == "newer"


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old.txt").write_text("old")
    renamed, rename = [], os.rename

    def second_fails(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/a: No space left"):
        with files.new_folder(tmp_path / "a"):
            pass
    assert listing(tmp_path) == ["a", "a/old.txt"] and len(renamed) == 3


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    with pytest.raises(ValueError, match="cannot write .*file/sub/a.txt: "):
        files.write_text(tmp_path / "file/sub/a.txt", "x")
    with pytest.raises(ValueError, match="cannot write .*dir: it is a folder"):
        files.write_text(tmp_path / "dir", "x")
    with pytest.raises(ValueError, match="cannot write .*file/sub"), files.new_folder(tmp_path / "file/sub"):
        pass
    with pytest.raises(ValueError, match="cannot write .*/file: "), files.new_folder(tmp_path / "file"):
        pass
    assert listing(tmp_path) == ["dir", "file"]


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "link.txt").symlink_to(tmp_path / "blob")
    files.write_text(tmp_path / "link.txt", "mine")
    assert (tmp_path / "blob").read_text() == "shared" and (tmp_path / "link.txt").read_text() == "mine"
