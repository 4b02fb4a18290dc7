"""scripts/generate_token_labels.py when a data worker dies or hangs: named within seconds, replaced, resumed."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
import timm
import torch
from programs import FAILED, ROOT

from volo.token_labels.store import TokenLabelStore


class StuckRun:
    """A run of three blocks with one data worker, which waits in the last: one image there is a pipe."""

    def __init__(self, images: Path, folder: Path, *words):
        weights = folder / "weights.pth"
        torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
        self.folder = folder
        self.pipe = images / "b" / "7.png"  # the 38th of 40
        self._image = self.pipe.read_bytes()
        self.pipe.unlink()
        os.mkfifo(self.pipe)
        self._words = (
            *("--images", images, "--output", folder / "labels", "--teacher", "timm:test_resnet"),
            *("--teacher_checkpoint", weights, "--top_k", 2, "--block_size", 16),
            *("--workers", 1, "--device", "cpu", "--cache", "none"),
        )
        self.program = self._start(*words)

    def _start(self, *words) -> programs.Started:
        return programs.start(
            ROOT / "scripts/generate_token_labels.py", *self._words, *words, cwd=self.folder, waits_for_pipes=True
        )

    @contextlib.contextmanager
    def waiting_worker(self) -> Iterator[int]:
        """Wait until the worker reads the pipe and a block is saved; yield the worker's process id."""
        with open(self.pipe, "wb"):  # returns once the worker opens it, too
            while not (self.folder / "labels.parts" / "block-000000.npz").exists():
                os.sched_yield()
            (pid,) = self.program.pids
            yield int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def restore_image(self) -> None:
        self.pipe.unlink()
        self.pipe.write_bytes(self._image)

    def assert_failed(self, *words: str) -> None:
        (ended,) = self.program.finish()
        ended.assert_failed(FAILED, str(self.pipe), *words)
        assert "data." not in ended.last_line  # options of another program
        assert not (self.folder / "labels").exists()

    def assert_resumes(self) -> None:
        (ended,) = self._start().finish()
        assert " of 3 blocks are done" in ended.assert_done().out
        assert TokenLabelStore(self.folder / "labels").header.entries == 40


@pytest.fixture
def images(make_image_folder) -> Path:
    return Path(make_image_folder({"a": 20, "b": 20}))


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_run_can_be_resumed(images, tmp_path):
    run = StuckRun(images, tmp_path)
    with run.waiting_worker() as worker:
        os.kill(worker, signal.SIGKILL)
        run.assert_failed(str(worker), "SIGKILL", "--workers")
    run.restore_image()
    run.assert_resumes()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_under_skip(images, tmp_path):
    run = StuckRun(images, tmp_path, "--on_error", "skip")
    with run.waiting_worker() as worker:
        run.restore_image()
        os.kill(worker, signal.SIGKILL)
        (ended,) = run.program.finish()
    assert str(worker) in ended.assert_done().out
    assert TokenLabelStore(tmp_path / "labels").header.entries == 40


@pytest.mark.slow
def test_a_hanging_worker_is_named_and_the_run_can_be_resumed(images, tmp_path):
    run = StuckRun(images, tmp_path, "--timeout_seconds", 1)
    with run.waiting_worker() as worker:
        run.assert_failed(str(worker), "1 s", "--timeout_seconds")
    run.restore_image()
    run.assert_resumes()
