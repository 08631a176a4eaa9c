"""--dataset_name: the hub, saved datasets and parquet files, through the package `datasets`."""

import io
import shutil
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from minisd import cli, registry
from minisd.data import source
from minisd.data.datasets import Captioned
from tests.data_helpers import captions, picture


def read_dataset(name, **kwargs):
    return source.read(name, flag="--dataset_name", by_split=True, **kwargs)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^--dataset_name a/b .*pip install 'minisd\[datasets\]'$"):
        read_dataset("a/b")


def test_a_plain_folder_needs_no_package(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_dataset(str(two))) == 2


def test_from_options(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    def read_options(data=None, dataset_name=None, max_train_samples=None):
        options = {"data": data, "dataset_name": dataset_name, "max_train_samples": max_train_samples}
        return source.from_options(cli.options_of("text_to_image")(**options), cache_dir=None)

    assert len(read_options(two)) == 2
    assert len(read_options(two, max_train_samples=1)) == 1
    with pytest.raises(ValueError, match="^--dataset_name a/b needs"):
        read_options(dataset_name="a/b")
    (two / "notes.parquet").write_bytes(b"")  # beside pictures it is ignored
    assert len(read_options(two)) == 2
    only = two / "only"
    only.mkdir()
    (only / "x.parquet").write_bytes(b"")
    for path in (only, only / "x.parquet"):
        with pytest.raises(ValueError, match="^--data .* needs the package"):
            read_options(path)


class Table:
    """As much of a dataset as is asked for."""

    def __init__(self, features, rows):
        self.features, self.rows, self.column_names = features, rows, list(features)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return {c: [row[c] for row in self.rows] for c in self.features}
        return {c: self.rows[key][c] for c in self.features}

    def cast_column(self, column, kind):
        return Table(self.features | {column: kind}, self.rows)

    def select_columns(self, column):
        return Table({column: self.features[column]}, self.rows)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package with one dataset in it."""

    class Feature:
        def __init__(self, dtype=None, decode=True):
            self.dtype, self.decode = dtype, decode

    module = types.ModuleType("datasets")
    module.Image = type("Image", (Feature,), {})
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), "red").save(buffer, "PNG")
    rows = [
        {"image": {"bytes": buffer.getvalue(), "path": None}, "text": f"t{i}", "n": i, "tags": ["x", "y"]}
        for i in range(4)
    ]
    features = {"image": module.Image(), "text": Feature("string"), "n": Feature("int64")}
    features["tags"] = [Feature("string")]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist\non the Hub")
        return {"train": Table(features, rows), "test": Table(features, rows[:3])}

    module.load_dataset, module.calls, module.rows = load_dataset, calls, rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_of_the_hub(package):
    data = read_dataset("a/b", config="c", cache_dir="d")
    assert package.calls == [(("a/b", "c"), {"data_dir": None, "cache_dir": "d"})]
    assert len(data) == 4 and data.left_out == ("3 of test",)
    assert data.columns == ["image", "text", "tags"] and captions(data)["row 3"] == "t3"
    assert data.open(1, "image").getpixel((0, 0)) == (255, 0, 0)
    assert data.records[0].sizes == {"image": (12, 10)}
    with pytest.raises(ValueError, match="^--caption_column x: a/b .* image, text, tags$"):
        Captioned(data, resolution=8, caption_column="x")
    with pytest.raises(ValueError, match=r"^--dataset_name gone: Dataset 'gone' doesn't exist$"):
        read_dataset("gone")
    drawn = [read_dataset("a/b", max_samples=2, seed=seed).records for seed in range(6)]
    assert len({tuple(r.name for r in records) for records in drawn}) > 1
    for records in drawn:
        assert [r.texts["text"] for r in records] == [f"t{r.name[-1]}" for r in records]
        assert len(records) == 2


def test_bad_pictures_of_a_dataset(package):
    package.rows[2]["image"] = {"bytes": b"x", "path": None}
    package.rows[3]["image"] = None
    with pytest.raises(ValueError, match="^--dataset_name: row 2, column image is not a picture; --skip_bad"):
        read_dataset("a/b")
    data = read_dataset("a/b", skip_bad_images=True)
    assert len(data) == 2 and data.skipped[1] == "row 3, column image cannot be decoded: it is empty"


def test_real_datasets(tmp_path):
    """The package itself, where it is installed: saved, exported, and written by something else."""
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    picture(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "text": ["A"]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    data.to_parquet(tmp_path / "x.parquet")
    for name, value in (("cells", {"bytes": content, "path": None}), ("raw", content)):
        pyarrow.parquet.write_table(pa.table({"image": [value], "text": ["A"]}), tmp_path / f"{name}.parquet")
    for name in ("saved", "dict", "x.parquet", "cells.parquet", "raw.parquet"):
        data = read_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert captions(data) == {"row 0": "A"} and data.open(0, "image").size == (12, 10)
    with pytest.raises(ValueError, match="^--dataset_name: there is no .*y.parquet"):
        read_dataset(str(tmp_path / "y.parquet"))


# Splits

LAYOUTS = {
    "folders": "train/a.png train/b.png test/c.png validation/d.png",
    "folders of other names": "training set/a.png data/valid/b.png eval-1/c.png my_dev_x/d.png cat/e.png",
    "deep folders": "x/train/cat/a.png x/train/dog/b.png x/test/cat/c.png",
    "files": "train-1.png train_2.png test.png validation 3.png cat.png",
    "folders before files": "train/a.png train/test_b.png test/train_c.png test-d.png",
    "both words": "train/test/a.png train/b.png test/c.png",
    "no words": "trains/a.png latest/b.png train.d/c.png contest.png evaluate.png",
    "only words that are longer": "trained/a.png attest/b.png validity.png",
    "a picture of a train": "steam train 1.png steam train 2.png",
    "folders alone": "test_1/a.png train2/b.png",
    "a file without a separator": "train/a.png testing.png pretest.png",
}


def make_layout(folder, names):
    for name in names:
        picture(folder / name)
    return folder


def layout(name):
    return [f"{stem}.png".strip() for stem in LAYOUTS[name].split(".png")[:-1]]


@pytest.mark.parametrize(
    "name, training, left_out",
    [
        ("folders", "train/a train/b", "1 of validation, 1 of test"),
        ("folders of other names", "training set/a", "2 of validation, 1 of test, 1 "
         "of no split"),
        ("files", "train-1 train_2", "1 of validation, 1 of test, 1 of no split"),
        ("folders before files", "train/a train/test_b", "1 of test, 1 of no split"),
        ("both words", "train/b train/test/a", "1 of test"),
        ("a picture of a train", "steam train 1 steam train 2", ""),
        ("only words that are longer", "attest/b trained/a validity", ""),
    ],
)  # fmt: skip
def test_the_split_train(name, training, left_out, tmp_path):
    folder = make_layout(tmp_path / "data", layout(name))
    data = read_dataset(str(folder))
    assert " ".join(r.name.removesuffix(".png") for r in data.records) == training
    assert ", ".join(data.left_out) == left_out
    assert (f"only the split train; left out: {left_out}" in data.summary()) == bool(left_out)
    assert len(source.read(folder, flag="--data").records) == len(layout(name))  # where splits do not count


def test_no_split_train(tmp_path):
    make_layout(tmp_path, ["test/a.png", "val/b.png", "c.png"])
    with pytest.raises(ValueError, match="^--dataset_name: .* no split train by its names, but 1 of val"):
        read_dataset(str(tmp_path))


def test_metadata_of_splits(tmp_path):
    """In the folder of a split, or at the root with rows of several; that of another split is not read."""
    make_layout(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,A\nb.png,B\n")
    (tmp_path / "test" / "metadata.csv").write_text("broken")
    assert captions(read_dataset(str(tmp_path))) == {"train/a.png": "A", "train/b.png": "B"}
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,A\ntrain/b.png,B\ntest/c.png,C\n")
    data = read_dataset(str(tmp_path))
    assert captions(data) == {"train/a.png": "A", "train/b.png": "B"}
    assert data.left_out == ("1 of test",)


def test_which_methods_tell_splits_apart(tmp_path):
    """--dataset_name always; --data by the methods whose script lets `datasets` look at the names."""
    by_names = {m for m in registry.names("methods")
                if getattr(cli.options_of(m), "DATA_HAS_SPLITS", False)}  # fmt: skip
    assert by_names == {"unconditional", "controlnet"}
    make_layout(tmp_path, ["train/a.png", "test/b.png"])
    for method, flag, count in (
        ("unconditional", "--train_data_dir", 1), ("unconditional", "--dataset_name", 1),
        ("text_to_image", "--train_data_dir", 2), ("text_to_image", "--dataset_name", 1),
    ):  # fmt: skip
        o = cli.parse_train(["--method", method, flag, str(tmp_path)])[1]
        assert len(source.from_options(o, None)) == count, (method, flag)


def test_data_beside_dataset_name_is_a_folder_in_it(tmp_path, package, capsys):
    make_layout(tmp_path, ["red/train/a.png", "red/train/b.png", "blue/train/c.png"])

    def read_both(name, folder):
        argv = ["--method", "text_to_image", "--dataset_name", str(name), f"--train_data_dir={folder}"]
        return source.from_options(cli.parse_train(argv)[1], None)

    assert [r.name for r in read_both(tmp_path, "red").records] == ["train/a.png", "train/b.png"]
    for wrong in ("green", tmp_path / "red"):
        with pytest.raises(
            ValueError, match=f"^--data {wrong}: {tmp_path} of --dataset_name has no such folder"
        ):
            read_both(tmp_path, wrong)
    read_both("a/b", "red")
    assert package.calls == [(("a/b", None), {"data_dir": "red", "cache_dir": None})]


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_those_of_the_package(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = make_layout(tmp_path / "data", layout(name))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    files = theirs["train"].cast_column("image", datasets.Image(decode=False))["image"]
    names = [Path(cell["path"]).relative_to(folder).as_posix() for cell in files]
    assert sorted(names) == [r.name for r in read_dataset(str(folder)).records]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_splits_of_tables(form, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    parts = {}
    for split, count in (("train", 2), ("test", 3)):
        rows = [str(picture(tmp_path / "pictures" / f"{split}{i}.png")) for i in range(count)]
        columns = {"image": rows, "text": [split] * count}
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path / "data"
    folder.mkdir()
    if form == "saved":
        datasets.DatasetDict(parts).save_to_disk(folder)
    else:
        for split, part in parts.items():
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    data = read_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(captions(data).values()) == {"train"} and len(data) == 2
    assert data.left_out == ("3 of test",) and "left out: 3 of test" in data.summary()
    for path in folder.glob("train*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    if form == "saved":
        datasets.DatasetDict({"test": parts["test"]}).save_to_disk(folder)
    with pytest.raises(ValueError, match=f"^--dataset_name {folder}: it has no split train, but test$"):
        read_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
