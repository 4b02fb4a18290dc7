"""A run stopped at any step, in any way, and resumed equals the uninterrupted run, bit for bit.

All randomness is on: MixToken, drop path, RandAugment, random erasing; with one data worker and a learning rate
that changes with every step. Each run is stopped by a signal sent when a line of its log appears.
"""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from programs import FAILED, LAUNCHER, ROOT, STOPPED, TRAIN, USAGE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

STEPS, EPOCHS = 4, 2
_TIMING = ("train/images_per_s", "train/data_wait")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return programs.make_images(tmp_path_factory.mktemp("images"), train=16)


@pytest.fixture(scope="module")
def recipe(images, tmp_path_factory) -> Path:
    return programs.write_recipe(
        tmp_path_factory.mktemp("recipe") / "recipe.yaml",
        images,
        model={"drop_path_rate": 0.3, "layers": [1, 1, 2, 1], "drop_rate": 0.1},
        data={"workers": 1},
        augment={"erase_prob": 0.6},
        optim={"clip_grad": 1.0},
        ema={"enabled": True, "decay": 0.9, "warmup": True},
        schedule={"epochs": EPOCHS, "warmup_epochs": 1, "per_step": True},
        eval={"batch_size": 1},
        train={"device_batch_size": 6, "output": "runs", "keep_checkpoints": 2},
    )


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> Path:
    """The uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("straight")
    programs.run(TRAIN, "--config", recipe, cwd=folder).assert_done()
    return folder / "runs/run"


@pytest.fixture(scope="module")
def straight_on_three(recipe, tmp_path_factory) -> Path:
    """The uninterrupted run on three processes."""
    folder = tmp_path_factory.mktemp("straight_on_three")
    for ended in programs.start(TRAIN, "--config", recipe, cwd=folder, ranks=3).finish():
        ended.assert_done()
    return folder / "runs/run"


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory) -> Path:
    """The folder of a run stopped in its second epoch; for tests to copy."""
    folder = tmp_path_factory.mktemp("stopped")
    stop(folder, recipe, line(2, 1))
    return folder


def line(epoch: int, step: int) -> str:
    """The log's words for a step; both numbers count from 1."""
    return f"epoch {epoch}/{EPOCHS}  step {step}/{STEPS}  "


def stop(folder: Path, recipe: Path, at: str, signum: int = signal.SIGTERM) -> dict:
    """Run train.py in ``folder``, send the signal at the line that contains ``at``, return the saved progress."""
    run = programs.start(TRAIN, "--config", recipe, cwd=folder)
    run.follow(at)
    os.kill(run.pids[0], signum)
    (ended,) = run.finish()
    return saved_progress(folder, ended)


def saved_progress(folder: Path, ended: programs.Finished) -> dict:
    assert (ended.code, ended.err) == (STOPPED, ""), f"{ended.out}\n{ended.err}"
    progress = load(folder / "runs/run")["progress"]
    message = f"stopped by a signal at epoch {progress['epoch']}, step {progress['step']}; saved"
    assert ended.out.strip().splitlines()[-1] == message
    assert message in (folder / "runs/run/log.txt").read_text()
    return progress


def resume(folder: Path, recipe: Path, **options) -> list[programs.Finished]:
    ranks = programs.start(TRAIN, "--config", recipe, cwd=folder, **options).finish()
    for ended in ranks:
        ended.assert_done()
    return ranks


