"""The packed store and the published layout, written and read, and every way in which they can be wrong.

k top scores a cell, h x w cells of a label map, C classes.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.token_labels import store, writer
from volo.token_labels.opening import check_orientation, match_images, open_labels
from volo.token_labels.pt_folder import PublishedLabels, sample
from volo.token_labels.store import StoreHeader, TokenLabelMap, TokenLabelStore, label_key
from volo.token_labels.writer import StoreWriter

HEADER = {"teacher": "a teacher", "covers": "whole_image", "top_k": 2, "num_classes": 10}
FORK = multiprocessing.get_context("fork")


def drawn_map(seed: int, k: int = 2, h: int = 3, w: int = 4, num_classes: int = 10) -> TokenLabelMap:
    rng = np.random.default_rng(seed)
    scores = rng.normal(3, 5, (k, h, w)).astype(np.float16)
    return TokenLabelMap(scores, rng.integers(0, num_classes, (k, h, w)).astype(np.int16))


def write_store(path: Path, labels: dict[str, TokenLabelMap], **changes) -> Path:
    with StoreWriter(path, **(HEADER | changes)) as out:
        for key, label in labels.items():
            out.add(key, label)
    return path


def assert_same(a: TokenLabelMap, b: TokenLabelMap) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def in_child(body, *words):
    """Run ``body`` in a forked process and return what it returns."""
    with FORK.Pool(1) as pool:
        return pool.apply(body, words)


LABELS = {f"cat/c{i}": drawn_map(i, h=1 + i, w=5 - i) for i in range(4)}


@pytest.fixture
def packed(tmp_path) -> Path:
    return write_store(tmp_path / "labels", LABELS)


# ------------------------------------------------------------------------------------------------ round trip


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    num_classes=st.sampled_from([5, 1000, 1 << 15]),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_added_is_what_is_read(tmp_path_factory, k, shapes, num_classes, seed):
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
    assert [p.name for p in path.parent.iterdir()] == ["labels"]  # nothing of the making is left


def test_a_store_says_how_its_images_were_turned(packed):
    path = write_store(packed.parent / "turned", LABELS, exif="apply")
    for made, other in ((path, "ignore"), (packed, "apply")):
        check_orientation(TokenLabelStore(made), TokenLabelStore(made).header.exif)
        with pytest.raises(ValueError, match=rf"{made.name}: .* data.exif is '{other}'.*--exif {other}$"):
            check_orientation(TokenLabelStore(made), other)
    edit_header(path, exif="gone")  # as before it was recorded
    assert TokenLabelStore(path).header.exif == "ignore"


def test_the_published_layout_counts_as_made_without_orientation(tmp_path):
    labels = open_labels(published(tmp_path, {"a/x": GOOD}))
    check_orientation(labels, "ignore")
    with pytest.raises(ValueError, match="--data.exif ignore.*pack_token_labels.py --exif apply"):
        check_orientation(labels, "apply")


def test_files_are_what_the_format_says(packed):
    """Read the store with nothing of the code but the description."""
    header = json.loads((packed / "header.json").read_text())
    assert {p.name for p in packed.iterdir()} == {"header.json", *header["files"]}
    for name, record in header["files"].items():
        content = (packed / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    scores, classes = np.fromfile(packed / "scores.bin", "<f2"), np.fromfile(packed / "classes.bin", "<i2")
    keys = (packed / "keys.bin").read_bytes().decode()
    rows = struct.iter_unpack("<qqii", (packed / "entries.bin").read_bytes())
    begin = 0
    for (key, label), row in zip(LABELS.items(), rows, strict=True):
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


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("a/b.c.png", "a/b.c"),
        ("a.b/c", "a.b/c"),
        ("a.b/c.jpg", "a.b/c"),
        ("x.jpg", "x"),
        ("deep/er/x.tar.gz", "deep/er/x.tar"),
    ],
)
def test_label_key_drops_the_last_suffix(path, key):
    assert label_key(path) == key


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30, unique=True),
    asked=st.lists(st.text(max_size=3), max_size=10),
    seed=st.integers(0, 1 << 30),
)
def test_find_keeps_the_order_asked_in(tmp_path_factory, keys, asked, seed):
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


def test_find_of_nothing_and_of_odd_names(tmp_path):
    odd = ["n/ü", os.fsdecode(b"n/\xff"), "n/\0", "n/a b"]
    opened = TokenLabelStore(write_store(tmp_path / "labels", dict.fromkeys(odd, drawn_map(0))))
    assert opened.find([]).tolist() == [] and opened.find([]).dtype == np.int64
    assert opened.find(odd[::-1]).tolist() == [3, 2, 1, 0]
    assert [opened.key(i) for i in range(4)] == odd


def test_keys_of_one_hash_are_told_apart(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_version(packed, version):
    edit_header(packed, version=version)
    with pytest.raises(ValueError, match=f"labels has version {version!r}.* version 1"):
        TokenLabelStore(packed)


@pytest.mark.parametrize("name", ["scores.bin", "classes.bin", "entries.bin", "keys.bin", "index.bin"])
@pytest.mark.parametrize("how", ["shorter", "longer", "empty", "missing"])
def test_incomplete(packed, name, how):
    path = packed / name
    content = path.read_bytes()
    path.write_bytes({"shorter": content[:-1], "longer": content + b"\0"}.get(how, b""))
    if how == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=f"{name} is .*(missing|bytes instead of)"):
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
    ],
)
def test_damaged_header(packed, changes):
    edit_header(packed, **changes)
    with pytest.raises(ValueError, match="header.json is damaged.*pack it again"):
        TokenLabelStore(packed)


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 1), (16, 7), (16, -1), (16, 0), (24, 9), (32, 0), (3 * 24 + 8, 3), (3 * 24 + 16, 7)]
)
def test_entries_that_point_elsewhere(packed, offset, value):
    content = bytearray((packed / "entries.bin").read_bytes())
    struct.pack_into("<i", content, offset, value)
    (packed / "entries.bin").write_bytes(content)
    with pytest.raises(ValueError, match="entries.bin is not the table.*pack it again"):
        TokenLabelStore(packed)
    edit_header(packed, top_k=3)
    with pytest.raises(ValueError, match="entries.bin is not the table"):
        TokenLabelStore(packed)


@pytest.mark.parametrize("name", ["scores.bin", "classes.bin", "keys.bin", "index.bin", "entries.bin"])
def test_checksums_find_what_sizes_cannot(packed, name):
    TokenLabelStore(packed).verify_checksums()
    content = bytearray((packed / name).read_bytes())
    if name == "entries.bin":  # a map of 1 x 5 read as one of 5 x 1
        struct.pack_into("<ii", content, 16, 5, 1)
    else:
        content[3] ^= 1
    (packed / name).write_bytes(content)
    opened = TokenLabelStore(packed)
    with pytest.raises(ValueError, match=f"labels/{name} has changed.*copy the store again, or pack it again"):
        opened.verify_checksums()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores.bin", struct.pack("<e", float("nan")), "scores that are NaN or beyond float16"),
        ("scores.bin", struct.pack("<e", -float("inf")), "scores that are NaN or beyond float16"),
        ("classes.bin", struct.pack("<h", 10), r"class index 10, allowed is 0 \.\.\. 9"),
        ("classes.bin", struct.pack("<h", -1), "class index -1"),
    ],
)
def test_values_that_changed_on_disk_are_not_read(packed, name, value, message):
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


# ------------------------------------------------------------------------------------------------ writing


GOOD = drawn_map(0)


def with_score(value: float) -> TokenLabelMap:
    scores = GOOD.scores.copy()
    scores[1, 2, 3] = value
    return GOOD._replace(scores=scores)


def with_class(value: int) -> TokenLabelMap:
    classes = GOOD.classes.copy()
    classes[1, 2, 3] = value
    return GOOD._replace(classes=classes)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (drawn_map(0, k=3), r"scores \[3, 3, 4\].*should be \[2, height, width\]"),
        (drawn_map(0, k=1), r"scores \[1, 3, 4\]"),
        (drawn_map(0, w=0), r"scores \[2, 3, 0\]"),
        (TokenLabelMap(GOOD.scores[0], GOOD.classes[0]), r"scores \[3, 4\]"),
        (TokenLabelMap(GOOD.scores, drawn_map(0, h=4).classes), r"scores \[2, 3, 4\] and classes \[2, 4, 4\]"),
        (with_class(10), r"class index 10, allowed is 0 \.\.\. 9"),
        (with_class(-1), "class index -1"),
        (with_class(-32768), "class index -32768"),
        (with_score(np.nan), "NaN or beyond float16; generate"),
        (with_score(-np.inf), "NaN or beyond float16"),
    ],
)
def test_wrong_labels_are_refused_and_nothing_is_left(tmp_path, label, message):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exif": "turn"}, "exif is 'turn', allowed is ignore or apply"),
        ({"covers": "crop"}, "covers is 'crop', allowed is whole_image or center_crop"),
        ({"top_k": 0}, r"top_k is 0, allowed is 1 \.\.\. 10"),
        ({"top_k": 11}, "top_k is 11"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 32769}, r"num_classes is 32769; .* 1 \.\.\. 32,768"),
        ({"classes": ("a", "b")}, "class list has 2 names for num_classes 10"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        StoreWriter(tmp_path / "labels", **(HEADER | changes))
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_nothing_is_refused(tmp_path):
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


def test_a_store_is_replaced_only_when_asked_and_only_by_a_whole_one(packed):
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


def test_what_is_not_a_store_is_never_replaced(tmp_path):
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


def test_a_full_disk_leaves_nothing(tmp_path):
    assert in_child(_write_with_little_room, tmp_path / "labels") == (errno.EFBIG, [])


# ------------------------------------------------------------------------------------------------ published layout


def save(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def published(root: Path, labels: dict[str, TokenLabelMap]) -> Path:
    for stem, label in labels.items():
        save(root / f"{stem}.pt", torch.stack([torch.tensor(label.scores), torch.tensor(label.classes).half()]))
    return root


def test_published_labels_are_read_as_they_are(tmp_path):
    published(tmp_path, LABELS)
    (tmp_path / "readme.txt").touch()
    (tmp_path / ".hidden.pt").touch()
    labels = open_labels(tmp_path)
    assert isinstance(labels, PublishedLabels)
    assert labels.header == StoreHeader("published", "center_crop", 2, None, None, 4)
    assert (len(labels), labels.ignored) == (4, 1)
    for opened in (labels, pickle.loads(pickle.dumps(labels))):
        found = opened.find(["cat/c3", "cat/c9", "cat/c0"])
        assert found.dtype == np.int64 and found.tolist() == [3, -1, 0]
        for key, entry in zip(LABELS, opened.find([*LABELS]), strict=True):
            assert opened.key(entry) == key
            assert_same(opened.read(int(entry)), LABELS[key])


def test_published_float32_and_odd_strides(tmp_path):
    both = torch.stack([torch.randn(5, 7, 3), torch.randint(0, 30000, (5, 7, 3)).float()])
    save(tmp_path / "a/x.pt", both.transpose(2, 3).requires_grad_())
    label = PublishedLabels(tmp_path).read(0)
    np.testing.assert_array_equal(label.scores, both[0].mT.half().numpy())
    np.testing.assert_array_equal(label.classes, both[1].mT.numpy())
    assert label.classes.dtype == np.int16


def test_published_names_with_dots(tmp_path):
    labels = published(tmp_path, {"n1/a.b": GOOD, "n1/a": GOOD, "n1/c": GOOD, "v1": GOOD})
    opened = open_labels(labels)
    entry = {opened.key(i): i for i in range(4)}
    assert opened.find(["n1/a.b"]).tolist() == [entry["n1/a.b"]]  # a file of the very name comes first
    assert opened.find(["n1/c.d.e", "n1/a"]).tolist() == [entry["n1/c"], entry["n1/a"]]
    assert opened.find(["v1.5/x", "n1/z.b"]).tolist() == [entry["v1"], -1]  # the first dot of "class/file"
    assert opened.find(["n1/c.d", "n1/c.d"]).tolist() == [entry["n1/c"]] * 2
    for two in (["n1/c.1", "n1/c.2"], ["n1/c", "n1/c.2"]):
        with pytest.raises(ValueError, match=r"n1/c.pt would be the label of 2 images \(n1/c.*first dot.*generate_to"):
            opened.find(["n1/a", *two])


def plane(value: float, dtype=torch.float16) -> torch.Tensor:
    both = torch.ones(2, 2, 3, 4, dtype=dtype)
    both[1, 1, 2, 3] = value
    return both


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scores": torch.ones(2, 5, 3, 4)}, "it holds a dict"),
        ([torch.ones(5, 3, 4)] * 2, "it holds a list"),
        (torch.ones(5, 3, 4).half(), r"its shape is \[5, 3, 4\]"),
        (torch.ones(3, 5, 3, 4).half(), r"its shape is \[3, 5, 3, 4\]"),
        (torch.ones(2, 5, 0, 4).half(), r"its shape is \[2, 5, 0, 4\]"),
        (torch.ones(2, 2, 3, 4).long(), "its values are torch.int64"),
        (torch.ones(2, 2, 3, 4).to_sparse(), "its values are torch.float32, torch.sparse_coo"),
        (plane(0.5), "does not hold class indices"),
        (plane(float("nan")), "does not hold class indices"),
        (plane(32768, torch.float32), "class index 32768 is above 32,767"),
        (plane(float("inf")), "class index inf is above"),
        (plane(2050), "2050 in float16.* 2,048"),
        (plane(-1), r"class index -1, allowed is 0 \.\.\. 999"),
        (plane(-float("inf")), "class index -1"),
        (plane(1000), r"class index 1000, allowed is 0 \.\.\. 999"),
        (plane(0).flip(0) * torch.nan, "NaN|does not hold class"),
        (torch.ones(2, 2, 3, 4) * torch.tensor([1e5, 1.0]).view(2, 1, 1, 1), "NaN or beyond float16"),
        (torch.ones(2, 3, 3, 4).half(), r"scores \[3, 3, 4\].*should be \[2, height"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_published_files_that_hold_something_else(tmp_path, content, message):
    published(tmp_path, {"a/good": GOOD})
    path = save(tmp_path / "z/bad.pt", content)
    opened = PublishedLabels(tmp_path, num_classes=1000)
    opened.read(0)
    with pytest.raises(ValueError, match=message) as caught:
        opened.read(1)
    assert str(path) in str(caught.value) and "enerate" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["empty", "text", "cut", "pickle", "dangling"])
def test_published_files_that_cannot_be_loaded(tmp_path, how):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = published(tmp_path, {"a/x": GOOD}) / "a/x.pt"
    content = path.read_bytes()
    if how == "dangling":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": content[:400], "pickle": pickle.dumps(Exploit())}[how])
    with pytest.raises(ValueError, match="a/x.pt is not a token label: (not a file of one tensor|No such file)"):
        PublishedLabels(tmp_path).read(0)
    with pytest.raises(ValueError, match="a/x.pt"):
        _ = PublishedLabels(tmp_path).header
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["a/0", "a/3", "z/9"])
def test_one_damaged_file_does_not_speak_for_the_others(tmp_path, name):
    """A file with another number of classes, or none at all, wherever it stands."""
    published(tmp_path, {f"a/{i}": GOOD for i in range(8)})
    for content in (torch.ones(2, 3, 3, 4).half(), torch.ones(7)):
        path = save(tmp_path / f"{name}.pt", content)
        opened = PublishedLabels(tmp_path)
        assert opened.header.top_k == 2
        for entry in range(len(opened)):
            if opened.key(entry) != name:
                opened.read(entry)
                continue
            with pytest.raises(ValueError, match=f"^{path}"):
                opened.read(entry)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 1281167])
def test_a_sample_is_spread_evenly(count):
    drawn = sample(count, 5)
    assert drawn[0] == 0 and drawn[-1] == count - 1
    assert len(drawn) == min(count, 5) == len(set(drawn))
    assert max(np.diff(drawn), default=1) - min(np.diff(drawn), default=1) <= 1


def test_folders_without_labels(tmp_path):
    with pytest.raises(ValueError, match="holds no token labels"):
        open_labels(tmp_path)
    with pytest.raises(ValueError, match="none is not a folder"):
        open_labels(tmp_path / "none")


def test_content_decides_what_is_opened(packed):
    assert isinstance(open_labels(str(packed)), TokenLabelStore)
    published(packed, {"a/x": GOOD})  # a stray file does not make a store a folder of labels
    assert isinstance(open_labels(packed), TokenLabelStore)
    (packed / "header.json").unlink()
    with pytest.raises(ValueError, match="is not a store.*packing was interrupted"):
        open_labels(packed)


# ------------------------------------------------------------------------------------------------ coverage

NAMES = tuple("abcdefghij")


def test_labels_cover_the_images(tmp_path):
    opened = TokenLabelStore(write_store(tmp_path / "labels", LABELS, classes=NAMES))
    keys = ["cat/c2", "cat/c0"]
    for classes in (NAMES, list(NAMES), None):
        assert match_images(opened, keys, 10, classes).tolist() == [2, 0]


def test_missing_labels_are_listed(packed):
    keys = [*LABELS, *(f"dog/d{i:02}" for i in range(1234))]
    with pytest.raises(ValueError, match="no label for 1,234 of 1,238 images: dog/d00, .*dog/d09 and 1,224 more") as e:
        match_images(TokenLabelStore(packed), keys, 10, None)
    assert "dog/d10" not in str(e.value) and "names like 'cat/c0'" in str(e.value)
    with pytest.raises(ValueError, match="no label for 1 of 1 images: x. "):
        match_images(TokenLabelStore(packed), ["x"], 10, None)


def test_other_classes_are_refused(tmp_path):
    opened = TokenLabelStore(write_store(tmp_path / "labels", LABELS, classes=NAMES))
    with pytest.raises(ValueError, match="labels: the teacher a teacher had 10 classes.* 1,000"):
        match_images(opened, [*LABELS], 1000, None)
    with pytest.raises(ValueError, match="class 8 is 'i', but 'j'"):
        match_images(opened, [*LABELS], 10, (*NAMES[:8], "j", "i"))


def test_images_of_one_name_cannot_share_a_label(packed):
    with pytest.raises(ValueError, match="1 names belong to several images.*: cat/c1. Rename"):
        match_images(TokenLabelStore(packed), ["cat/c1", "cat/c2", "cat/c1"], 10, None)


def test_published_labels_are_held_to_the_classes_of_the_data_set(tmp_path):
    opened = open_labels(published(tmp_path, {"a/x": with_class(9)}))
    opened.read(0)
    assert match_images(opened, ["a/x"], 9, None).tolist() == [0]
    assert opened.header.num_classes == 9
    for labels in (opened, pickle.loads(pickle.dumps(opened))):
        with pytest.raises(ValueError, match=r"a/x.pt: class index 9, allowed is 0 \.\.\. 8"):
            labels.read(0)
