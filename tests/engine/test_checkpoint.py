"""Checkpoints: complete or absent, the newest readable one is found, and their names."""

import errno
import logging
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from volo.engine.checkpoint import CheckpointFolder, SaveError, TrainState, read_own_checkpoint, save_atomically


def state(step: int, size: int = 10) -> dict:
    """A checkpoint in volo's format that holds its step."""
    progress = TrainState(epoch=step, global_step=step, best_top1=1.5)
    return {
        "state_dict": {"weight": torch.full((size,), float(step))},
        "optimizer": {"state": {}, "param_groups": []},
        "progress": progress.state_dict(),
        "config": {"optim": {"lr": 0.1}},
    }


def step_of(path: Path) -> int:
    return read_own_checkpoint(path)["progress"]["global_step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path, keep=3)


@pytest.fixture
def limit_files():
    """Return a function that limits file sizes to a number of bytes, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_hard_links(monkeypatch):
    """The system call fails as on a file system without hard links (exFAT, some network mounts)."""

    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


# ----------------------------------------------------------------------------------------------------- writing


def test_what_is_saved_is_what_is_read(tmp_path):
    save_atomically(state(7), tmp_path / "last.pt")
    read = read_own_checkpoint(tmp_path / "last.pt")
    assert torch.equal(read["state_dict"]["weight"], torch.full((10,), 7.0))
    progress = TrainState()
    progress.load_state_dict(read["progress"])
    assert progress == TrainState(epoch=7, global_step=7, best_top1=1.5)
    assert names(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("size", [1_000_000, 50_100, 49_950], ids=["in the middle", "near the end", "at the very end"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, limit_files, size):
    path = tmp_path / "last.pt"
    save_atomically(state(1), path)
    before = path.read_bytes()
    limit_files(200_000)
    with pytest.raises(SaveError, match=r"last.pt could not be written: .*File too large \([\d,]+ MB free.*intact"):
        save_atomically(state(2, size), path)
    assert path.read_bytes() == before and names(tmp_path) == ["last.pt"]


def test_missing_folder(tmp_path):
    with pytest.raises((SaveError, FileNotFoundError)):
        save_atomically(state(1), tmp_path / "gone" / "last.pt")


def test_a_leftover_link_to_a_checkpoint_is_never_written_to(folder, tmp_path):
    """A kill between creating a hard link and renaming it leaves a link to the checkpoint itself."""
    folder.save(state(1), is_best=True)
    os.link(tmp_path / "step-00000001.pt", tmp_path / ".checkpoint.tmp")
    os.link(tmp_path / "step-00000001.pt", tmp_path / ".last.pt.0123456789ab.tmp")
    before = (tmp_path / "step-00000001.pt").read_bytes()
    folder.save(state(2), is_best=False)
    assert (tmp_path / "step-00000001.pt").read_bytes() == folder.best.read_bytes() == before
    assert step_of(folder.last) == 2


# ------------------------------------------------------------------------------------------------------- names


def check_names(folder: CheckpointFolder, path: Path) -> None:
    for step, is_best in ((10, True), (20, False), (30, True), (40, False), (50, False)):
        folder.save(state(step), is_best)
    kept = ["step-00000030.pt", "step-00000040.pt", "step-00000050.pt"]
    assert names(path) == ["best.pt", "last.pt", *kept]
    assert (step_of(folder.last), step_of(folder.best)) == (50, 30)
    for step in (60, 70, 80):
        folder.save(state(step), is_best=False)
    assert step_of(folder.best) == 30, "the best stays when its number is forgotten"
    assert names(path) == ["best.pt", "last.pt", "step-00000060.pt", "step-00000070.pt", "step-00000080.pt"]
    folder.save(state(80) | {"again": True}, is_best=True)
    assert read_own_checkpoint(folder.last)["again"] and read_own_checkpoint(folder.best)["again"]


def test_last_best_and_the_newest(folder, tmp_path):
    check_names(folder, tmp_path)
    same = [path.samefile(folder.last) for path in (folder.best, tmp_path / "step-00000080.pt")]
    assert same == [True, True], "several names, one file on the disk"


def test_last_best_and_the_newest_without_hard_links(folder, tmp_path, no_hard_links):
    check_names(folder, tmp_path)
    assert not folder.best.samefile(folder.last)


def test_full_disk_when_a_copy_replaces_a_link(folder, tmp_path, no_hard_links, limit_files, monkeypatch):
    folder.save(state(1), is_best=True)
    saved = save_atomically

    def fill_the_disk_after(new_state, path):
        saved(new_state, path)
        limit_files(1000)

    monkeypatch.setattr("volo.engine.checkpoint.save_atomically", fill_the_disk_after)
    with pytest.raises(SaveError, match="last.pt could not be written.*step-00000002.pt holds the same state"):
        folder.save(state(2), is_best=False)
    assert names(tmp_path) == ["best.pt", "last.pt", "step-00000001.pt", "step-00000002.pt"]
    assert step_of(folder.last) == 1
    os.utime(folder.last, ns=(0, 0))  # two files of one test may be of the same tick of the clock
    assert folder.newest_valid()[0].name == "step-00000002.pt"


def test_keeping_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 2, 3):
        folder.save(state(step), is_best=step == 1)
    assert names(tmp_path) == ["best.pt", "last.pt", "step-00000003.pt"] and step_of(folder.best) == 1


# ---------------------------------------------------------------------------------------------------- resuming

THREE = b"\x00\x00\x40\x40"  # 3.0, the weights at step 3
DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit of a weight wrong": lambda data: data.replace(3 * THREE, 2 * THREE + b"\x01\x00\x40\x40", 1),
    "overwritten": lambda data: b"no checkpoint" * 100,
    "a pickle that would run code": lambda data: pickle.dumps(os.getcwd, protocol=2),
}


def damage(path: Path, how: str) -> None:
    before = path.read_bytes()
    after = DAMAGES[how](before)
    assert after != before
    path.write_bytes(after)  # in place, so that every name of the file has it


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_and_named(folder, caplog, how):
    for step in (1, 2, 3):
        folder.save(state(step, size=1000), is_best=False)
    assert folder.newest_valid()[0] == folder.last and not caplog.records
    damage(folder.last, how)
    with caplog.at_level(logging.WARNING, "volo"):
        path, found = folder.newest_valid()
    assert path.name == "step-00000002.pt" and found["progress"]["global_step"] == 2
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["skipping last.pt"], "one file, said once"


def test_a_run_killed_before_the_newest_got_its_name(folder, tmp_path):
    folder.save(state(1), is_best=False)
    save_atomically(state(2), tmp_path / "step-00000002.pt")
    assert folder.newest_valid()[1]["progress"]["global_step"] == 2
    (tmp_path / "step-00000001.pt").unlink()
    (tmp_path / "step-00000002.pt").unlink()
    assert folder.newest_valid()[1]["progress"]["global_step"] == 1 and folder.exists()


def test_last_pt_counts_if_its_numbered_file_was_deleted(folder, tmp_path):
    for step in (1, 2):
        folder.save(state(step), is_best=False)
    os.utime(tmp_path / "step-00000001.pt", ns=(0, 0))
    (tmp_path / "step-00000002.pt").unlink()
    assert folder.newest_valid()[1]["progress"]["global_step"] == 2


def test_resuming_from_an_earlier_checkpoint_discards_later_ones(folder, tmp_path):
    for step in (10, 20, 30):
        folder.save(state(step), is_best=step == 30)
    folder.save(state(15), is_best=False)  # what a run does that was started with train.resume step-00000010.pt
    assert names(tmp_path) == ["best.pt", "last.pt", "step-00000010.pt", "step-00000015.pt"]
    assert folder.newest_valid()[1]["progress"]["global_step"] == 15 and step_of(folder.best) == 30


def test_no_checkpoint_and_no_readable_checkpoint(folder, tmp_path):
    assert folder.newest_valid() is None and not folder.exists()
    for step in (1, 2):
        folder.save(state(step), is_best=True)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read \(2 tried.*another train.name"):
        folder.newest_valid()


def test_files_that_are_not_volo_checkpoints(tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="lacks config, optimizer, progress. To start from its weights, use model"):
        read_own_checkpoint(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not exist"):
        read_own_checkpoint(tmp_path / "nothing.pt")
