"""The listing cache: a listing is used as long as it holds, and no longer."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from volo.data.sources import folders
from volo.data.sources.base import PackedNames
from volo.data.sources.folders import FolderSplit, scan_class_folders
from volo.data.sources.label_files import LabelsOption
from volo.data.sources.listing_cache import ListingCache
from volo.runtime import native

CLASSES = ("a", "a-b", "b", "c")


def settle(root: Path) -> None:
    """Make all folders an hour older."""
    for folder, _, _ in os.walk(root):
        then = os.stat(folder).st_mtime - 3600
        os.utime(folder, (then, then))


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "train"
    for name in ("a/x.png", "a/y.txt", "a/deep/er/z.jpg", "a-b/x.png", "b/2.png", "b/10.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


class Listings:
    """Lists ``root``, and counts the folders that it scans."""

    def __init__(self, root: Path, cache: Path | None, monkeypatch):
        self.root, self.cache, self.scanned = root, cache, 0
        plain = folders._list_one

        def counted(*words):
            self.scanned += 1
            return plain(*words)

        monkeypatch.setattr(folders, "_list_one", counted)

    def names(self) -> tuple[list[str], int]:
        """Check that the names are those on disk; return them and the number of folders that were scanned."""
        self.scanned = 0
        records = scan_class_folders(str(self.root), CLASSES, listing_cache=ListingCache(self.cache))
        scanned, fresh = self.scanned, scan_class_folders(str(self.root), CLASSES)
        assert records.names == fresh.names and records.labels.tolist() == fresh.labels.tolist()
        assert records.ignored == fresh.ignored and records.labels.dtype == np.int64
        there = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*.*g"))
        assert list(records.names) == sorted(there)
        assert [CLASSES[i] for i in records.labels] == [name.split("/")[0] for name in records.names]
        return list(records.names), scanned


@pytest.fixture
def listings(root, tmp_path, monkeypatch) -> Listings:
    return Listings(root, tmp_path / "cache", monkeypatch)


def test_a_listing_is_made_once(listings):
    assert listings.names() == (["a-b/x.png", "a/deep/er/z.jpg", "a/x.png", "b/10.png", "b/2.png"], 3)
    assert listings.names()[1] == 0
    assert listings.names()[1] == 0
    listings.cache = None
    assert listings.names()[1] == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b/3.png").touch(),
        lambda root: (root / "b/2.png").unlink(),
        lambda root: (root / "b/2.png").rename(root / "b/4.png"),
        lambda root: (root / "a/deep/er/new.jpg").touch(),
        lambda root: (root / "c").mkdir(),
        lambda root: shutil.rmtree(root / "a-b"),
        lambda root: (root / "b").rename(root / "c"),
        lambda root: shutil.rmtree(root / "a/deep"),
    ],
)
def test_a_change_is_detected(listings, change):
    listings.names()
    change(listings.root)
    names, scanned = listings.names()
    assert scanned == len(os.listdir(listings.root))
    settle(listings.root)
    listings.names()  # the times have changed
    assert listings.names() == (names, 0)


def test_a_folder_that_changed_a_moment_ago_is_not_cached(listings):
    """Another file may be added within the same tick of the clock, without changing the time."""
    os.utime(listings.root / "b", (time.time(), time.time()))
    assert [listings.names()[1], listings.names()[1]] == [3, 3]


def spoil(kept: Path, how: str) -> None:
    content = kept.read_bytes()
    if how == "cut":
        kept.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        at = content.index(b"a-b/x.pnga/deep")
        kept.write_bytes(content[:at] + b"b" + content[at + 1 :])
    elif how == "pickle":
        np.save(open(kept, "wb"), np.array([{}], dtype=object), allow_pickle=True)  # noqa: SIM115
    else:
        kept.write_bytes({"empty": b"", "text": b"hello"}[how])


@pytest.mark.parametrize("how", ["cut", "bit", "pickle", "empty", "text"])
def test_a_damaged_listing_is_replaced(listings, how, caplog):
    expected = listings.names()[0]
    (kept,) = listings.cache.iterdir()
    spoil(kept, how)
    assert listings.names() == (expected, 3)
    assert f"{kept} cannot be read" in caplog.text
    assert listings.names() == (expected, 0)


def test_a_listing_of_another_folder_is_replaced(listings, root, tmp_path, caplog):
    expected = listings.names()[0]
    (kept,) = listings.cache.iterdir()
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other/b/99.png").touch()
    settle(tmp_path / "other")
    scan_class_folders(str(tmp_path / "other"), CLASSES, listing_cache=ListingCache(listings.cache))
    (foreign,) = set(listings.cache.iterdir()) - {kept}
    shutil.copy(foreign, kept)
    assert listings.names() == (expected, 3) and "lists something else" in caplog.text


def test_a_cache_that_cannot_be_written_is_reported(listings, caplog):
    listings.cache.write_text("a file")
    assert [listings.names()[1], listings.names()[1]] == [3, 3]
    assert f"cannot be written to {listings.cache.parent}" in caplog.text and "data.cache" in caplog.text


def test_a_flat_folder_has_its_own_listing(root, tmp_path, listings):
    (tmp_path / "labels.txt").write_text("x.png a\ny.png b\ndeep/er/z.jpg a\n")
    for name in ("x.png", "y.png"):
        (root / "a" / name).touch()
    settle(root)
    listing_cache = ListingCache(listings.cache)
    for _ in range(2):
        split = FolderSplit(str(root / "a"), LabelsOption(file=str(tmp_path / "labels.txt")), listing_cache)
        assert sorted(split.found_classes()) == ["a", "b"]
        records = split.records(CLASSES)
        assert list(records.names) == ["deep/er/z.jpg", "x.png", "y.png"] and records.labels.tolist() == [0, 0, 2]
    assert listings.scanned == 1


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ListingCache.of("auto").folder == tmp_path / "volo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ListingCache.of("auto").folder == Path.home() / ".cache/volo"
    assert ListingCache.of("none").folder is None
    assert ListingCache.of("~/x").folder == Path.home() / "x"


def test_a_user_without_a_home_has_no_cache_folder(monkeypatch, caplog):
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that the system does not know
    assert ListingCache.of("auto").folder is None
    assert "listings are not cached: this user has no home" in caplog.text
    with pytest.raises(RuntimeError, match="no home to keep a compiled library in; set TORCH_EXTENSIONS_DIR"):
        native._cache_folder()


def test_a_compiled_library_that_does_not_load_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    built = native._build(source, native._FLAGS, "answer")
    content = built.read_bytes()
    built.write_bytes(b"of another machine")
    assert native.library(source, [], "answer").answer() == 42
    assert len(built.read_bytes()) > len(content) // 3


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    plain = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(folders.os, "scandir", forbidden)
    with pytest.raises(ValueError, match="a/deep cannot be listed: Permission denied"):
        scan_class_folders(str(root), CLASSES)


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../x.png", "a/x\0.png"])
def test_a_listing_with_names_that_no_listing_has_is_replaced(listings, root, name):
    """The cache folder may be shared with others."""
    names, _ = listings.names()
    (file,) = listings.cache.iterdir()
    with np.load(file) as kept:
        arrays = dict(kept)
    forged = PackedNames.of([name, *names[1:]])
    np.savez(file, **arrays | {"names": forged.text, "name_ends": forged.ends})
    assert listings.names()[0] == names
