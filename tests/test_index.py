"""Indices of tars, folders and parquet files, and the order that their rows are drawn in."""

import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch

from minisd import noise, registry
from minisd.__main__ import index as command
from minisd.data import index
from minisd.data.datasets import Captioned
from minisd.data.order import Lanes, Stream, batches, shares
from minisd.data.source import read
from minisd.training import plan
from tests.conftest import ROOT
from tests.data_helpers import noisy
from tests.method_helpers import options, train
from tests.test_distributed import ENV, TWO


def encoded(i, size=(24, 16), kind="PNG"):
    buffer = io.BytesIO()
    noisy(size, i).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i, **more):
    """The members of a sample as img2dataset writes them."""
    about = {"caption": f"caption {i}", "key": f"{i:05}", "status": "success"} | more
    texts = {} if i % 3 == 0 else {"txt": f"caption {i}".encode()}  # else from the JSON
    parts = {"png": encoded(i)} | texts | {"json": json.dumps(about).encode()}
    return [(f"{i:05}.{suffix}", content) for suffix, content in parts.items()]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 5, 4 and 3 samples."""
    folder = tmp_path_factory.mktemp("tars")
    for shard, numbers in enumerate((range(5), range(5, 9), range(9, 12))):
        write_tar(folder / f"{shard:05}.tar", [m for i in numbers for m in sample(i)])
    return folder


@pytest.fixture(scope="module")
def made(tars, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index"
    assert index.make(str(tars), out)[1] == []
    return out


def texts_and_pixels(source):
    """The caption and the bytes of each record's image."""
    texts = source.records.texts["text"]
    return {texts[i]: source.open(i, "image").tobytes() for i in range(len(source))}


EXPECTED = {f"caption {i}": noisy((24, 16), i).tobytes() for i in range(12)}


def test_tars(made):
    source = read(made, flag="--data")
    assert texts_and_pixels(source) == EXPECTED
    records = source.records
    assert records.names[5] == "00001.tar/00005.png" and records[5].sizes == {"image": (24, 16)}
    assert {p.name for p in made.iterdir()} == {"index.json", "rows", "texts"}
    summary = source.summary()
    assert "12 pictures" in summary and "12 with a caption" in summary and "24x16 (12)" in summary
    again = pickle.loads(pickle.dumps(source))  # as for a worker that is not forked
    assert texts_and_pixels(again) == EXPECTED and len(pickle.dumps(source)) < 5000


def test_a_folder(tmp_path):
    """With sidecars and metadata as without an index, in shards of its own."""
    for i in range(12):
        path = tmp_path / "data" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(i))
        path.with_suffix(".txt").write_text(f"caption {i}")
    index.make(str(tmp_path / "data"), tmp_path / "index")
    indexed_, plain = (read(tmp_path / name, flag="--data") for name in ("index", "data"))
    assert texts_and_pixels(indexed_) == texts_and_pixels(plain) == EXPECTED
    assert [*indexed_.records.names] == plain.records.names


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part, numbers in enumerate((range(7), range(7, 12))):
        cells = [{"bytes": encoded(i), "path": None} if part else encoded(i) for i in numbers]
        columns = {"image": cells, "text": [f"caption {i}" for i in numbers]}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{part}.parquet", row_group_size=3)
    records, problems = index.make(str(tmp_path), tmp_path / "index")
    assert not problems and len(records.table.shards) == 3 + 2
    assert texts_and_pixels(read(tmp_path / "index", flag="--data")) == EXPECTED


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="^0.parquet needs pyarrow: pip install 'minisd.index.'"):
        index.make(str(tmp_path), tmp_path / "index")


def test_fsspec(tars, tmp_path):
    """By a URL, and by one that keeps what it reads."""
    pytest.importorskip("fsspec")
    for number, url in enumerate((f"file://{tars}", f"simplecache::file://{tars}")):
        index.make(url, tmp_path / str(number))
        found = read(tmp_path / str(number), flag="--data", allow_outside=True)
        assert texts_and_pixels(found) == EXPECTED
        with pytest.raises(ValueError, match=f"^--data: .* is of {url}; --allow_outside reads it"):
            read(tmp_path / str(number), flag="--data")
        assert not index.make(url, tmp_path / "again")[1]
    with pytest.raises(ValueError, match="has no .tar or .parquet files"):
        index.make(f"file://{tmp_path}/nothing", tmp_path / "none")


