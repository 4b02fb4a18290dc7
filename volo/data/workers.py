"""Data workers: processes that read batches ahead, watched for death and hanging.

A batch depends on its number alone. So if a worker dies, new workers can start at the next batch, and the run is the
same run.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from volo.data.dataset import Batch, EvalImages, TrainImages
from volo.runtime.errors import DataError
from volo.runtime.signals import stop_signals

PREFETCHED_BATCHES = 2  # per worker
_GRACE_SECONDS = 60
_START_SECONDS = 60  # a worker that has not started by then hangs
_POLL_SECONDS = 1  # between checks of the workers while waiting for a batch
_LOSSES = 3  # sets of workers that may die on the same batch
_IDLE = -1
_SHM = ". /dev/shm is full: run docker with --shm-size=8g or --ipc=host, or set fewer data.workers"

_logger = logging.getLogger("volo")


class WorkerFailed(DataError):
    """A data worker died or hangs; the message is one line."""


class WorkerDied(WorkerFailed):
    """A data worker died."""


class WorkerNotStarted(WorkerDied):
    """A data worker hung during start-up.

    A fork copies locks in their current state, but not the threads that hold them. A worker that was forked while, say,
    a thread of NCCL or Gloo held a lock may wait for it for ever. No batch is lost, and the next worker starts.
    """


class BatchReader:
    """Batches by number, read ahead by workers. Reading them in order is fast; any other number restarts the workers.

    It must not be part of a reference cycle: workers shut down cleanly when the last reference to it goes. If the
    garbage collector finds their queues first, ending each worker runs into a timeout.

    Args:
        dataset: Gives samples by key, which is the index of an image or ends with it, the location of an image by
            ``name(index)``, and batches, which have ``share_memory()``, by ``collate(samples)``.
        keys_from: Gives the keys of batch n, n + 1, ... to the last one.
        workers: Worker processes; 0 reads in this process.
        pin_memory: Put batches into page-locked memory (for CUDA).
        timeout_seconds: Longest wait for one batch, if there are workers; 0 for no limit.
        replace_workers: If a worker dies, start new workers at the next batch instead of raising an error. Workers that
            hang during start-up are replaced in any case.
    """

    def __init__(
        self,
        dataset: TrainImages | EvalImages,
        keys_from: Callable[[int], Iterator[list]],
        *,
        workers: int,
        pin_memory: bool,
        timeout_seconds: float,
        replace_workers: bool,
    ):
        self.lost_workers = 0
        self._open = lambda number: _Pass(dataset, keys_from(number), workers, pin_memory, timeout_seconds)
        self._replace_workers = replace_workers
        self._pass: _Pass | None = None
        self._next = -1  # the batch that the pass gives next

    def read(self, number: int) -> Batch:
        """Return batch ``number``.

        Raises:
            WorkerFailed: A worker died and may not be replaced, workers died three times in a row on this batch, or the
                batch did not arrive in time.
        """
        if self._next != number:
            self.close()
        for losses in range(1, _LOSSES + 1):
            if self._pass is None:
                self._pass = self._open(number)
            try:
                batch = next(self._pass)
                self._next = number + 1
                return batch
            except Exception as error:
                self._pass.abandon()
                self.close()
                harmless = WorkerDied if self._replace_workers else WorkerNotStarted
                if not isinstance(error, harmless):
                    raise
                self.lost_workers += 1
                if losses == _LOSSES:
                    raise WorkerDied(f"{error} ({losses} times in a row, on the same batch)") from None
                _logger.error("%s. New workers take over; no image is lost", error)
        raise AssertionError("not reached")

    def close(self) -> None:
        """End the workers; a later :meth:`read` starts new ones."""
        self._pass, self._next = None, -1


class _Pass:
    """An iterator of batches, read by one set of workers.

    DataLoader alone reports a dead worker by an exception from a signal handler, wherever the main process is at that
    moment, and waits for a hanging one for ever. Here it is polled with a short timeout (its iterator continues after
    one), so that any problem is found within seconds, and only while waiting for a batch.
    """

    def __init__(self, dataset, keys: Iterator[list], workers: int, pin_memory: bool, timeout_seconds: float):
        self._dataset, self._timeout_seconds = dataset, timeout_seconds
        # Forked workers share the list of files. They do not touch CUDA, and DataLoader gives each of them one thread.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        context: Any = type(multiprocessing.get_context(method))()  # type: ignore[call-arg]  # a copy to modify
        context.Event = lambda: _Flag(context)
        self._reading = context.RawArray("q", [_IDLE] * workers)  # index of the image that each worker is reading
        self._pids = context.RawArray("q", [0] * workers)  # set when each worker has started
        loader = DataLoader(
            _Watched(dataset, self._reading),
            batch_sampler=keys,
            collate_fn=partial(_collate, dataset),
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=_POLL_SECONDS if workers else 0,
            # Otherwise each pass would draw the workers' seed from the global generator, which belongs to the run.
            generator=torch.Generator(),
            worker_init_fn=partial(_start_worker, self._pids) if workers else None,
            multiprocessing_context=context if workers else None,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
        )
        children, threads = set(multiprocessing.active_children()), set(threading.enumerate())
        on_child = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        self._workers = [child for child in multiprocessing.active_children() if child not in children]
        self._threads = [thread for thread in threading.enumerate() if thread not in threads]
        self._watch = _HandOverWatch(self._workers, timeout_seconds)
        weakref.finalize(self, self._watch.end)

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        while True:
            try:
                with self._watch.waiting():
                    batch = next(self._batches)
                if isinstance(batch, _NotShared):
                    raise WorkerFailed(batch.reason)
                return batch
            except (RuntimeError, OSError, EOFError) as error:
                problem = self._problem(error, time.monotonic() - begin)
                if problem is error:
                    raise
            if problem is not None:  # raised here so that it does not hold the frames of the iterator
                raise problem

    def _problem(self, error: Exception, waited: float) -> Exception | None:
        """Return the meaning of an error of the DataLoader: itself if it is not about workers, None to keep waiting."""
        timed_out = str(error).startswith("DataLoader timed out")
        of_worker = timed_out or str(error).startswith("DataLoader worker (pid")
        if self._watch.fault is not None:
            return WorkerFailed(self._watch.fault)
        if not self._workers or (isinstance(error, RuntimeError) and not of_worker):
            return error
        # A worker that is killed while it passes a batch breaks the connection before its sentinel is ready.
        gone = wait([worker.sentinel for worker in self._workers], timeout=0 if timed_out else 1)
        for worker in self._workers:
            if worker.sentinel in gone:
                worker.join()
                return WorkerDied(_death(worker.pid or 0, worker.exitcode or 0, self._image_read_by(worker)))
        if not timed_out:
            return error
        if not all(thread.is_alive() for thread in self._threads):
            return RuntimeError("the thread that receives batches from the data workers failed (see above)")
        hanging = [worker.pid for worker in self._workers if worker.pid not in self._pids[:]]
        if hanging and waited >= _START_SECONDS:
            return WorkerNotStarted(f"data worker (pid {hanging[0]}) hung during start-up")
        if self._timeout_seconds and waited >= self._timeout_seconds:
            busy = [f"data worker (pid {w.pid}){image}" for w in self._workers if (image := self._image_read_by(w))]
            still = "; ".join(busy[:3]) + (f" and {len(busy) - 3} more" if len(busy) > 3 else "")
            if stopped := _stopped(self._workers):
                return WorkerFailed(_frozen(stopped, self._timeout_seconds))
            return WorkerFailed(
                f"no batch for {self._timeout_seconds:g} s (data.timeout_seconds); still reading: {still or 'none'}. "
                "Check that the storage responds; if it is only slow, raise data.timeout_seconds"
            )
        return None

    def _image_read_by(self, worker: BaseProcess) -> str:
        """Return " at " and the location of the image that a worker is reading; "" if it reads none."""
        index = dict(zip(self._pids, self._reading, strict=True)).get(worker.pid, _IDLE)
        return "" if index == _IDLE else f" at {self._dataset.name(index)}"

    def abandon(self) -> None:
        """End the workers without waiting for them.

        An orderly end takes locks and reads pipes that a dead worker may have left unusable. So the other workers are
        killed, and a daemon thread frees the rest.
        """
        for worker in self._workers:
            worker.kill()
        held = [self._batches]
        self._batches = iter(())
        threading.Thread(target=held.clear, daemon=True).start()


class _HandOverWatch:
    """Ends workers that freeze while they hand over a batch.

    A batch is announced in a queue, which is polled, but its memory is then fetched from the worker itself, without a
    limit. Only the death of the worker ends that wait. ``fault`` says why the workers were killed, None if not.

    Args:
        workers: The workers.
        timeout_seconds: Longest wait for one batch; 0 for no limit.
    """

    def __init__(self, workers: list[BaseProcess], timeout_seconds: float):
        self.fault: str | None = None
        self._workers, self._timeout_seconds = workers, timeout_seconds
        self._since: float | None = None  # when the main process last began to wait, None while it does not
        self._ended = threading.Event()
        if workers and timeout_seconds:
            threading.Thread(target=self._run, name="hand-over", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self):
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            since = self._since
            # Polling starts the wait again every second: one that lasts is not in the queue.
            if since is not None and time.monotonic() - since > self._timeout_seconds + _POLL_SECONDS:
                self.fault = _frozen(_stopped(self._workers) or self._workers, self._timeout_seconds)
                for worker in self._workers:
                    worker.kill()
                return


def _stopped(workers: list[BaseProcess]) -> list[BaseProcess]:
    """Return the workers that are stopped (SIGSTOP, a debugger), where the system tells."""

    def is_stopped(worker: BaseProcess) -> bool:
        try:
            stat = Path(f"/proc/{worker.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "Tt"

    return list(filter(is_stopped, workers))


def _frozen(workers: list[BaseProcess], seconds: float) -> str:
    pids = ", ".join(f"data worker (pid {worker.pid})" for worker in workers[:3])
    more = f" and {len(workers) - 3} more" if len(workers) > 3 else ""
    return (
        f"no batch for {seconds:g} s (data.timeout_seconds): {pids}{more} on {socket.gethostname()} is frozen or hands "
        "nothing over. Start again with the same command"
    )


@dataclass(frozen=True)
class _NotShared:
    """In place of a batch that a worker cannot pass."""

    reason: str


def _collate(dataset, samples: list) -> Any:
    """Collate, in a worker in shared memory: the queue's own thread would lose a batch for which there is no room."""
    batch = dataset.collate(samples)
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return _NotShared(
            f"data worker (pid {os.getpid()}) on {socket.gethostname()} cannot pass a batch: {reason}{_SHM}"
        )


