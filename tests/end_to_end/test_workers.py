"""Runs whose data workers die or hang, or whose files vanish: the cause is named or replaced; never a hang."""

import os
import signal
import sys
from pathlib import Path

import programs
import pytest
import torch
from programs import FAILED, LAUNCHER, TRAIN

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]

MANY_EPOCHS = ("--schedule.epochs", 1000, "--eval.every_epochs", 1000, "--train.checkpoint_every_epochs", 1000)


@pytest.fixture
def images(tmp_path) -> Path:
    return programs.make_images(tmp_path / "images", train=6, val=1)


@pytest.fixture
def recipe(images, tmp_path) -> Path:
    """Three steps of six images per epoch."""
    return programs.write_recipe(
        tmp_path / "recipe.yaml", images, data={"workers": 2}, train={"batch_size": 6, "output": "runs"}
    )


def children(pid: int) -> list[int]:
    """Child processes of ``pid``, oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(folder.name))
    return sorted(found)


def test_a_killed_worker_ends_the_run_with_the_reason(recipe, tmp_path):
    run = programs.start(TRAIN, "--config", recipe, *MANY_EPOCHS, cwd=tmp_path)
    run.follow("  step 2/3  ")
    worker = children(run.pids[0])[0]
    os.kill(worker, signal.SIGKILL)
    (ended,) = run.finish()
    ended.assert_failed(FAILED, f"(pid {worker}) was killed by SIGKILL", "fewer data.workers")
    assert ended.last_line.removeprefix("error: ") in (tmp_path / "runs/run/log.txt").read_text()


def test_under_torchrun_the_other_process_does_not_hang(recipe, tmp_path):
    words = (LAUNCHER, 2, "--config", recipe, *MANY_EPOCHS)
    launcher = programs.launch(*words, cwd=tmp_path, PYTHON=sys.executable)
    seen = ""
    while "  step 2/3  " not in seen:
        line = launcher.stdout.readline()
        assert line, f"the launcher ended:\n{programs.finish(launcher, seen)}"
        seen += line
    (torchrun,) = (pid for pid in children(launcher.pid) if "torch.distributed.run" in words_of(pid))
    ranks = [pid for pid in children(torchrun) if "train.py" in words_of(pid)]
    assert len(ranks) == 2
    worker = children(ranks[1])[0]
    os.kill(worker, signal.SIGKILL)
    ended = programs.finish(launcher, seen)
    assert ended.code == FAILED, f"{ended.out}\n{ended.err}"
    assert f"(pid {worker}) was killed by SIGKILL" in ended.last_line
    assert ended.last_line.startswith("distributed_train.sh: error: ")


def words_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_replaced_workers_do_not_change_the_run(recipe, tmp_path):
    words = ("--config", recipe, "--data.on_error", "skip", "--schedule.epochs", 4)
    programs.run(TRAIN, *words, cwd=tmp_path / "straight").assert_done()
    run = programs.start(TRAIN, *words, cwd=tmp_path / "killed")
    run.follow("epoch 1/4  step 2/3  ")
    for worker in children(run.pids[0]):
        os.kill(worker, signal.SIGKILL)
    (ended,) = run.finish()
    ended.assert_done()
    assert ended.out.count("was killed by SIGKILL") == 1
    assert "replaced dead data workers 1 times" in ended.out and "unreadable" not in ended.out
    one, other = (
        torch.load(tmp_path / name / "runs/run/last.pt", weights_only=True)["state_dict"]
        for name in ("straight", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_vanishes_in_the_middle_of_a_run(recipe, images, tmp_path, on_error):
    epochs = ("--schedule.epochs", 6, "--data.on_error", on_error)
    run = programs.start(TRAIN, "--config", recipe, *epochs, cwd=tmp_path)
    run.follow("epoch 1/6  step 1/3  ")
    gone = images / "train/disc/disc_03.jpg"
    gone.unlink()
    (ended,) = run.finish()
    if on_error == "fail":
        ended.assert_failed(FAILED, f"cannot read {gone}", "data.on_error to skip")
    else:
        ended.assert_done()
        times = ended.out.count(f"replaced unreadable training image: cannot read {gone}")
        # Two workers are up to four batches ahead, at most two epochs.
        assert 4 <= times <= 6
        assert f"replaced unreadable training images {times} times" in ended.out and "dead" not in ended.out


def test_storage_that_hangs_ends_the_run_with_the_file(recipe, images, tmp_path):
    stuck = images / "train/disc/disc_03.jpg"
    stuck.unlink()
    os.mkfifo(stuck)  # opening it blocks for ever
    words = ("--config", recipe, "--data.timeout_seconds", 1)
    ended = programs.run(TRAIN, *words, cwd=tmp_path, waits_for_pipes=True)
    ended.assert_failed(FAILED, "no batch for 1 s (data.timeout_seconds)", f" at {stuck}")
