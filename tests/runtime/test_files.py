"""Files that are whole or not there."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.runtime.files import (
    atomic_file,
    link_atomic,
    path_below,
    read_regular,
    remove_temporary_files,
    write_atomic,
)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write(b"first")
        write_atomic(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and names(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "new" / "a", "ä")
    assert (tmp_path / "new" / "a").read_text(encoding="utf-8") == "ä"
    assert (tmp_path / "new" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_second_name_is_a_link_even_if_it_already_is_one(tmp_path):
    path, name = tmp_path / "a", tmp_path / "b"
    path.write_text("1")
    name.write_text("old")
    for _ in range(2):
        link_atomic(path, name)
        assert name.samefile(path) and names(tmp_path) == ["a", "b"]


def test_a_second_name_is_a_copy_without_hard_links(tmp_path, monkeypatch):
    path, name = tmp_path / "a", tmp_path / "b"
    path.write_text("1")

    def refused(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refused)
    link_atomic(path, name)
    assert name.read_text() == "1" and not name.samefile(path) and names(tmp_path) == ["a", "b"]


def test_what_killed_writers_left_can_be_removed(tmp_path):
    for name in (".a.txt.0123456789ab.tmp", ".checkpoint.tmp", "kept.tmp", ".kept"):
        (tmp_path / name).write_text("")
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == [".kept", "kept.tmp"]


PARTS = st.sampled_from(["..", ".", "", "a", "b.jpg", "...", "a..", " ", "\\", "ü", "\udcff", "\0", "\n", "\x1b[2J"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=5))
def test_a_name_from_a_file_stays_below_its_folder_or_is_refused(parts):
    root, name = "/data/root", "/".join(parts)
    try:
        path = path_below(root, name, "x.tar")
    except ValueError as error:
        assert str(error).startswith("x.tar has the name ") and repr(name) in str(error)
        assert "\0" in name or name[:1] in ("", "/") or parts[-1] in ("", ".") or ".." in parts
    else:
        assert os.path.normpath(path).startswith(f"{root}/") and "\0" not in path
        assert ".." not in path.split("/") and not path.endswith(("/", "/."))


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "plain").write_bytes(b"content")
    (tmp_path / "link").symlink_to("plain")
    assert read_regular(tmp_path / "link") == read_regular(tmp_path / "plain") == b"content"
    before = len(os.listdir("/proc/self/fd"))
    for name in ("pipe", "device"):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
