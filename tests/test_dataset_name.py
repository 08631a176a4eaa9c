"""--dataset_name: the hub, saved datasets and parquet files, through the package `datasets`."""

import io
import sys
import types

import pytest
from PIL import Image

from minisd.data import source
from minisd.data.datasets import Captioned
from tests.data_helpers import captions, picture


def read_dataset(name, **kwargs):
    return source.read(name, flag="--dataset_name", **kwargs)


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
        common = {"dataset_config_name": None, "skip_bad_images": False, "seed": 0}
        return source.from_options(types.SimpleNamespace(**options, **common), cache_dir=None)

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
        return Table(features, rows)

    module.load_dataset, module.calls, module.rows = load_dataset, calls, rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_of_the_hub(package):
    data = read_dataset("a/b", config="c", cache_dir="d")
    assert package.calls == [(("a/b", "c"), {"split": "train", "cache_dir": "d"})]
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
