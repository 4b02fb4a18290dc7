"""PackedNames and FolderSource against plain lists and plain reading."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.base import FolderSource, PackedNames

# File names need not be UTF-8.
NAMES = st.lists(st.binary(max_size=12).map(os.fsdecode) | st.text(st.characters(exclude_categories=["Cs"])))


@given(NAMES)
def test_packed_names_equal_the_list(names):
    packed = PackedNames.of(iter(names))
    assert list(packed) == names and len(packed) == len(names)
    assert [packed[i] for i in range(-len(names), len(names))] == names * 2
    assert packed == PackedNames.of(names) == pickle.loads(pickle.dumps(packed))
    assert packed != PackedNames.of([*names, "x"])
    for outside in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[outside]


def test_the_same_text_in_other_pieces_is_not_equal():
    assert PackedNames.of(["ab", "c"]) != PackedNames.of(["a", "bc"])
    assert [PackedNames.of(["ab", "c"])[i] for i in np.array([1, -2])] == ["c", "ab"]


def test_folder_source_reads_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(b"123")
    (tmp_path / "a/y.jpg").write_bytes(b"")
    source = FolderSource(str(tmp_path), PackedNames.of(["a/x.jpg", "a/y.jpg", "a/gone.jpg", "a"]))
    assert [source.read(0), source.read(1)] == [b"123", b""] and source.location(1) == f"{tmp_path}/a/y.jpg"
    with pytest.raises(UnreadableImage, match=f"^cannot read {tmp_path}/a/gone.jpg: No such file or directory$"):
        source.read(2)
    with pytest.raises(UnreadableImage, match=f"^cannot read {tmp_path}/a: Is a directory$"):
        source.read(3)