def load(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, average, optimizer, progress and best result; and every number of every step."""
    states = load(one), load(other)
    assert_identical(*states, "last.pt")
    assert_identical(*(torch.load(run / "best.pt", weights_only=True) for run in (one, other)), "best.pt")
    tables = []
    for run in (one, other):
        with open(run / "metrics.csv", newline="") as file:
            tables.append([{**row, **dict.fromkeys(_TIMING)} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


def assert_identical(one, other, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


# --------------------------------------------------------------------------------------------- one process


def test_a_repeated_run_is_the_same(recipe, straight, tmp_path):
    """Otherwise the comparisons below would prove nothing."""
    resume(tmp_path, recipe, OMP_NUM_THREADS="1")
    assert_same_run(tmp_path / "runs/run", straight)
    state = load(straight)
    assert {"state_dict", "state_dict_ema", "optimizer"} < state.keys()
    assert state["progress"]["global_step"] == STEPS * EPOCHS
    changed = [not torch.equal(state["state_dict"][name], t) for name, t in state["state_dict_ema"].items()]
    assert np.mean(changed) > 0.9


# A random step of each epoch, not its last.
_DRAWN = [int(epoch * STEPS + np.random.default_rng(epoch).integers(1, STEPS - 1)) for epoch in range(EPOCHS)]


@pytest.mark.parametrize(("step", "signum"), list(zip(_DRAWN, (signal.SIGINT, signal.SIGTERM), strict=True)))
def test_stop_at_a_step_and_resume(recipe, straight, tmp_path, step, signum):
    epoch, step_of_epoch = divmod(step - 1, STEPS)
    progress = stop(tmp_path, recipe, line(epoch + 1, step_of_epoch + 1), signum)
    assert step <= progress["global_step"] < STEPS * EPOCHS
    (ended,) = resume(tmp_path, recipe)
    assert f"resuming from runs/run/last.pt: epoch {progress['epoch']}, step {progress['step']}\n" in ended.out
    assert ended.out.count("  step ") == STEPS * EPOCHS - progress["global_step"], "no step is done twice"
    assert_same_run(tmp_path / "runs/run", straight)


def test_stop_in_an_evaluation_and_again_right_after(recipe, straight, tmp_path):
    # One image per batch, raw and EMA weights: the evaluation takes far longer than the signal.
    progress = stop(tmp_path, recipe, line(1, STEPS))
    assert (progress["epoch"], progress["step"], progress["closed_epochs"]) == (1, 0, 0), "not in the evaluation"
    # The resumed run evaluates first, and is stopped there again.
    assert stop(tmp_path, recipe, "resuming from") == progress
    resume(tmp_path, recipe)
    assert_same_run(tmp_path / "runs/run", straight)


def test_stop_in_the_evaluation_before_training(recipe, straight, tmp_path):
    words = ("--config", recipe, "--model.checkpoint", straight / "best.pt", "--schedule.epochs", "1")
    words += ("--eval.before_training", "true")
    run = programs.start(TRAIN, *words, cwd=tmp_path / "stopped")
    run.follow("folder ")
    os.kill(run.pids[0], signal.SIGTERM)
    progress = saved_progress(tmp_path / "stopped", run.finish()[0])
    assert (progress["global_step"], progress["best_epoch"]) == (0, -1)
    programs.run(TRAIN, *words, cwd=tmp_path / "stopped").assert_done()
    programs.run(TRAIN, *words, cwd=tmp_path / "straight").assert_done()
    assert_same_run(tmp_path / "stopped/runs/run", tmp_path / "straight/runs/run")


# ----------------------------------------------------------------------------------------- three processes


def test_signal_to_one_of_three_processes_stops_all(recipe, straight_on_three, tmp_path):
    """With three, the order in which gradients are summed matters, too."""
    run = programs.start(TRAIN, "--config", recipe, cwd=tmp_path, ranks=3)
    run.follow(line(1, 1))
    os.kill(run.pids[1], signal.SIGTERM)
    first, *others = run.finish()
    progress = saved_progress(tmp_path, first)
    assert [(other.code, other.out, other.err) for other in others] == [(STOPPED, "", "")] * 2
    assert 1 <= progress["global_step"] <= STEPS
    resume(tmp_path, recipe, ranks=3)
    assert_same_run(tmp_path / "runs/run", straight_on_three)


def test_a_run_stops_after_the_minutes_it_was_given(recipe, straight, tmp_path):
    ended = programs.run(TRAIN, "--config", recipe, "--train.stop_after_minutes", 1e-6, cwd=tmp_path)
    assert (
        ended.code == STOPPED and ended.out.splitlines()[-1] == "stopped after 1e-06 minutes at epoch 0, step 1; saved"
    )
    resume(tmp_path, recipe)
    assert_same_run(tmp_path / "runs/run", straight)


def freeze_one(recipe, folder, *words) -> programs.Started:
    """Start two processes and freeze the second in the first epoch, as a dead GPU or machine would."""
    run = programs.start(TRAIN, "--config", recipe, *words, cwd=folder, ranks=2)
    run.follow(line(1, 1))
    os.kill(run.pids[1], signal.SIGSTOP)
    return run


def end_frozen(run: programs.Started) -> programs.Finished:
    """Wait for the first process, then end the frozen one; return what became of the first."""
    run.follow_to_the_end()
    os.kill(run.pids[1], signal.SIGKILL)
    return run.finish()[0]


def test_a_step_that_waits_for_a_frozen_process_is_ended_after_a_signal(recipe, tmp_path):
    run = freeze_one(recipe, tmp_path, "--train.stop_timeout_seconds", 0.5)
    os.kill(run.pids[0], signal.SIGTERM)
    end_frozen(run).assert_failed(FAILED, "did not end within 0.5 s of the signal to stop")


def test_a_frozen_process_is_waited_for_as_long_as_stated(recipe, tmp_path):
    run = freeze_one(recipe, tmp_path, "--train.collective_timeout_minutes", 0.1)
    frozen = f"no sign of life from rank 1 (pid {run.pids[1]} on {socket.gethostname()}, last seen at: "
    end_frozen(run).assert_failed(FAILED, "another process of the run is gone or silent", frozen)


def test_machines_that_do_not_share_the_run_folder(recipe, stopped, tmp_path):
    """Rank 0 has the checkpoint; the other machine has nothing."""
    folders = [tmp_path / name for name in ("one machine", "first", "second")]
    for folder in folders[:2]:
        shutil.copytree(stopped, folder)
    folders[2].mkdir()
    resume(folders[0], recipe, ranks=2)
    rendezvous = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(programs.free_port())}
    options = {"PYTHON": sys.executable} | rendezvous
    nodes = [
        programs.launch(LAUNCHER, 1, "--config", recipe, cwd=folder, NODE_RANK=str(rank), **options)
        for rank, folder in enumerate(folders[1:])
    ]
    for node in nodes:
        programs.finish(node).assert_done()
    assert_same_run(folders[0] / "runs/run", folders[1] / "runs/run")
    assert not list(folders[2].iterdir())


_ALIVE = """
import gc, sys, weakref
from volo.cli import build_parser, parse
from volo.engine.trainer import Trainer
from volo.runtime import distributed
from volo.training import run_training

tensors = {}

def watched(state, send=distributed.broadcast_state):
    for part in ("state_dict", "state_dict_ema"):
        tensors.update({(part, name): weakref.ref(tensor) for name, tensor in state[part].items()})
    return send(state)

def fit(self):
    gc.collect()
    print(len(tensors), "read,", sum(tensor() is not None for tensor in tensors.values()), "kept")
    return False

distributed.broadcast_state, Trainer.fit = watched, fit
run_training(parse(build_parser("train.py", ""), sys.argv[1:])[0])
"""


def test_what_was_read_to_resume_is_not_kept_in_memory(recipe, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    ended = programs.finish(
        programs.launch(sys.executable, "-c", _ALIVE, "--config", recipe, cwd=tmp_path / "run", PYTHONPATH=str(ROOT))
    )
    ended.assert_done()
    words = ended.out.splitlines()[-1].split()
    assert int(words[0]) > 100 and words[1:] == ["read,", "0", "kept"]


def test_stop_through_the_launcher(recipe, straight_on_three, tmp_path):
    process = programs.launch(LAUNCHER, 3, "--config", recipe, cwd=tmp_path, PYTHON=sys.executable)
    seen = ""
    for printed in process.stdout:
        seen += printed
        if line(1, 2) in printed:
            process.terminate()
            break
    ended = programs.finish(process, seen)
    assert ended.code == STOPPED, f"{ended.out}\n{ended.err}"
    assert ended.out.count("stopped by a signal at epoch") == 1
    assert 2 <= load(tmp_path / "runs/run")["progress"]["global_step"] <= STEPS + 1
    resume(tmp_path, recipe, ranks=3)
    assert_same_run(tmp_path / "runs/run", straight_on_three)


_PATCHED = """
import sys
from volo.cli import build_parser, parse
from volo.engine import checkpoint
from volo.runtime import distributed
from volo.training import run_training

{patch}
sys.exit(run_training(parse(build_parser("train.py", ""), sys.argv[1:])[0]))
"""


def run_patched(patch: str, recipe: Path, folder: Path, *words) -> programs.Finished:
    """Run train.py with some of its code replaced."""
    program = _PATCHED.format(patch=patch)
    folder.mkdir(exist_ok=True)
    options = {"cwd": folder, "PYTHONPATH": str(ROOT)}
    return programs.finish(programs.launch(sys.executable, "-c", program, "--config", recipe, *words, **options))


_NO_PICTURES = """
import volo.engine.trainer, volo.training

def broken(*arguments, **options):
    raise RuntimeError("Failed to load font")

volo.engine.trainer.batch_picture = volo.training.plot_curves = broken
"""


def test_no_picture_ends_a_run(recipe, straight, tmp_path):
    ended = run_patched(_NO_PICTURES, recipe, tmp_path).assert_done()
    assert "first batch could not be drawn: RuntimeError: Failed to load font" in ended.out
    assert "curves.png could not be drawn" in ended.out
    assert_same_run(tmp_path / "runs/run", straight)


_STOP_AFTER_THREE = """
votes = iter([False, False, True])
distributed.StopVote.__call__ = lambda self, wish: next(votes)
distributed.StopVote.finish = lambda self, wish: wish
"""


def test_a_row_of_metrics_is_that_of_its_whole_window(recipe, tmp_path):
    """Rows are of steps 2 and 4; the stop is between them."""
    words = ("--train.log_every_steps", 2, "--schedule.epochs", 1, "--schedule.warmup_epochs", 0)
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    programs.run(TRAIN, "--config", recipe, *words, cwd=whole).assert_done()
    ended = run_patched(_STOP_AFTER_THREE, recipe, divided, *words)
    assert ended.code == STOPPED and load(divided / "runs/run")["progress"]["step"] == 3, ended.err
    programs.run(TRAIN, "--config", recipe, *words, cwd=divided).assert_done()
    assert_same_run(whole / "runs/run", divided / "runs/run")


# --------------------------------------------------------------------------------- the end, and other runs


def test_a_run_killed_in_its_last_save_is_finished_by_the_same_command(recipe, straight, tmp_path):
    run = copy_of(straight.parents[1], tmp_path)
    (run / "curves.png").unlink()
    for name in ("last.pt", "best.pt"):
        (run / name).unlink()
        os.link(run / f"step-{STEPS:08d}.pt", run / name)
    state = torch.load(run / f"step-{2 * STEPS:08d}.pt", weights_only=True)
    torch.save(state | {"is_best": True}, run / f"step-{2 * STEPS:08d}.pt")
    (ended,) = resume(tmp_path, recipe)
    assert f"finished: {EPOCHS} epochs" in ended.out and (run / "curves.png").exists()
    assert load(run)["progress"] == state["progress"]
    assert (run / "best.pt").samefile(run / "last.pt")
    again = programs.run(TRAIN, "--config", recipe, cwd=tmp_path)
    again.assert_failed(USAGE, "already holds a finished run")


def test_a_second_run_in_the_folder_is_told_who_uses_it(recipe, straight, tmp_path):
    first = programs.start(TRAIN, "--config", recipe, cwd=tmp_path)
    first.follow(line(1, 1))
    os.kill(first.pids[0], signal.SIGSTOP)
    before = contents(tmp_path / "runs/run")
    second = programs.finish(programs.launch(sys.executable, TRAIN, "--config", recipe, cwd=tmp_path))
    second.assert_failed(USAGE, f"in use by process {first.pids[0]} on {socket.gethostname()}", "train.name")
    assert contents(tmp_path / "runs/run") == before
    os.kill(first.pids[0], signal.SIGKILL)
    first.finish()
    resume(tmp_path, recipe)
    assert_same_run(tmp_path / "runs/run", straight)


def test_a_run_survives_that_its_folder_is_deleted(recipe, straight, tmp_path):
    run = programs.start(TRAIN, "--config", recipe, cwd=tmp_path)
    run.follow(line(1, 2))
    os.kill(run.pids[0], signal.SIGSTOP)
    shutil.rmtree(tmp_path / "runs")
    os.kill(run.pids[0], signal.SIGCONT)
    run.finish()[0].assert_done()
    states = load(tmp_path / "runs/run"), load(straight)
    assert_identical(*({n: s[n] for n in ("state_dict", "state_dict_ema", "optimizer")} for s in states), "last.pt")


def rank_0_of(launcher: subprocess.Popen) -> int:
    """Return the process id of rank 0 under the launcher."""

    def children(pid: int) -> list[int]:
        return [int(word) for word in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]

    ranks = [rank for torchrun in children(launcher.pid) for rank in children(torchrun)]
    return next(pid for pid in ranks if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes())


@pytest.mark.skipif(sys.platform != "linux", reason="finds rank 0 in /proc")
def test_a_killed_process_is_replaced_by_the_launcher(recipe, straight_on_three, tmp_path):
    """Also where the second attempt finds the checkpoints of the first, and must not start in such a folder."""
    words = ("--config", recipe, "--train.resume", "never")
    process = programs.launch(LAUNCHER, 3, *words, cwd=tmp_path, PYTHON=sys.executable)
    seen = ""
    for printed in process.stdout:
        seen += printed
        if line(2, 2) in printed:
            os.kill(rank_0_of(process), signal.SIGKILL)
            break
    ended = programs.finish(process, seen).assert_done()
    assert ended.out.count("resuming from runs/run/last.pt: epoch 1, step 0\n") == 1, "the first restart succeeds"
    for part in ("state_dict", "state_dict_ema", "optimizer", "progress"):
        assert_identical(load(tmp_path / "runs/run")[part], load(straight_on_three)[part], part)


# -------------------------------------------------------------------------------------- damaged checkpoints


def copy_of(folder: Path, to: Path) -> Path:
    """Copy the run in ``folder``; last.pt stays a hard link to the newest numbered file."""
    shutil.copytree(folder / "runs", to / "runs")
    run = to / "runs/run"
    for name in ("last.pt", "best.pt"):
        for numbered in run.glob("step-*.pt"):
            if numbered.samefile(run / name) or (folder / "runs/run" / numbered.name).samefile(
                folder / "runs/run" / name
            ):
                (run / name).unlink()
                os.link(numbered, run / name)
    return run


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def contents(run: Path) -> dict[str, bytes]:
    """Return the files of a run, less the note of who used it last."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}


def test_truncated_last_checkpoint_is_reported_and_the_previous_one_used(recipe, stopped, straight, tmp_path):
    run = copy_of(stopped, tmp_path)
    newest, before = sorted(run.glob("step-*.pt"), reverse=True)
    assert newest.samefile(run / "last.pt") and before.name == f"step-{STEPS:08d}.pt"
    truncate(run / "last.pt")
    (ended,) = resume(tmp_path, recipe)
    assert "skipping last.pt: checkpoint runs/run/last.pt cannot be read: it is truncated" in ended.out
    assert "skipping last.pt" in (run / "log.txt").read_text()
    assert f"resuming from runs/run/{before.name}: epoch 1, step 0\n" in ended.out
    assert_same_run(run, straight)


def test_damage_to_last_pt_alone_costs_nothing(recipe, stopped, straight, tmp_path):
    run = copy_of(stopped, tmp_path)
    newest = max(run.glob("step-*.pt"))
    (run / "last.pt").unlink()
    (run / "last.pt").write_bytes(b"")
    (ended,) = resume(tmp_path, recipe)
    assert "skipping last.pt: checkpoint runs/run/last.pt is empty (0 bytes)" in ended.out
    assert f"resuming from runs/run/{newest.name}" in ended.out
    assert_same_run(run, straight)


def test_no_run_starts_over_if_every_checkpoint_is_damaged(recipe, stopped, tmp_path):
    run = copy_of(stopped, tmp_path)
    for path in run.glob("step-*.pt"):
        truncate(path)
    before = contents(run)
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(FAILED, "none of the checkpoints in runs/run can be read (2 tried", "train.name")
    after = contents(run)
    assert after.pop("log.txt").startswith(before.pop("log.txt"))
    assert after == before


# ----------------------------------------------------------------------------------------------- full disk


def test_full_disk_in_a_save_leaves_the_old_checkpoints(recipe, straight, tmp_path):
    # Stopped between an epoch and its evaluation, the resumed run saves under a name that already exists.
    progress = stop(tmp_path, recipe, line(1, STEPS))
    assert (progress["global_step"], progress["closed_epochs"]) == (STEPS, 0)
    run = tmp_path / "runs/run"
    before = contents(run)
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path, largest_file=len(before["last.pt"]) // 2)
    name = f"step-{STEPS:08d}.pt"
    assert f"checkpoint runs/run/{name} could not be written" in ended.out, "and the run went on"
    ended.assert_failed(FAILED, f"step-{2 * STEPS:08d}.pt could not be written", "MB free", "intact", "same command")
    after = contents(run)
    saved = {name for name in before if name.endswith(".pt")}
    assert saved == {"last.pt", name}
    assert {name: after[name] for name in saved} == {name: before[name] for name in saved}
    assert {name for name in after if name.endswith((".pt", ".tmp"))} == saved
    assert ended.last_line.removeprefix("error: ") in (run / "log.txt").read_text()
    # With space again, the same command resumes.
    resume(tmp_path, recipe)
    assert_same_run(run, straight)


def test_a_disk_that_is_full_to_the_end_fails_every_process(recipe, stopped, tmp_path):
    run = copy_of(stopped, tmp_path)
    before = contents(run)
    started = programs.start(TRAIN, "--config", recipe, cwd=tmp_path, ranks=2, largest_file=len(before["last.pt"]) // 2)
    first, second = started.finish()
    first.assert_failed(FAILED, "could not be written", "the same command")
    assert (second.code, second.out, second.err) == (FAILED, "", "")
    assert contents(run)["last.pt"] == before["last.pt"]


_FULL_FOR_A_SAVE = """
import errno, os
saves = iter([True])
fsync = os.fsync

def full_now_and_then(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if "/.step-" in name and next(saves, False):
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(descriptor)

os.fsync = full_now_and_then
"""


def test_training_survives_a_disk_that_is_full_for_a_while(recipe, straight, tmp_path):
    ended = run_patched(_FULL_FOR_A_SAVE, recipe, tmp_path).assert_done()
    assert ended.out.count("No space left on device") == STEPS, "said at every line"
    assert "Training goes on, and the next save tries again" in ended.out
    run = tmp_path / "runs/run"
    for part in ("state_dict", "state_dict_ema", "optimizer"):
        assert_identical(load(run)[part], load(straight)[part], part)
    assert load(run)["progress"]["best_epoch"] == EPOCHS, "the best that was never on the disk is forgotten"
    assert (run / "best.pt").samefile(run / "last.pt")


def test_full_disk_at_the_start(recipe, stopped, tmp_path):
    run = copy_of(stopped, tmp_path)
    before = contents(run)
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path, largest_file=len(before["metrics.csv"]) + 20)
    ended.assert_failed(FAILED, "File too large", "disk is full")
    after = contents(run)
    assert {n: after[n] for n in before if n.endswith(".pt")} == {n: before[n] for n in before if n.endswith(".pt")}


# ------------------------------------------------------------------------------------------ non-finite loss


def test_non_finite_loss_stops_the_run_and_keeps_the_good_checkpoint(recipe, straight, tmp_path):
    """The learning rate explodes in the second epoch; warmup_lr is that of the first."""
    words = ("--schedule.per_step", "false", "--schedule.warmup_lr", "1e-3", "--optim.lr", "1e30")
    ended = programs.run(TRAIN, "--config", recipe, *words, "--optim.clip_grad", "0", cwd=tmp_path)
    run = tmp_path / "runs/run"
    ended.assert_failed(
        FAILED,
        "loss and loss_cls and loss_dense not finite at step 6 (epoch 2)",
        "learning rate 5e+29",
        "last good checkpoint is runs/run/last.pt",
        "optim.clip_grad",
    )
    state = load(run)
    assert state["progress"]["global_step"] == STEPS
    assert all(t.isfinite().all() for t in state["state_dict"].values())


def test_broken_weights_never_replace_a_good_checkpoint(images, tmp_path):
    """One step per epoch: every loss up to the save is finite, but the weights to be saved are not usable."""
    recipe = programs.write_recipe(
        tmp_path / "recipe.yaml",
        images,
        optim={"lr": 1e30},
        schedule={"epochs": 3, "warmup_epochs": 1, "warmup_lr": 1e-3},
        data={"val_split": "none"},
        train={"batch_size": 48},
    )
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(FAILED, "norm of the weights not finite at step 2 (epoch 2)", "learning rate")
    state = load(tmp_path / "runs/run")
    assert state["progress"]["global_step"] == 1
    assert max(float(t.abs().max()) for t in state["state_dict"].values()) < 100
