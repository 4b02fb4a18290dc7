"""The packed store: what is written is read back, and damage is found."""

import hashlib
import json
import multiprocessing
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_maps import LABELS, assert_same, drawn_map, published, write_store

from volo.token_labels import store, writer
from volo.token_labels.pt_folder import PublishedLabels
from volo.token_labels.source import LabelSource
from volo.token_labels.store import StoreHeader, TokenLabelMap, TokenLabelStore, label_key

FORK = multiprocessing.get_context("fork")


def in_child(body, *words):
    """Run ``body`` in a forked process and return what it returns."""
    with FORK.Pool(1) as pool:
        return pool.apply(body, words)


# ------------------------------------------------------------------------------------------------ round trip


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    num_classes=st.sampled_from([5, 1000, 1 << 15]),
    seed=st.integers(0, 1 << 30),
)
def test_added_labels_are_read_back(tmp_path_factory, k, shapes, num_classes, seed):
    labels = {f"n{i}/x{i}": drawn_map(seed + i, k, h, w, num_classes) for i, (h, w) in enumerate(shapes)}
    path = write_store(tmp_path_factory.mktemp("s") / "labels", labels, top_k=k, num_classes=num_classes)
    opened = TokenLabelStore(path)
    assert len(opened) == opened.header.entries == len(labels)
    for entry, key in zip(opened.find(list(labels)).tolist(), labels, strict=True):
        assert opened.key(entry) == key
        assert_same(opened.read(entry), labels[key])
    opened.verify_checksums()


def test_header_comes_back(tmp_path):
    names = tuple(f"class {i}" for i in range(10))
    path = write_store(tmp_path / "new" / "labels", LABELS, classes=names, covers="center_crop")
    assert TokenLabelStore(path).header == StoreHeader("a teacher", "center_crop", 2, 10, names, 4)
    assert [p.name for p in path.parent.iterdir()] == ["labels"]  # no temporary files


def test_files_follow_the_format(packed):
    """Read the store by the description of the format alone."""
    header = json.loads((packed / "header.json").read_text())
    assert {p.name for p in packed.iterdir()} == {"header.json", *header["files"]}
    for name, record in header["files"].items():
        content = (packed / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    scores, classes = np.fromfile(packed / "scores.bin", "<f2"), np.fromfile(packed / "classes.bin", "<i2")
    keys = (packed / "keys.bin").read_bytes().decode()
    records = (packed / "entries.bin").read_bytes()
    rows = struct.iter_unpack("<qqii", records)
    checksums = np.fromfile(packed / "checksums.bin", "<u4").tolist()
    begin = 0
    for i, ((key, label), row) in enumerate(zip(LABELS.items(), rows, strict=True)):
        content = records[24 * i : 24 * (i + 1)] + label.scores.tobytes() + label.classes.tobytes()
        assert checksums[i] == zlib.crc32(content)
        start, key_end, *hw = row
        assert hw == list(label.scores.shape[1:])
        assert keys[begin:key_end] == key
        for stored, values in ((scores, label.scores), (classes, label.classes)):
            np.testing.assert_array_equal(stored[start : start + values.size], values.ravel())
        begin = key_end
    hashes, entries = np.fromfile(packed / "index.bin", "<u8").reshape(2, -1)
    expected = {int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little"): k for k in LABELS}
    assert hashes.tolist() == sorted(expected)
    assert [expected[h] for h in hashes.tolist()] == [[*LABELS][e] for e in entries]


def test_maps_are_views_that_cannot_be_written(packed):
    label = TokenLabelStore(packed).read(2)
    for array in label:
        assert not array.flags.writeable and not array.flags.owndata
    assert_same(label, LABELS["cat/c2"])  # the store itself is gone, its pages are not


def test_entries_that_do_not_exist_are_not_read(packed):
    for labels in (
        TokenLabelStore(packed),
        PublishedLabels(published(packed.parent / "pt", {"a/b": LABELS["cat/c0"]})),
    ):
        for entry in (-1, len(labels)):
            with pytest.raises(AssertionError, match=f"entry {entry} of"):
                labels.read(entry)


# ------------------------------------------------------------------------------------------------ keys


def test_label_key_drops_the_last_suffix():
    for path, key in {"n01/n01_10.JPEG": "n01/n01_10", "a/b.c.png": "a/b.c", "a.b/c": "a.b/c", "x.jpg": "x"}.items():
        assert label_key(path) == key


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30, unique=True),
    asked=st.lists(st.text(max_size=3), max_size=10),
    seed=st.integers(0, 1 << 30),
)
def test_find_keeps_the_order_of_its_keys(tmp_path_factory, keys, asked, seed):
    keys = [key.encode("utf-8", "replace").decode() for key in keys]
    keys = list(dict.fromkeys(keys))
    labels = dict.fromkeys(keys, drawn_map(0, h=1, w=1))
    opened = TokenLabelStore(write_store(tmp_path_factory.mktemp("s") / "labels", labels))
    asked = [a.encode("utf-8", "replace").decode() for a in asked]
    rng = np.random.default_rng(seed)
    asked = [*rng.permutation(np.array(keys, dtype=object)), *asked, keys[0], keys[0] + "+"]
    found = opened.find(asked)
    assert found.dtype == np.int64
    assert found.tolist() == [keys.index(key) if key in keys else -1 for key in asked]


