"""Archives that change: the cached index is used only as long as it holds, and changed archives are not read."""

import os
import pickle
import re
from pathlib import Path

import formats
import numpy as np
import pytest

from volo.data.pixels.decode import UnreadableImage
from volo.data.sources import archive_index, ranges
from volo.data.sources.archives import ArchiveSplit
from volo.data.sources.listing_cache import ListingCache
from volo.data.sources.ranges import RangeReader, fingerprint
from volo.data.sources.records import ImageRecords

CLASSES = ("a", "b")
FILES = {"a/x.jpg": b"1" * 700, "a/y.JPEG": b"", "b/x.jpg": b"3" * 512}


def records(path: Path) -> ImageRecords:
    return ArchiveSplit([str(path)], "here").records(CLASSES)


def test_an_index_is_cached_until_an_archive_changes(tmp_path, monkeypatch):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    indexed = []
    plain = archive_index._index_one
    monkeypatch.setattr(archive_index, "_index_one", lambda *words: indexed.append(words) or plain(*words))

    def names() -> list[str]:
        split = ArchiveSplit([str(path)], "here", listing_cache=ListingCache(tmp_path / "cache"))
        assert set(split.found_classes()) == set(CLASSES)
        found = split.records(CLASSES)
        assert [found.read(i) for i in range(len(found))] == [files[name] for name in found.names]
        return list(found.names)

    files = FILES
    formats.settle(path)
    assert names() == names() == list(FILES) and len(indexed) == 1
    files = {**FILES, "b/z.jpg": b"new"}
    formats.write_tar(path, files)
    formats.settle(path)
    assert names() == names() == [*FILES, "b/z.jpg"] and len(indexed) == 2


def test_copies_with_other_times_are_cached_separately(tmp_path, monkeypatch):
    """Machines with copies of their own may share a cache folder without making each other index again."""
    path, count = formats.write_tar(tmp_path / "all.tar", FILES), []
    plain = archive_index._index_one
    monkeypatch.setattr(archive_index, "_index_one", lambda *words: count.append(words) or plain(*words))
    for made, hours in enumerate([1, 2, 1, 2, 1, 3], 1):
        os.utime(path, (1.7e9 + 3600 * hours,) * 2)
        ArchiveSplit([str(path)], "here", listing_cache=ListingCache(tmp_path / "cache")).records(CLASSES)
        assert len(count) == (made if made <= 2 else 2 + (hours == 3))
    for kept in (tmp_path / "cache").iterdir():
        formats.settle(kept, hours=24 * 31)  # unused for a month
    os.utime(path, (1.7e9,) * 2)
    ArchiveSplit([str(path)], "here", listing_cache=ListingCache(tmp_path / "cache")).records(CLASSES)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_time_in_the_future_is_reported(tmp_path, caplog):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    formats.settle(path, hours=-1)
    with caplog.at_level("WARNING", "volo"):
        ArchiveSplit([str(path)], "here", listing_cache=ListingCache(tmp_path / "cache")).records(CLASSES)
    assert re.search(r"36\d\d s", caplog.text) and not (tmp_path / "cache").exists()


def test_a_copy_with_another_time_is_read_on_another_machine(tmp_path):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    sent = pickle.dumps(records(path))
    formats.settle(path)  # stands for the copy on the other machine
    there = pickle.loads(sent)
    assert [there.read(i) for i in range(3)] == list(FILES.values())
    for change in (lambda: formats.settle(path), lambda: path.write_bytes(path.read_bytes() + bytes(512))):
        there = pickle.loads(sent)
        change()
        with pytest.raises(UnreadableImage, match="changed since it was indexed"):
            there.read(0)
    with pytest.raises(UnreadableImage, match="10,752 .*10,240"):
        pickle.loads(sent).read(0)


def test_an_archive_that_changes_during_a_run_is_an_error(tmp_path):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    found = records(path)
    formats.write_tar(path, dict(reversed(FILES.items())))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(UnreadableImage, match="all.tar: b/x.jpg: .*changed since it was indexed"):
            found.read(2)
    assert len(os.listdir("/proc/self/fd")) == before
    found = records(path)
    path.unlink()
    with pytest.raises(UnreadableImage, match="all.tar: a/x.jpg: No such file or directory"):
        found.read(0)


def test_the_number_of_open_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "_OPEN_FILES", 3)
    paths = [tmp_path / str(i) for i in range(10)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    reader = RangeReader([str(path) for path in paths], [fingerprint(str(path)) for path in paths])
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).integers(10, size=100).tolist():
        assert reader.read(i, 3, 4) == bytes([i]) * 4
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    with pytest.raises(OSError, match="5 of 6 bytes"):
        reader.read(0, 5, 6)


def test_a_forked_process_opens_its_own_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    reader = RangeReader([str(path)], [fingerprint(str(path))])
    reader.read(0, 0, 1)
    ours = set(reader._open.values())
    read, write = os.pipe()
    if os.fork() == 0:
        data = reader.read(0, 2, 3)
        os.write(write, data if reader._process == os.getpid() else b"the parent's")
        os._exit(0)
    os.wait()
    assert os.read(read, 100) == b"234" and set(reader._open.values()) == ours and reader.read(0, 1, 2) == b"12"
    os.close(read), os.close(write)


def test_reading_from_a_server_is_retried(monkeypatch):
    answers = [TimeoutError("slow"), RuntimeError("no\nsuch hierarchy"), b"123"]
    waits = []

    class Store:
        def cat_file(self, path, start, end):
            assert (path, start, end) == ("x", 5, 8)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(ranges, "file_system", lambda url: (Store(), "x"))
    monkeypatch.setattr(ranges.time, "sleep", waits.append)
    reader = RangeReader(["s3://x"], [""])
    assert reader.read(0, 5, 3) == b"123" and waits == [2, 4]
    answers[:] = [RuntimeError("no\nsuch hierarchy")] * 9
    with pytest.raises(OSError, match="^RuntimeError: no such hierarchy$"):
        reader.read(0, 5, 3)
    assert len(answers) == 5
    answers[:] = [b"whole file, as from a server without ranges"]
    with pytest.raises(OSError, match="43 of 3 bytes"):
        reader.read(0, 5, 3)
    answers[:] = [FileNotFoundError(2, "No such file or directory")]
    with pytest.raises(FileNotFoundError):
        reader.read(0, 5, 3)


@pytest.mark.parametrize("tag", ["ETag", "Last-Modified", "Content-MD5", "Digest", "updated", None])
def test_an_index_of_a_url_is_cached_if_changes_can_be_detected(tmp_path, monkeypatch, tag):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    info = {"size": path.stat().st_size, "type": "file", **({tag: "one"} if tag else {})}

    class Store:
        def info(self, url):
            return info

        def open(self, url, mode, **options):
            return open(path, mode)

    monkeypatch.setattr(ranges, "file_system", lambda url: (Store(), url))

    def names() -> list[str]:
        return list(
            ArchiveSplit(["s3://all.tar"], "here", listing_cache=ListingCache(tmp_path / "cache"))
            .records(CLASSES)
            .names
        )

    assert names() == list(FILES)
    assert bool(list(tmp_path.glob("cache/*"))) == (tag is not None)
    formats.write_tar(path, {"a/new.jpg": b"", **dict(list(FILES.items())[1:])})  # as many bytes
    if tag:
        assert names() == list(FILES)
        info[tag] = "two"
    assert names() == ["a/new.jpg", "a/y.JPEG", "b/x.jpg"]