def test_what_is_left_out(tmp_path):
    """Each with a line, and the rest stays; only decoding finds what is behind a header."""
    broken = encoded(3)[:-200]
    members = [*sample(0), *sample(1), ("2.png", b"no image"), ("2.txt", b"x"), ("3.png", broken)]
    members += [("4.png", encoded(4)), ("4.txt", b"\xff\xfe"), ("5.png", encoded(5)), ("5.json", b"{")]
    members += [
        ("/etc/6.png", encoded(6)),
        ("6.seg.png", encoded(7)),
        ("7.png", encoded(7)),
        ("7.txt", b"x" * 60_000),
    ]
    tar = write_tar(tmp_path / "data" / "0.tar", members)
    link = tarfile.TarInfo("8.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tar, "a") as file:
        file.addfile(link)
    whole = tar.read_bytes()
    records, problems = index.make(str(tmp_path / "data"), tmp_path / "index")
    assert [*records.names] == [f"0.tar/{name}" for name in ("00000.png", "00001.png", "3.png", "/etc/6.png")]
    said = ("0.tar/2.png is not a picture", "0.tar/4.png: .*utf-8", "0.tar/5.png: 5.json: bad JSON",
            "0.tar/7.png: a caption of 60,000 characters")  # fmt: skip
    for problem, pattern in zip(problems, said, strict=True):
        assert len(problem.splitlines()) == 1
        assert re.match(pattern, problem), problem
    records, problems = index.make(str(tmp_path / "data"), tmp_path / "index", decode=True)
    assert len(records) == 3 and any("0.tar/3.png cannot be decoded" in p for p in problems)
    tar.write_bytes(whole[:5000])
    records, problems = index.make(str(tmp_path / "data"), tmp_path / "index")
    assert len(records) == 1 and problems[-1].startswith("0.tar: ")
    tar.write_bytes(b"x" * 4000)
    with pytest.raises(ValueError, match="data: no picture can be read; the first: 0.tar: "):
        index.make(str(tmp_path / "data"), tmp_path / "index")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda files, end: files, "damaged or cut off at byte"),
        (lambda files, end: files + files[:200], "damaged or cut off at byte"),
        (lambda files, end: files + b"x" * 512 + files + end, "damaged or cut off at byte"),
        (lambda files, end: files + end + files + end, "damaged or cut off at byte"),
        (lambda files, end: files + member("c", b"\xff" * 10 + b"\xfe\0") + end, "c has -512 bytes"),
    ],
)
def test_a_tar_that_does_not_end(damage, said, tmp_path):
    """What comes before a header that is none stays, and that something may be lost is said."""
    tar = write_tar(tmp_path / "data" / "0.tar", [("a.png", encoded(0) + b"x"), ("b.txt", b"x")])
    files = tar.read_bytes().rstrip(b"\0")
    files += bytes(-len(files) % 512)
    tar.write_bytes(damage(files, bytes(10240)))
    records, (problem,) = index.make(str(tmp_path / "data"), tmp_path / "index")
    assert [*records.names] == ["0.tar/a.png"] and re.match(f"0.tar: .*{said}", problem)