def test_find_of_no_keys_and_of_unusual_names(tmp_path):
    odd = ["n/ü", os.fsdecode(b"n/\xff"), "n/\0", "n/a b"]
    opened = TokenLabelStore(write_store(tmp_path / "labels", dict.fromkeys(odd, drawn_map(0))))
    assert opened.find([]).tolist() == [] and opened.find([]).dtype == np.int64
    assert opened.find(odd[::-1]).tolist() == [3, 2, 1, 0]
    assert [opened.key(i) for i in range(4)] == odd


def test_keys_with_the_same_hash_are_distinguished(tmp_path, monkeypatch):
    """64-bit collisions cannot be made to order, so give the store a hash of two values."""
    for module in (store, writer):
        monkeypatch.setattr(module, "hash_keys", lambda keys: np.array([len(key) % 2 for key in keys], dtype="<u8"))
    labels = {"x" * i: drawn_map(i, h=1, w=1) for i in range(1, 10)}
    opened = TokenLabelStore(write_store(tmp_path / "labels", labels))
    assert opened.find([*labels][::-1]).tolist() == [*range(9)][::-1]  # odd and even lengths share a hash
    assert opened.find(["y", "yy", "x" * 10, "x" * 3]).tolist() == [-1, -1, -1, 2]


# ------------------------------------------------------------------------------------------------ sharing


def _read_in_child(opened: TokenLabelStore) -> tuple[list[TokenLabelMap], list[str]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    kinds = [line.split()[1] for line in lines if line.endswith(str(opened.path / "scores.bin"))]
    return [TokenLabelMap(*map(np.array, opened.read(i))) for i in range(len(opened))], kinds


@pytest.mark.parametrize("way", ["fork", "pickle"])
def test_other_processes_share_the_pages(packed, way, request):
    opened = TokenLabelStore(packed)
    request.addfinalizer(_INHERITED.clear)
    _INHERITED.append(opened)
    read, kinds = in_child(_read_in_child, opened) if way == "pickle" else in_child(_read_inherited)
    for label, expected in zip(read, LABELS.values(), strict=True):
        assert_same(label, expected)
    assert kinds and set(kinds) == {"r--s"}  # read-only and shared, so no process has a copy


_INHERITED: list[TokenLabelStore] = []


def _read_inherited():
    return _read_in_child(_INHERITED[0])


def test_a_pickle_holds_no_labels_and_finds_its_store_from_elsewhere(tmp_path, monkeypatch):
    big = {f"k{i}": drawn_map(i, h=20, w=20) for i in range(20)}
    write_store(tmp_path / "labels", big)
    monkeypatch.chdir(tmp_path)
    opened = TokenLabelStore("labels")
    text = pickle.dumps(opened)
    assert len(text) < 2000
    monkeypatch.chdir("/")
    assert_same(pickle.loads(text).read(7), big["k7"])


def test_a_replaced_store_is_noticed(packed):
    opened = TokenLabelStore(packed)
    text = pickle.dumps(opened)
    write_store(packed, {"other": drawn_map(9)}, overwrite=True)
    assert_same(opened.read(3), LABELS["cat/c3"])  # what is mapped stays
    with pytest.raises(ValueError, match="labels was replaced by another store while .* start the run again"):
        pickle.loads(text)


# ------------------------------------------------------------------------------------------------ damaged stores


def edit_header(path: Path, **changes) -> None:
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps({k: v for k, v in (header | changes).items() if v != "gone"}))


