"""Workers that die, hang or are told to stop; files that are not there when their turn comes."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from volo.config import AugmentConfig
from volo.data import workers as reading
from volo.data.dataset import TrainImages
from volo.data.loader import TrainLoader, eval_loader, train_loader
from volo.data.pixels.decode import UnreadableImage
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.folders import scan_class_folders
from volo.data.workers import WorkerFailed, _obituary, _Pass

TRANSFORM = TrainTransform(AugmentConfig(), (16, 24))


@pytest.fixture
def records(make_folder):
    folder = make_folder({"a": 9, "b": 8, "c": 6})
    return scan_class_folders(folder, ("a", "b", "c"))


def worker_processes(loader) -> list:
    return loader._reader._pass._workers


def kill(*workers) -> None:
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()


# --------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_the_signal_to_stop(records, sent):
    """A signal to the whole process group must not take the batches of the step under way."""
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=1, epochs=1)
    batches = loader.epoch(0)
    first = next(batches)
    (worker,) = worker_processes(loader)
    os.kill(worker.pid, sent)
    rest = list(batches)
    assert len(first) == 1 and len(rest) == 22 and worker.is_alive()


def test_what_handled_dead_children_still_does(records):
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        next(train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=1).epoch(0))
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, handler)


# ----------------------------------------------------------------------------------------- workers that die


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_ends_training_with_what_it_was(records, workers):
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=workers)
    batches = loader.epoch(0)
    next(batches)
    worker = worker_processes(loader)[0]
    kill(worker)
    told = f"^process {worker.pid}, which reads images, was ended by SIGKILL.* runs out .dmesg tells., and fewer data.w"
    with pytest.raises(WorkerFailed, match=told) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert loader.lost_workers == 0


def test_a_worker_that_dies_ends_an_evaluation(records):
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), batch_size=1, workers=1)
    batches = iter(loader)
    next(batches)
    kill(*worker_processes(loader))
    with pytest.raises(WorkerFailed, match="was ended by SIGKILL"):
        list(batches)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at", [0, 3, 4, 10])
def test_others_take_over_and_the_run_is_the_same(records, caplog, workers, at):
    """Killed in the middle of an epoch and at its end, with one worker or all: every batch comes, once, in order."""
    options = dict(seed=3, global_batch=5, epochs=3)
    expected = [batch for epoch in range(3) for batch in train_loader(records, TRANSFORM, **options).epoch(epoch)]
    loader = train_loader(records, TRANSFORM, workers=workers, on_error="skip", **options)
    found = []
    with caplog.at_level(logging.ERROR, "volo"):
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                found.append(batch)
                if len(found) == at + 1:
                    kill(*worker_processes(loader)[: max(1, workers - 1)])
    assert [b.indices.tolist() for b in found] == [b.indices.tolist() for b in expected]
    assert all(torch.equal(one.images, other.images) for one, other in zip(expected, found, strict=True))
    # Near the end everything may have been read already, and then nobody is missed.
    assert loader.lost_workers == 1 or (at == 10 and loader.lost_workers == 0)
    assert len(caplog.records) == loader.lost_workers
    assert all("others take over, and nothing is lost" in record.getMessage() for record in caplog.records)


def test_a_worker_that_is_killed_with_a_lock_in_hand(records, monkeypatch):
    """Workers look before every batch at an event that they share with the main process."""
    get = TrainImages.__getitem__

    def die(self, key):
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            frame = frame.f_back
        if hasattr(frame.f_locals["done_event"], "_cond"):
            frame.f_locals["done_event"]._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TrainImages, "__getitem__", lambda self, key: (die if key[1] == 7 else get)(self, key))
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=2)
    with pytest.raises(WorkerFailed, match="was ended by SIGKILL"):
        list(loader.epoch(0))


def test_evaluation_goes_on_with_others(records):
    options = dict(batch_size=1, on_error="skip")
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), workers=2, **options)
    seen = []
    for batch in loader:
        seen += batch.indices.tolist()
        if len(seen) == 4:
            kill(worker_processes(loader)[1])
    assert seen == list(range(23))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_never_comes_up_is_replaced(records, monkeypatch, caplog, workers, on_error):
    """Forked while another thread holds a lock, a process may wait for it for ever: it has read nothing yet."""
    start, first = reading._start_worker, multiprocessing.get_context("fork").Value("b", 1)

    def hang_once(pids, worker: int) -> None:
        if worker == workers - 1 and first.value:
            first.value = 0
            signal.pause()
        start(pids, worker)

    monkeypatch.setattr(reading, "_start_worker", hang_once)
    monkeypatch.setattr(reading, "_START_SECONDS", 2)
    options = dict(batch_size=2, workers=workers, on_error=on_error)
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), **options)
    with caplog.at_level(logging.ERROR, "volo"):
        assert [i for batch in loader for i in batch.indices.tolist()] == list(range(23))
    (told,) = caplog.records
    assert "hangs since it was started; others take over, and nothing is lost" in told.getMessage()


def test_workers_that_never_come_up_end_the_run(records, monkeypatch):
    monkeypatch.setattr(reading, "_start_worker", lambda pids, worker: signal.pause())
    monkeypatch.setattr(reading, "_START_SECONDS", 1)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=5, workers=2)
    with pytest.raises(WorkerFailed, match="hangs since it was started .3 times in a row"):
        next(loader.epoch(0))
    assert loader.lost_workers == 3


def test_workers_that_die_over_the_same_batch_again_and_again(records, monkeypatch):
    """Such as a file that crashes the decoder: it is named, and no process is started for ever."""
    get = TrainImages.__getitem__

    def crash(self, key):
        if key[1] == 7:
            os.kill(os.getpid(), signal.SIGSEGV)
        return get(self, key)

    monkeypatch.setattr(TrainImages, "__getitem__", crash)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=23, workers=1, on_error="skip")
    path = records.location(7)
    with pytest.raises(WorkerFailed, match=f"ended by SIGSEGV at {path} .3 times in a row, over the same batch.$"):
        next(loader.epoch(0))
    assert loader.lost_workers == 3


def test_of_several_busy_workers_the_one_that_crashed_is_told(records, monkeypatch):
    """It crashes when the others are at images of their own, at which they stay."""
    context = multiprocessing.get_context("fork")
    for crashing in (2, 7, 11, 16, 21):
        others = context.Semaphore(0)

        def get(self, key, crashing=crashing, others=others):
            if key[1] == crashing:
                for _ in range(3):
                    others.acquire()
                os.kill(os.getpid(), signal.SIGSEGV)
            others.release()
            threading.Event().wait()

        monkeypatch.setattr(TrainImages, "__getitem__", get)
        indices = [0, 5, 14]
        indices.insert(crashing % 4, crashing)
        keys = [[(0, index)] for index in indices]
        batches = _Pass(TrainImages(records, TRANSFORM, 0, "fail", "ignore"), iter(keys), 4, False, 0)
        try:
            with pytest.raises(WorkerFailed, match=f"ended by SIGSEGV at {records.location(crashing)}$"):
                next(batches)
        finally:
            batches.abandon()


def test_how_a_worker_ended_is_told_with_the_remedy():
    assert _obituary(5, 3, " at x.jpg") == "process 5, which reads images, ended at x.jpg (exit code 3)"
    assert "/dev/shm is full. docker run takes --shm-size" in _obituary(5, -signal.SIGBUS, "")
    assert _obituary(5, -signal.SIGABRT, "").endswith("was ended by SIGABRT")


def test_an_error_of_our_own_in_a_worker_stays_what_it_is(records, monkeypatch):
    def broken(self, key):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(TrainImages, "__getitem__", broken)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake of ours") as caught:
            next(train_loader(records, TRANSFORM, seed=0, global_batch=2, workers=workers).epoch(0))
        assert not isinstance(caught.value, WorkerFailed)


# ---------------------------------------------------------------------- files that vanish, storage that hangs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_after_it_was_listed(records, workers):
    path = records.location(4)
    Path(path).unlink()
    options = dict(seed=0, global_batch=23, workers=workers)
    with pytest.raises(UnreadableImage, match=f"^cannot read {path}: .*data.on_error"):
        next(train_loader(records, TRANSFORM, **options).epoch(0))
    batch = next(train_loader(records, TRANSFORM, on_error="skip", **options).epoch(0))
    assert len(batch) == 23 and 4 not in batch.indices
    assert [path in failure for failure in batch.failures] == [True]


@contextlib.contextmanager
def hanging(loader: TrainLoader, path: str):
    """Put in the place of a file one that nobody ever answers for; let go, at the end, whoever waits for it."""
    Path(path).unlink()
    os.mkfifo(path)
    yield
    with contextlib.suppress(OSError):  # nobody is waiting
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_storage_that_hangs_is_named(records, on_error):
    loader = train_loader(
        records, TRANSFORM, seed=0, global_batch=23, workers=2, on_error=on_error, timeout_seconds=1, epochs=1
    )
    path = records.location(4)
    told = f"^no batch of images came for 1 s .data.timeout_seconds.: process [0-9]+ at {path} is still reading"
    with hanging(loader, path), pytest.raises(WorkerFailed, match=told):
        next(loader.epoch(0))


def test_a_slow_batch_within_the_time_is_waited_for(records, monkeypatch):
    """Longer than one look at the workers takes; the first file answers when the second look has begun."""
    monkeypatch.setattr("volo.data.workers._POLL_SECONDS", 0.05)
    looks = threading.Semaphore(0)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=23, workers=1, timeout_seconds=60, epochs=1)
    path = records.location(4)
    content = Path(path).read_bytes()
    Path(path).unlink()
    os.mkfifo(path)

    explain = _Pass._problem

    def counted(self, error, waited):
        looks.release()
        return explain(self, error, waited)

    monkeypatch.setattr(_Pass, "_problem", counted)

    def answer() -> None:
        looks.acquire()
        looks.acquire()
        with open(path, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    batch = next(loader.epoch(0))
    thread.join()
    assert len(batch) == 23 and not batch.failures
