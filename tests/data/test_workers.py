"""Data workers that die, hang or get a signal to stop; files that vanish; storage that hangs."""

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import programs
import pytest
import torch

from volo.config import AugmentConfig
from volo.data import workers as data_workers
from volo.data.dataset import TrainImages
from volo.data.loader import TrainLoader, eval_loader, train_loader
from volo.data.pixels.decode import UnreadableImage
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.folders import scan_class_folders
from volo.data.workers import WorkerFailed, _death, _Pass

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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_workers_survive_the_signal_to_stop(records, sent):
    """After a signal to the whole process group the main process still needs the batches of its step."""
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=1, epochs=1)
    batches = loader.epoch(0)
    first = next(batches)
    (worker,) = worker_processes(loader)
    os.kill(worker.pid, sent)
    rest = list(batches)
    assert len(first) == 1 and len(rest) == 22 and worker.is_alive()


def test_the_handler_of_sigchld_is_restored(records):
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        next(train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=1).epoch(0))
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, handler)


# ----------------------------------------------------------------------------------------- workers that die


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_ends_training(records, workers):
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=workers)
    batches = loader.epoch(0)
    next(batches)
    worker = worker_processes(loader)[0]
    kill(worker)
    with pytest.raises(WorkerFailed, match=f"pid {worker.pid}.*SIGKILL.*dmesg.*data.workers") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert loader.lost_workers == 0


def test_a_dead_worker_ends_an_evaluation(records):
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), batch_size=1, workers=1)
    batches = iter(loader)
    next(batches)
    kill(*worker_processes(loader))
    with pytest.raises(WorkerFailed, match="SIGKILL"):
        list(batches)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at", [0, 3, 4, 10])
def test_new_workers_give_the_same_batches(records, caplog, workers, at):
    """Whether one worker or all are killed, in the middle of an epoch or at its end."""
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
    # Near the end everything may have been read already.
    assert loader.lost_workers == 1 or (at == 10 and loader.lost_workers == 0)
    assert len(caplog.records) == loader.lost_workers


def test_a_worker_that_is_killed_while_it_holds_a_lock(records, monkeypatch):
    """Before every batch workers read an event that they share with the main process."""
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
    with pytest.raises(WorkerFailed, match="SIGKILL"):
        list(loader.epoch(0))


def test_evaluation_continues_with_new_workers(records):
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
def test_a_worker_that_hangs_during_start_up_is_replaced(records, monkeypatch, caplog, workers, on_error):
    """A process that is forked while another thread holds a lock may wait for it for ever."""
    start, first = data_workers._start_worker, multiprocessing.get_context("fork").Value("b", 1)

    def hang_once(pids, worker: int) -> None:
        if worker == workers - 1 and first.value:
            first.value = 0
            signal.pause()
        start(pids, worker)

    monkeypatch.setattr(data_workers, "_start_worker", hang_once)
    monkeypatch.setattr(data_workers, "_START_SECONDS", 2)
    options = dict(batch_size=2, workers=workers, on_error=on_error)
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), **options)
    with caplog.at_level(logging.ERROR, "volo"):
        assert [i for batch in loader for i in batch.indices.tolist()] == list(range(23))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "hung during start-up" in message


def test_workers_that_keep_hanging_during_start_up_end_the_run(records, monkeypatch):
    monkeypatch.setattr(data_workers, "_start_worker", lambda pids, worker: signal.pause())
    monkeypatch.setattr(data_workers, "_START_SECONDS", 1)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=5, workers=2)
    with pytest.raises(WorkerFailed, match="hung during start-up .3 times"):
        next(loader.epoch(0))
    assert loader.lost_workers == 3


def test_workers_that_keep_dying_on_the_same_batch_end_the_run(records, monkeypatch):
    """A file that crashes the decoder is named, and workers are not restarted for ever."""
    get = TrainImages.__getitem__

    def crash(self, key):
        if key[1] == 7:
            os.kill(os.getpid(), signal.SIGSEGV)
        return get(self, key)

    monkeypatch.setattr(TrainImages, "__getitem__", crash)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=23, workers=1, on_error="skip")
    path = records.location(7)
    with pytest.raises(WorkerFailed, match=f"SIGSEGV at {path} .3 times"):
        next(loader.epoch(0))
    assert loader.lost_workers == 3


