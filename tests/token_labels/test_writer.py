"""Writing a packed store: complete or not there, and refused content."""

import errno
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from label_maps import (
    GOOD,
    HEADER,
    LABELS,
    assert_same,
    drawn_map,
    with_class,
    with_score,
    write_store,
)

from volo.token_labels.opening import open_labels
from volo.token_labels.store import TokenLabelMap, TokenLabelStore
from volo.token_labels.writer import StoreWriter

FORK = multiprocessing.get_context("fork")


def in_child(body, *words):
    """Run ``body`` in a forked process and return what it returns."""
    with FORK.Pool(1) as pool:
        return pool.apply(body, words)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (drawn_map(0, k=3), r"scores \[3, 3, 4\].*should be \[2, height, width\]"),
        (drawn_map(0, w=0), r"scores \[2, 3, 0\]"),
        (TokenLabelMap(GOOD.scores[0], GOOD.classes[0]), r"scores \[3, 4\]"),
        (TokenLabelMap(GOOD.scores, drawn_map(0, h=4).classes), r"scores \[2, 3, 4\] and classes \[2, 4, 4\]"),
        (with_class(10), r"class index 10, allowed is 0 \.\.\. 9"),
        (with_class(-32768), "class index -32768"),
        (with_score(np.nan), "NaN"),
        (with_score(-np.inf), "NaN or beyond float16"),
    ],
)
def test_invalid_labels_are_refused_and_no_files_left(tmp_path, label, message):
    with (
        pytest.raises(ValueError, match=f"^label of 'bad/one': .*{message}"),
        StoreWriter(tmp_path / "labels", **HEADER) as out,
    ):
        out.add("good/one", GOOD)
        out.add("bad/one", label)
    assert list(tmp_path.iterdir()) == []


def test_the_last_class_and_the_largest_scores_are_fine(tmp_path):
    label = TokenLabelMap(np.full((1, 1, 2), -65504, np.float16), np.full((1, 1, 2), 32767, np.int16))
    path = write_store(tmp_path / "labels", {"x": label}, top_k=1, num_classes=1 << 15)
    assert_same(TokenLabelStore(path).read(0), label)


def test_duplicate_keys_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="label of 'a/x': there is one already.*rename one"),
        StoreWriter(tmp_path / "labels", **HEADER) as out,
    ):
        for key in ("a/x", "b/x", "a/x"):
            out.add(key, GOOD)
    assert list(tmp_path.iterdir()) == []


def test_wrong_headers_are_refused(tmp_path):
    for changes, message in (
        ({"exif": "turn"}, "exif is 'turn', allowed is ignore or apply"),
        ({"covers": "crop"}, "covers is 'crop', allowed is whole_image or center_crop"),
        ({"top_k": 0}, r"top_k is 0, allowed is 1 \.\.\. 10"),
        ({"top_k": 11}, "top_k is 11"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 32769}, r"num_classes is 32769; .* 1 \.\.\. 32,768"),
        ({"classes": ("a", "b")}, "class list has 2 names for num_classes 10"),
    ):
        with pytest.raises(ValueError, match=message):
            StoreWriter(tmp_path / "labels", **(HEADER | changes))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels: no label"):
        StoreWriter(tmp_path / "labels", **HEADER).close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_opens_before_close(tmp_path):
    out = StoreWriter(tmp_path / "labels", **HEADER)
    for i in range(3):
        out.add(str(i), GOOD)
        assert not (tmp_path / "labels").exists()
        for place in tmp_path.iterdir():
            with pytest.raises(ValueError, match="is not a store"):
                open_labels(place)
    out.close()
    assert len(open_labels(tmp_path / "labels")) == 3


def test_a_store_is_replaced_only_on_request_and_by_a_complete_one(packed):
    with pytest.raises(ValueError, match="labels exists already; .*--overwrite true"):
        StoreWriter(packed, **HEADER)
    assert len(TokenLabelStore(packed)) == 4
    with pytest.raises(ZeroDivisionError), StoreWriter(packed, **HEADER, overwrite=True) as out:
        out.add("x", GOOD)
        raise ZeroDivisionError
    assert TokenLabelStore(packed).find(["cat/c1", "x"]).tolist() == [1, -1]
    write_store(packed, {"x": GOOD}, overwrite=True)
    assert TokenLabelStore(packed).find(["cat/c1", "x"]).tolist() == [-1, 0]
    assert [p.name for p in packed.parent.iterdir()] == ["labels"]


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        with pytest.raises(ValueError, match=f"{name} exists, is not a store"):
            StoreWriter(tmp_path / name, **HEADER, overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "file"}
    (tmp_path / "empty").mkdir()
    assert len(TokenLabelStore(write_store(tmp_path / "empty", LABELS))) == 4
    with pytest.raises(ValueError, match="cannot be written: .*name another folder"):
        StoreWriter(tmp_path / "file" / "labels", **HEADER)


def test_a_kill_while_replacing_loses_no_store(packed, caplog):
    """Between the two renames of a replacement both stores are there, under hidden names."""
    os.rename(packed, packed.with_name(".labels.replaced"))
    with pytest.raises(ValueError, match="exists already"):
        StoreWriter(packed, **HEADER)
    assert "restored" in caplog.text
    assert TokenLabelStore(packed).find(["cat/c3"]).tolist() == [3]
    shutil.copytree(packed, packed.with_name(".labels.replaced"))  # a kill while the old one was being removed
    write_store(packed, {"x": GOOD}, overwrite=True)
    assert [p.name for p in packed.parent.iterdir()] == ["labels"]


def test_two_writers_do_not_mix(tmp_path):
    with StoreWriter(tmp_path / "labels", **HEADER) as out:
        with pytest.raises(ValueError, match="another process is writing .*labels"):
            StoreWriter(tmp_path / "labels", **HEADER)
        out.add("x", GOOD)
    assert TokenLabelStore(tmp_path / "labels").find(["x"]).tolist() == [0]


def _write_with_little_room(path: Path) -> tuple[int, list[str]]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # a stand-in for a full disk
    try:
        write_store(path, {f"k{i}": drawn_map(i, h=20, w=20) for i in range(1000)})
    except OSError as error:
        return error.errno, [p.name for p in path.parent.iterdir()]


def test_a_full_disk_leaves_no_files(tmp_path):
    assert in_child(_write_with_little_room, tmp_path / "labels") == (errno.EFBIG, [])