class _Flag:
    """The part of multiprocessing.Event that DataLoader uses, without a lock.

    Reading an Event takes a lock, and workers read it before every batch. If one is killed while it holds the lock, all
    other processes wait for ever.
    """

    def __init__(self, context: BaseContext):
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


class _Watched(Dataset):
    """A data set that notes the image that each worker is reading, for messages about dead and hanging workers."""

    def __init__(self, dataset, reading):
        self.dataset, self.reading = dataset, reading

    def __getitem__(self, key):
        info = get_worker_info()
        if info is None:
            return self.dataset[key]
        self.reading[info.id] = key[1] if isinstance(key, tuple) else key
        sample = self.dataset[key]
        self.reading[info.id] = _IDLE
        return sample


def _death(pid: int, exit_code: int, image: str) -> str:
    """Return in one line how a worker ended."""
    if exit_code >= 0:
        return f"data worker (pid {pid}) exited{image} (exit code {exit_code})"
    name = signal.Signals(-exit_code).name
    remedy = {
        "SIGKILL": ". The system does this if memory runs out (see dmesg): set fewer data.workers",
        "SIGBUS": _SHM,
    }.get(name, "")
    return f"data worker (pid {pid}) was killed by {name}{image}{remedy}"


def _start_worker(pids, worker: int) -> None:
    """Note that a worker has started, and let it survive the signals that ask the run to stop.

    Ctrl-C and many schedulers signal every process of a run at once. The main process then needs a few more batches to
    finish its step and save.
    """
    pids[worker] = os.getpid()
    for signum in stop_signals():
        signal.signal(signum, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
