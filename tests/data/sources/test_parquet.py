"""Parquet files whose rows or README name other files: those in the data set's folder are read, and no others."""

from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from volo.config import DataConfig
from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.formats import open_split

CLASSES = ("a", "b")


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    """Keep the copies of these data sets out of the cache of the other tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def write(folder: Path, *images: tuple[bytes | None, str | None]) -> None:
    """Write a data set of rows (bytes, path) as they stand, which the package ``datasets`` itself would not do."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = pyarrow.array([{"bytes": content, "path": path} for content, path in images], kind)
    table = pyarrow.table({"image": rows, "label": [0] * len(images)})
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(
        table.replace_schema_metadata(features.arrow_schema.metadata), folder / "data/train-00000-of-00001.parquet"
    )


def records(folder: Path):
    return open_split(DataConfig(str(folder), cache="none"), "train").records(CLASSES)


@pytest.mark.parametrize("path", ["../secret.jpg", "/dev/null", "data/../../secret.jpg", "x/", "."])
@pytest.mark.parametrize("content", [None, b""])
def test_a_path_out_of_the_data_set_is_refused_before_the_first_step(tmp_path, path, content):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    write(tmp_path / "set", (b"1", "/any/where/x.jpg"), (content, path))  # beside bytes a path is only a name
    with pytest.raises(ValueError, match="split train., row 1, which has no bytes, has the name") as error:
        records(tmp_path / "set")
    assert repr(path) in str(error.value)


def test_a_path_in_the_data_set_is_read(tmp_path):
    folder = tmp_path / "set"
    write(folder, (None, "w.jpg"), (None, f"{folder}/x.jpg"), (b"3", "../y.jpg"), (None, "z.jpg"), (None, None))
    (folder / "w.jpg").write_bytes(b"1")
    (folder / "x.jpg").write_bytes(b"2")
    (folder / "z.jpg").symlink_to("/dev/null")
    found = records(folder)
    by_name = {name: index for index, name in enumerate(found.names)}
    assert [found.read(by_name[f"a/{name}.jpg"]) for name in "wxy"] == [b"1", b"2", b"3"]
    for name, message in (("a/z.jpg", "z.jpg' .a pipe, a socket or a device"), ("a/00000004.jpg", "no image")):
        with pytest.raises(UnreadableImage, match=message):
            found.read(by_name[name])


def test_a_readme_that_names_other_files_is_refused(tmp_path):
    write(tmp_path / "other", (b"1", "x.jpg"))
    write(tmp_path / "set", (b"2", "x.jpg"))
    assert records(tmp_path / "set").read(0) == b"2"
    data_files = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../other/data/*\n"
    (tmp_path / "set/README.md").write_text(f"---\n{data_files}---\n")
    with pytest.raises(ValueError, match="set has the name '../other/data/train-00000"):
        records(tmp_path / "set")
