"""Saves that are killed at any call to the file system, or meet a full disk: a whole checkpoint is always there."""

import builtins
import errno
import os
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from volo.engine.checkpoint import CheckpointFolder, SaveError, TrainState, read_own_checkpoint
from volo.runtime.files import remove_temporary_files

CALLS = ("link", "replace", "fsync", "unlink", "open", "close")
KILLED, DONE = 9, 0


def state(step: int) -> dict:
    """What a run has after ``step`` steps: a function of the step, as in a run that resumes bit for bit."""
    return {
        "state_dict": {"weight": torch.full((3000,), float(step))},
        "optimizer": {},
        "progress": TrainState(global_step=step, best_epoch=best_at(step)).state_dict(),
        "config": {},
    }


def best_at(step: int) -> int:
    return step - step % 2  # every other step is the best so far


class WatchedFile:
    """A file that is open for writing, whose writes count as calls; at the fatal one a half is written."""

    def __init__(self, file, call: Callable):
        self._file, self._call = file, call

    def write(self, data) -> int:
        def half() -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()

        self._call(half)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def watch_calls(call: Callable) -> None:
    """Let ``call`` run before every call to the file system, for the rest of this process."""

    def watched(function: Callable) -> Callable:
        def watching(*arguments, **options):
            call(lambda: None)
            return function(*arguments, **options)

        return watching

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    plain = builtins.open

    def opened(path, mode="r", *arguments, **options):
        if "x" not in mode and "w" not in mode:
            return plain(path, mode, *arguments, **options)
        call(lambda: None)
        return WatchedFile(plain(path, mode, *arguments, **options), call)

    builtins.open = opened


def save_and_die(folder: Path, keep: int, step: int, fatal: int) -> int:
    """Start as a run does and save ``step``, in a process that is killed at call ``fatal``; return how it ended."""
    pid = os.fork()
    if pid == 0:
        calls = count()

        def call(half: Callable) -> None:
            if next(calls) == fatal:
                half()
                os._exit(KILLED)

        try:
            watch_calls(call)
            start(folder, keep)
            CheckpointFolder(folder, keep).save(state(step), best_at(step) == step)
            os._exit(DONE)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(folder: Path, keep: int) -> int:
    """Do what a run does when it starts; return the step that it resumes from."""
    checkpoints = CheckpointFolder(folder, keep)
    remove_temporary_files(folder)
    found = checkpoints.newest_valid()
    assert found is not None
    checkpoints.complete_save(*found)
    return found[1]["progress"]["global_step"]


def check(folder: Path, keep: int, at_least: int, at_most: int) -> int:
    """Start, and check that everything is as a run that was never killed would have it; return the step."""
    step = start(folder, keep)
    assert at_least <= step <= at_most
    checkpoints = CheckpointFolder(folder, keep)
    for path, expected in ((checkpoints.last, step), (checkpoints.best, best_at(step))):
        read = read_own_checkpoint(path)
        assert read["progress"] == state(expected)["progress"], path.name
        assert torch.equal(read["state_dict"]["weight"], state(expected)["state_dict"]["weight"])
    assert not list(folder.glob(".*"))
    return step


def new_folder(path: Path, keep: int) -> Path:
    path.mkdir()
    for step in (1, 2, 3):
        CheckpointFolder(path, keep).save(state(step), best_at(step) == step)
    return path


def calls_of_a_save(tmp_path: Path, keep: int) -> int:
    """Return how many calls there are to die at, and see that one more means not to die."""
    for fatal in count():
        if save_and_die(new_folder(tmp_path / f"counting-{fatal}", keep), keep, 4, fatal) == DONE:
            return fatal
    raise AssertionError("not reached")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_killed_at_any_call_twice_in_a_row_and_then_a_full_disk(tmp_path, monkeypatch, keep):
    calls = calls_of_a_save(tmp_path, keep)
    assert calls > 15, "every call is seen"
    rng = random.Random(keep)
    for first, second in [(first, rng.randrange(calls + 8)) for first in range(calls)]:
        folder = new_folder(tmp_path / f"{first}-{second}", keep)
        assert save_and_die(folder, keep, 4, first) == KILLED
        step = check(folder, keep, 3, 4) if second % 2 else 3  # the next process may die before anything is repaired
        save_and_die(folder, keep, 4, second)
        step = check(folder, keep, step, 4)

        following = step + 1, best_at(step + 1) == step + 1
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", no_room)
            with pytest.raises(SaveError, match=f"step-0000000{step + 1}.pt could not be written: .*No space left"):
                CheckpointFolder(folder, keep).save(state(following[0]), following[1])
        assert check(folder, keep, step, step) == step

        CheckpointFolder(folder, keep).save(state(following[0]), following[1])
        assert check(folder, keep, step + 1, step + 1)


def no_room(_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