def member(name, size):
    """A tar's header with these bytes as the file's size."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_name_with_a_zero_byte(tmp_path):
    info = tarfile.TarInfo("a\0b.png")
    info.pax_headers, info.size = {"path": info.name}, len(encoded(0))
    write_tar(tmp_path / "data" / "0.tar", [("a.png", encoded(0))])
    with tarfile.open(tmp_path / "data" / "0.tar", "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(encoded(0)))
    records, (problem,) = index.make(str(tmp_path / "data"), tmp_path / "index")
    assert [*records.names] == ["0.tar/a.png"] and problem.endswith("has a zero byte")


def test_a_caption_that_has_changed(tars, tmp_path):
    """It is noticed with the image."""
    index.make(str(tars), tmp_path / "index")
    path = tmp_path / "index" / "texts"
    path.write_bytes(path.read_bytes().replace(b"caption 6", b"caption 7"))
    source = read(tmp_path / "index", flag="--data")
    source.open(5, "image")
    with pytest.raises(
        ValueError, match="--data: 00001.tar/00006.png cannot be decoded: it, or its entry in"
    ):
        source.open(6, "image")


def test_damage(tars, tmp_path):
    """An index that is cut off, and an image that is not as it was, in one line."""
    data = tmp_path / "data"
    data.mkdir()
    for tar in tars.iterdir():
        (data / tar.name).write_bytes(tar.read_bytes())
    index.make(str(data), tmp_path / "index")
    source = read(tmp_path / "index", flag="--data")
    content = bytearray((data / "00001.tar").read_bytes())
    place = int(source.records.table.rows[6]["at"])
    content[place + 50] ^= 1
    (data / "00001.tar").write_bytes(content)
    with pytest.raises(ValueError, match="--data: 00001.tar/00006.png cannot be decoded: it, or its entry"):
        source.open(6, "image")
    source.open(7, "image")
    (data / "00001.tar").unlink()
    with pytest.raises(
        ValueError, match="--data: 00001.tar/00007.png cannot be decoded: .*00001.tar does not"
    ):
        source.open(7, "image")
    checked = read(tmp_path / "index", flag="--data", fresh=True, skip_bad_images=True)
    assert len(checked.bad) == 4 and len(checked.records.different_pictures()) == 8
    for name in ("rows", "texts"):
        path = tmp_path / "index" / name
        whole = path.read_bytes()
        for cut in (whole[:-7], whole[:-32], b""):
            path.write_bytes(cut)
            with pytest.raises(ValueError, match="^--data: .*(cut off)"):
                read(tmp_path / "index", flag="--data")
        path.write_bytes(whole)
    path = tmp_path / "index" / "index.json"
    header = json.loads(path.read_text())
    changes = {"lanes": 0}, {"lanes": 10**9}, {"window": "8"}, {"shards": []}, {"shards": [{}]}, {"sizes": 3}
    for change in changes:
        path.write_text(json.dumps(header | change, indent=2))
        with pytest.raises(ValueError, match="^--data: .*index.json is damaged"):
            read(tmp_path / "index", flag="--data")


def test_flags_that_do_not_fit(made):
    for flags, said in (
        ({"max_samples": 3}, "--max_train_samples"),
        ({"skip_bad_images": True}, "--skip_bad_images"),
    ):
        with pytest.raises(ValueError, match=f"^{said}: .* is an index"):
            read(made, flag="--data", **flags)
    source = read(made, flag="--data", max_pixels=100)
    data = Captioned(read(made, flag="--data"), resolution=8)
    assert data.views() is None
    with pytest.raises(ValueError, match="--data: 00000.tar/00000.png has 24x16 pixels.*--max_pixels"):
        Captioned(source, resolution=8).examples(0, torch.Generator())
    with pytest.raises(ValueError, match="^--bucket"):
        Captioned(source, resolution=64, bucket=True)
    with pytest.raises(ValueError, match="leave out --validation_split"):
        source.split(2, 0)


# Order


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000])
def test_permutations(length):
    seen = [[noise.permuted(i, length, 0, epoch) for i in range(length)] for epoch in range(3)]
    assert all(sorted(order) == list(range(length)) for order in seen)
    assert length < 5 or len(set(map(tuple, seen))) == 3


@pytest.mark.parametrize("length", [5, 24])
def test_permutations_are_uniform(length):
    """Where each of two indices goes, by chi-squared over 4,000 of them."""
    pairs = Counter()
    for key in range(4000):
        pairs[noise.permuted(0, length, key), noise.permuted(1, length, key)] += 1
    cells = length * (length - 1)
    expected = 4000 / cells
    places = itertools.permutations(range(length), 2)
    chi = sum((pairs[pair] - expected) ** 2 / expected for pair in places)
    assert abs(chi - cells) < 5 * (2 * cells) ** 0.5, chi


SHAPES = {  # rows of each shard, lanes
    "equal": ([5] * 2048, 1024),
    "unequal": ([n % 7 + 1 for n in range(300)], 32),
    "one shard": ([11], 1),
    "more lanes than shards": ([3, 4], 8),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_has_each_row_once(shape):
    rows, lanes = SHAPES[shape]
    order, total = Lanes(rows, lanes, 3, 7), sum(rows)
    epochs = [[order[k] for k in range(e * total, (e + 1) * total)] for e in range(3 if total < 5000 else 1)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert len(set(map(tuple, epochs))) == len(epochs)
    far = total + 3, 2, total * 2 + 1, 0
    again = Lanes(rows, lanes, 3, 7)
    assert [again[k] for k in far] == [order[k] for k in far]
    assert total == 7 or [Lanes(rows, lanes, 3, 8)[k] for k in range(20)] != epochs[0][:20]


def test_processes_read_shards_of_their_own():
    """Enumerated, 1 to 1024: together they draw the single process's numbers, whatever number of processes
    drew the samples before; and where it divides the lanes no shard is read by two."""
    rows, lanes = SHAPES["equal"]
    order, total = Lanes(rows, lanes, 8, 0), sum(rows)
    drawn = [order[k] for k in range(total + 4096)]
    for world in range(1, 1025):
        batch, divides = max(1, 64 // world), lanes % world == 0
        size, first = world * batch, 24 * 60  # of which any number of processes drew the ones before
        count = total // size if divides else 3
        parts = [[*shares(first, count, batch, rank, world)] for rank in range(world)]
        for turn in {0, 1, count - 1}:
            together = sorted(k for part in parts for k in part[turn])
            assert together == list(range(first + turn * size, first + (turn + 1) * size))
        if divides:
            read_by = [{drawn[k] // rows[0] for numbers in part for k in numbers} for part in parts]
            assert sum(map(len, read_by)) == len(set().union(*read_by))


def test_unequal_lanes_share_only_what_is_left():
    rows, lanes = SHAPES["unequal"]
    order = Lanes(rows, lanes, 8, 0)
    owner = {shard: lane for lane, shards in enumerate(order.lanes) for shard in shards}
    shards = [shard for shard, count in enumerate(rows) for _ in range(count)]
    assert order.rest[-1] < 0.05 * order.length
    for epoch in range(3):
        start = epoch * order.length
        for k in range(start, start + order.least * lanes):
            assert owner[shards[order[k]]] == k % lanes


def test_neighbours_are_of_many_shards():
    order = Lanes([100] * 64, 16, 8, 0)
    assert len({order[k] // 100 for k in range(64)}) > 24


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_they_stopped(made, workers):
    data = Captioned(read(made, flag="--data"), resolution=16, caption_dropout=0.2, random_flip=True)
    whole = [b for b in batches(Stream(data, 3), first=0, count=6, batch_size=4, workers=workers)]
    rest = [*batches(Stream(data, 3), first=12, count=3, batch_size=4)]
    for a, b in zip(whole[3:], rest, strict=True):
        assert a["prompt"] == b["prompt"] and torch.equal(a["pixels"], b["pixels"])
    two = [[*batches(Stream(data, 3), first=12, count=6, batch_size=1, rank=r, world=2)] for r in (0, 1)]
    prompts = [p for pair in zip(*two, strict=True) for batch in pair for p in batch["prompt"]]
    assert prompts == [p for batch in rest for p in batch["prompt"]]


# Commands


def test_train_from_an_index(model, tars, tmp_path, capsys, monkeypatch):
    """Made by the command; trained, resumed to the same bytes, planned and checked."""
    monkeypatch.setattr(sys, "argv", ["minisd", str(tars), str(tmp_path / "index"), "--lanes", "2"])
    assert command() == 0
    said = capsys.readouterr().out
    assert "12 pictures" in said and "shards: 3, in 2 lanes, 8 mixed at a time" in said
    flags = ["--model", model, "--data", tmp_path / "index", "--resolution", 16, "--report_to", "none"]
    flags += ["--train_batch_size", 2, "--num_validation_images", 1, "--checkpointing_steps", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (
        train(
            "text_to_image", options("text_to_image", *flags, "--max_train_steps", 4, "--output_dir", whole)
        )
        == 0
    )
    assert "12 pictures" in capsys.readouterr().out
    flags += ["--output_dir", parts]
    assert train("text_to_image", options("text_to_image", *flags, "--max_train_steps", 2)) == 0
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    assert train("text_to_image", options("text_to_image", *flags)) == 0
    ours, theirs = ((out / "checkpoint-4" / "trained.safetensors").read_bytes() for out in (whole, parts))
    assert ours == theirs
    kept = ["--output_dir", tmp_path / "kept", "--latents_dir", tmp_path / "latents"]
    with pytest.raises(ValueError, match="^--latents_dir: .* an index"):
        train("text_to_image", options("text_to_image", *flags[:-6], *kept))


def test_only_an_index_is_replaced(tars, tmp_path, monkeypatch):
    """Not what the user has put beside it, such as the data."""
    out = tmp_path / "index"
    index.make(str(tars), out)
    monkeypatch.setattr(sys, "argv", ["minisd", str(out), str(out), "--overwrite"])
    (out / "0.tar").write_bytes((tars / "00000.tar").read_bytes())
    with pytest.raises(
        ValueError, match="index exists: --overwrite replaces it, if .* has nothing else in it"
    ):
        command()
    sys.argv[1] = str(tars)
    (out / "0.tar").unlink()
    assert command() == 0


def test_check_and_plan(model, made, tmp_path, capsys):
    flags = ["--model", model, "--data", made, "--resolution", 16, "--output_dir", tmp_path / "out"]
    assert train("text_to_image", options("text_to_image", *flags, "--check_data")) == 0
    said = capsys.readouterr().out
    assert "12 pictures" in said and "the same content: 0" in said and "without a caption: 0" in said
    method = registry.load_class("methods", "text_to_image")
    assert plan.report(method, options("text_to_image", *flags, "--plan")) == 0
    assert "GB" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_real_processes(model, tars, tmp_path):
    """They open shards of their own, train what one process does, and another number goes on with that."""
    index.make(str(tars), tmp_path / "index", lanes=2)
    (tmp_path / "sitecustomize.py").write_text(NOTE_OPENED)
    flags = ["--model", model, "--data", tmp_path / "index", "--resolution", 32, "--report_to", "none"]
    flags += ["--num_validation_images", 1, "--checkpointing_steps", 4, "--learning_rate", 1e-3]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [*flags, "--train_batch_size", 2, "--max_train_steps", 6]
    assert train("text_to_image", options("text_to_image", *alone, "--output_dir", one)) == 0
    both = [*flags, "--train_batch_size", 1, "--max_train_steps", 4, "--dataloader_num_workers", 1]
    command = [*TWO, ROOT / "train.py", "--method", "text_to_image", *both, "--output_dir", two]
    environment = ENV | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OPENED": str(tmp_path / "opened")}
    command = list(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    opened = [set((tmp_path / f"opened{rank}").read_text().split()) for rank in (0, 1)]
    assert all(opened) and not opened[0] & opened[1]
    more = [*alone, "--output_dir", two, "--resume_from_checkpoint", "latest"]
    assert train("text_to_image", options("text_to_image", *more)) == 0
    logs = ((out / "log.jsonl").read_text().splitlines() for out in (one, two))
    ours, theirs = ([json.loads(line)["grad_norm"] for line in log] for log in logs)
    assert len(ours) == 6 and theirs == pytest.approx(ours, rel=0.02)


NOTE_OPENED = """
import multiprocessing, os, sys

def note(event, args):
    if event == "open" and str(args[0]).endswith(".tar") and multiprocessing.parent_process():
        with open(os.environ["OPENED"] + os.environ["RANK"], "a") as file:
            print(args[0], file=file)

sys.addaudithook(note)
"""