def test_not_a_store(packed, tmp_path):
    (packed / "header.json").unlink()  # what an interrupted copy may look like
    for path in (packed, packed / "scores.bin", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"is not a store .*no header.json.*scripts/pack_token_labels.py"):
            TokenLabelStore(path)
    for text in ("{", "[]", "3", '{"version": 1}', "\udcff"):
        (packed / "header.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="header.json is not the header of a store"):
            TokenLabelStore(packed)
    (packed / "header.json").write_text('{"format": "recipes"}')
    with pytest.raises(ValueError, match="labels is not a store of token labels.*'recipes'"):
        TokenLabelStore(packed)


def test_unknown_version(packed):
    for version in (0, 2, "1", None):
        edit_header(packed, version=version)
        with pytest.raises(ValueError, match=f"labels has version {version!r}.* version 1"):
            TokenLabelStore(packed)


@pytest.mark.parametrize("name", (*store.FILES, store.CHECKSUMS))
def test_incomplete(packed, name):
    path = packed / name
    content = path.read_bytes()
    for other in (content[:-1], content + b"\0", b""):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=f"{name} is {len(other):,} bytes instead of {len(content):,}"):
            TokenLabelStore(packed)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TokenLabelStore(packed)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "gone"},
        {"top_k": "gone"},
        {"files": "gone"},
        {"files": {}},
        {"classes": 3},
        {"entries": 0},
        {"entries": 3},
        {"entries": "four"},
        {"entries": -4},
        {"entries": 1 << 70},
        {"entries": float("inf")},
        {"top_k": -2},
        {"top_k": 1 << 40},
        {"num_classes": float("inf")},
        {"classes": [[]] * 10},
        {"classes": ["one name"]},
        {"covers": "nothing"},
        {"exif": "sometimes"},
        {"files": dict.fromkeys(store.FILES, {"bytes": -1, "sha256": "0" * 64})},
        {"files": dict.fromkeys(store.FILES, {"bytes": float("inf"), "sha256": "0" * 64})},
        {"files": [*store.FILES]},
    ],
)
def test_damaged_header(packed, changes):
    edit_header(packed, **changes)
    with pytest.raises(ValueError, match="header.json is damaged.*pack it again"):
        TokenLabelStore(packed)


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 1), (16, 7), (16, -1), (16, 0), (24, 9), (32, 0), (3 * 24 + 8, 3), (3 * 24 + 16, 7)]
)
def test_entries_that_do_not_match_the_files(packed, offset, value):
    content = bytearray((packed / "entries.bin").read_bytes())
    struct.pack_into("<i", content, offset, value)
    (packed / "entries.bin").write_bytes(content)
    with pytest.raises(ValueError, match="entries.bin is not the table"):
        TokenLabelStore(packed)