def test_of_several_busy_workers_the_one_that_crashed_is_named(records, monkeypatch):
    """It crashes while each of the others is reading another image."""
    context = multiprocessing.get_context("fork")
    for crashing in (7, 16, 21):
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
            with pytest.raises(WorkerFailed, match=f"SIGSEGV at {records.location(crashing)}$"):
                next(batches)
        finally:
            batches.abandon()


def test_the_message_about_a_dead_worker_has_the_remedy():
    assert _death(5, 3, " at x.jpg") == "data worker (pid 5) exited at x.jpg (exit code 3)"
    assert "/dev/shm" in _death(5, -signal.SIGBUS, "") and "--shm-size" in _death(5, -signal.SIGBUS, "")
    assert _death(5, -signal.SIGABRT, "").endswith("SIGABRT")


def test_a_programming_error_in_a_worker_is_raised_unchanged(records, monkeypatch):
    def broken(self, key):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TrainImages, "__getitem__", broken)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug") as caught:
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
    """Replace a file by a pipe, which blocks whoever opens it, and release them at the end."""
    Path(path).unlink()
    os.mkfifo(path)
    yield
    with contextlib.suppress(OSError):  # nobody is blocked
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_storage_that_hangs_is_named(records, on_error, monkeypatch):
    programs.wait_for_pipes(monkeypatch.setattr)
    loader = train_loader(
        records, TRANSFORM, seed=0, global_batch=23, workers=2, on_error=on_error, timeout_seconds=1, epochs=1
    )
    path = records.location(4)
    with hanging(loader, path), pytest.raises(WorkerFailed, match=f"1 s .data.timeout_seconds.*pid [0-9]+. at {path}"):
        next(loader.epoch(0))


def test_a_worker_that_freezes_while_it_hands_over_a_batch_is_named(records):
    """The batches wait in the queue; their memory is in the hands of the stopped workers."""
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=1, workers=2, epochs=1, timeout_seconds=1)
    batches = loader.epoch(0)
    next(batches)
    workers = worker_processes(loader)
    wait_until(lambda: all(read == -1 for read in loader._reader._pass._reading))
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    pids = [f"pid {worker.pid}" for worker in workers]
    with pytest.raises(WorkerFailed, match=f"no batch for 1 s .data.timeout_seconds.: .*{pids[0]}.*{pids[1]}.*frozen"):
        list(batches)
    for worker in workers:
        worker.join()


def test_shared_memory_that_fills_up_is_named_at_once(records):
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=4, workers=1, epochs=1, timeout_seconds=600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # for workers that start now, as on a full /dev/shm
    try:
        with pytest.raises(WorkerFailed, match="cannot pass a batch: .*File too large.*/dev/shm is full") as caught:
            next(loader.epoch(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_a_slow_batch_within_the_timeout_is_waited_for(records, monkeypatch):
    """It takes longer than one poll of the workers: the file is written once the second poll has begun."""
    monkeypatch.setattr("volo.data.workers._POLL_SECONDS", 0.05)
    programs.wait_for_pipes(monkeypatch.setattr)
    polls = threading.Semaphore(0)
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=23, workers=1, timeout_seconds=60, epochs=1)
    path = records.location(4)
    content = Path(path).read_bytes()
    Path(path).unlink()
    os.mkfifo(path)

    explain = _Pass._problem

    def counted(self, error, waited):
        polls.release()
        return explain(self, error, waited)

    monkeypatch.setattr(_Pass, "_problem", counted)

    def answer() -> None:
        polls.acquire()
        polls.acquire()
        with open(path, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    batch = next(loader.epoch(0))
    thread.join()
    assert len(batch) == 23 and not batch.failures