def test_a_header_of_any_size_and_depth(packed, monkeypatch):
    (packed / "header.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="header.json is not the header of a store"):
        TokenLabelStore(packed)
    assert not store.is_store(packed)
    monkeypatch.setattr(store, "_LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="header.json is damaged .it has more than 1,000 bytes"):
        TokenLabelStore(packed)


def test_sizes_of_both_signs(packed):
    """-1 x -5 cells are as many as 1 x 5."""
    content = bytearray((packed / "entries.bin").read_bytes())
    height, width = struct.unpack_from("<ii", content, 16)
    struct.pack_into("<ii", content, 16, -height, -width)
    (packed / "entries.bin").write_bytes(content)
    with pytest.raises(ValueError, match="entries.bin is not the table"):
        TokenLabelStore(packed)


@pytest.mark.parametrize("value", [-1, 4, 1 << 40, -(1 << 63)])
@pytest.mark.parametrize("place", [0, 3])
def test_an_index_of_entries_that_do_not_exist(packed, place, value):
    content = bytearray((packed / "index.bin").read_bytes())
    struct.pack_into("<q", content, 8 * (4 + place), value)
    (packed / "index.bin").write_bytes(content)
    with pytest.raises(ValueError, match="index.bin is not the index"):
        TokenLabelStore(packed)


def test_an_index_out_of_order(packed):
    hashes, order = np.fromfile(packed / "index.bin", "<u8").reshape(2, -1)
    (packed / "index.bin").write_bytes(hashes[::-1].tobytes() + order.tobytes())
    with pytest.raises(ValueError, match="index.bin is not the index"):
        TokenLabelStore(packed)


def test_entries_of_another_top_k(packed):
    edit_header(packed, top_k=3)
    with pytest.raises(ValueError, match="entries.bin is not the table"):
        TokenLabelStore(packed)


@pytest.mark.parametrize("name", store.FILES)
def test_checksums_find_changes_that_keep_the_size(packed, name):
    TokenLabelStore(packed).verify_checksums()
    content = bytearray((packed / name).read_bytes())
    if name == "entries.bin":  # a map of 1 x 5 read as one of 5 x 1
        struct.pack_into("<ii", content, 16, 5, 1)
    else:
        content[3] ^= 1
    (packed / name).write_bytes(content)
    opened = TokenLabelStore(packed)
    with pytest.raises(ValueError, match=f"labels/{name} has changed"):
        opened.verify_checksums()


@pytest.mark.parametrize("name", ["scores.bin", "classes.bin", "checksums.bin"])
def test_every_changed_byte_is_noticed_when_its_map_is_read(packed, name):
    content = (packed / name).read_bytes()
    unit = (packed / name).stat().st_size // TokenLabelStore(packed).header.entries if name == "checksums.bin" else 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (packed / name).write_bytes(changed)
        opened = TokenLabelStore(packed)
        wrong = []
        for entry, label in enumerate(LABELS.values()):
            try:
                assert_same(opened.read(entry), label)
            except ValueError as error:
                assert "labels: label of 'cat/c" in str(error) and "pack it again" in str(error)
                wrong.append(entry)
        assert len(wrong) == 1
        assert not unit or wrong == [place // unit]


def test_maps_of_the_same_area_are_told_apart(packed):
    content = bytearray((packed / "entries.bin").read_bytes())
    height, width = struct.unpack_from("<ii", content, 16)
    struct.pack_into("<ii", content, 16, width, height)
    (packed / "entries.bin").write_bytes(content)
    with pytest.raises(ValueError, match="label of 'cat/c0' has changed since it was packed"):
        TokenLabelStore(packed).read(0)


def test_a_store_of_earlier_code_is_read_without_checksums(packed):
    source = [str(packed), [f"{key}.jpg" for key in LABELS], tuple(map(str, range(10))), (2, 2), "aligned"]
    assert "without checksums" not in str(LabelSource(*source))
    files = json.loads((packed / "header.json").read_text())["files"]
    del files["checksums.bin"]
    edit_header(packed, files=files)
    (packed / "checksums.bin").unlink()
    opened = TokenLabelStore(packed)
    assert not opened.has_checksums
    assert "without checksums of its maps" in str(LabelSource(*source))
    for entry, label in enumerate(LABELS.values()):
        assert_same(opened.read(entry), label)
    opened.verify_checksums()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores.bin", struct.pack("<e", float("nan")), "scores that are NaN or beyond float16"),
        ("classes.bin", struct.pack("<h", 10), r"class index 10, allowed is 0 \.\.\. 9"),
        ("classes.bin", struct.pack("<h", -1), "class index -1"),
    ],
)
def test_invalid_values_are_not_read(packed, name, value, message):
    content = bytearray((packed / name).read_bytes())
    start = 2 * sum(LABELS[f"cat/c{i}"].scores.size for i in (0, 1))  # bytes of the entries before c2
    content[start : start + 2] = value
    (packed / name).write_bytes(content)
    opened = TokenLabelStore(packed)
    for entry, key in enumerate(LABELS):
        if key != "cat/c2":
            assert_same(opened.read(entry), LABELS[key])
    with pytest.raises(ValueError, match=f"{packed}: label of 'cat/c2': {message}.*copy the store.*pack it again"):
        opened.read(2)


@pytest.mark.parametrize("name", ["header.json", *store.FILES])
def test_a_file_of_a_store_that_is_a_device_is_not_read(packed, name):
    (packed / name).unlink()
    (packed / name).symlink_to("/dev/null")
    with pytest.raises(ValueError, match=f"{name} cannot be read: a pipe, a socket or a device"):
        TokenLabelStore(packed)
    assert store.is_store(packed) == (name != "header.json")
