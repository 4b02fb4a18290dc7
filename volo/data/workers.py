"""Worker processes that read batches ahead, and what is said and done where one of them dies or hangs.

A batch is known by its number and depends on that alone, so a process that died can be replaced: others begin again
at the batch that is due, and the run is the same run.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from volo.data.dataset import Batch, EvalImages, TrainImages
from volo.data.pixels.decode import UnreadableImage

PREFETCHED_BATCHES = 2  # a worker
_GRACE_SECONDS = 60
_START_SECONDS = 60  # a process that has not come up by then never will
_POLL_SECONDS = 1  # between two looks at the workers while a batch is waited for
_LOSSES = 3  # how many sets of workers may die over one batch
_IDLE = -1

_logger = logging.getLogger("volo")


class WorkerFailed(UnreadableImage):
    """Images cannot be had because the process that reads them died or hangs; the message is one line."""


class WorkerDied(WorkerFailed):
    """A process that reads images is gone."""


class WorkerNotStarted(WorkerDied):
    """A process that was to read images hangs before its first one.

    A fork copies locks as they are, and not the threads that hold them: a process that was forked in a bad moment (of
    a thread of NCCL or Gloo, say) may wait for such a lock for ever. Nothing was lost, and the next one comes up.
    """


class BatchReader:
    """Batches by number. Those that follow are read ahead, so they are best asked for one after the other.

    It must be no part of a reference cycle: workers end in order when the last reference to it goes. Where the
    garbage collector finds their queues first, each of them is waited for in vain.

    Args:
        dataset: Gives samples by key, which is the index of an image or ends with it; names images by ``name(index)``
            and makes batches of samples by ``collate``.
        keys_from: Gives the keys of batch n, n + 1, ... to the last one.
        workers: Processes that read; 0 reads in this one.
        pin_memory: Put batches into page-locked memory (for CUDA).
        timeout_seconds: Longest wait for one batch, where there are workers; 0 for no limit.
        replace_workers: Where a worker dies, start others at the batch that is due; else that is an error. Those that
            never came up are replaced in any case.
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
            WorkerFailed: A worker died and is not to be replaced, or three times in a row did over this batch; or
                nothing came in time.
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
                    raise WorkerDied(f"{error} ({losses} times in a row, over the same batch)") from None
                _logger.error("%s; others take over, and nothing is lost", error)
        raise AssertionError("either returned or raised")

    def close(self) -> None:
        """End the workers; a later :meth:`read` starts others."""
        self._pass, self._next = None, -1


class _Pass:
    """An iterator of batches, read by one set of workers.

    DataLoader by itself tells of a dead worker by an exception from a signal handler, wherever the main process is
    at that moment, and waits for a hanging one for ever. Here it is asked again and again with a short timeout (its
    iterator goes on after one), so that whatever is wrong is found within seconds, and only where a batch is due.
    """

    def __init__(self, dataset, keys: Iterator[list], workers: int, pin_memory: bool, timeout_seconds: float):
        self._dataset, self._timeout_seconds = dataset, timeout_seconds
        # Where processes can fork they do: the workers then share the list of files. They stay clear of CUDA, and
        # DataLoader gives each of them one thread.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        context = type(multiprocessing.get_context(method))()  # one of our own
        context.Event = lambda: _Flag(context)
        self._at = context.RawArray("q", [_IDLE] * workers)  # the image that each worker is reading
        self._pids = context.RawArray("q", [0] * workers)  # and who that is, once it is up
        loader = DataLoader(
            _Watched(dataset, self._at),
            batch_sampler=keys,
            collate_fn=dataset.collate,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=_POLL_SECONDS if workers else 0,
            # Else each pass would draw a seed for the workers from the global generator, which is the run's.
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

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                problem = self._problem(error, time.monotonic() - begin)
                if problem is error:
                    raise
            if problem is not None:  # raised here, it does not hold the frames of the iterator
                raise problem

    def _problem(self, error: Exception, waited: float) -> Exception | None:
        """Return what ``error`` of the DataLoader means, itself where it is another's; None: go on waiting."""
        timed_out = str(error).startswith("DataLoader timed out")
        of_worker = timed_out or str(error).startswith("DataLoader worker (pid")
        if not self._workers or (isinstance(error, RuntimeError) and not of_worker):
            return error
        # A process that was killed while it handed a batch over breaks the connection before it is seen to be gone.
        gone = wait([worker.sentinel for worker in self._workers], timeout=0 if timed_out else 1)
        for worker in self._workers:
            if worker.sentinel in gone:
                worker.join()
                return WorkerDied(_obituary(worker.pid, worker.exitcode, self._place(worker.pid)))
        if not timed_out:
            return error
        if not all(thread.is_alive() for thread in self._threads):
            return RuntimeError("the thread that takes batches from the reading processes failed (see above)")
        hanging = [worker.pid for worker in self._workers if worker.pid not in self._pids[:]]
        if hanging and waited >= _START_SECONDS:
            return WorkerNotStarted(f"process {hanging[0]}, which is to read images, hangs since it was started")
        if self._timeout_seconds and waited >= self._timeout_seconds:
            busy = [f"process {w.pid}{place}" for w in self._workers if (place := self._place(w.pid))]
            told = "; ".join(busy[:3]) + (f" and {len(busy) - 3} more" if len(busy) > 3 else "")
            return WorkerFailed(
                f"no batch of images came for {self._timeout_seconds:g} s (data.timeout_seconds): "
                f"{told or 'no process'} is still reading. Does the storage answer? If it is only slow, raise the limit"
            )
        return None

    def _place(self, pid: int) -> str:
        index = dict(zip(self._pids, self._at, strict=True)).get(pid, _IDLE)
        return "" if index == _IDLE else f" at {self._dataset.name(index)}"

    def abandon(self) -> None:
        """End the workers without waiting for anything.

        An orderly end takes locks and reads pipes that a process may have died over. So the others are killed, and a
        thread that nobody waits for puts the rest away.
        """
        for worker in self._workers:
            worker.kill()
        held = [self._batches]
        self._batches = iter(())
        threading.Thread(target=held.clear, daemon=True).start()


class _Flag:
    """What DataLoader needs of an event, without a lock.

    A multiprocessing.Event takes a lock to be looked at, and workers look at it before every batch: where one is killed
    with the lock in hand, everybody else who looks waits for ever, the main process first.
    """

    def __init__(self, context: BaseContext):
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


class _Watched(Dataset):
    """A data set that notes which image each worker is reading, for the message where it does not come back."""

    def __init__(self, dataset: TrainImages | EvalImages, at):
        self.dataset, self.at = dataset, at

    def __getitem__(self, key):
        info = get_worker_info()
        if info is None:
            return self.dataset[key]
        self.at[info.id] = key[1] if isinstance(key, tuple) else key
        sample = self.dataset[key]
        self.at[info.id] = _IDLE
        return sample


def _obituary(pid: int, exit_code: int, place: str) -> str:
    """Return how a worker ended, in one line."""
    if exit_code >= 0:
        return f"process {pid}, which reads images, ended{place} (exit code {exit_code})"
    name = signal.Signals(-exit_code).name
    why = {
        "SIGKILL": ": the system does that where memory runs out (dmesg tells), and fewer data.workers need less",
        "SIGBUS": ": /dev/shm is full. docker run takes --shm-size=8g or --ipc=host; fewer data.workers need less",
    }.get(name, "")
    return f"process {pid}, which reads images, was ended by {name}{place}{why}"


def _start_worker(pids, worker: int) -> None:
    """Note that a worker is up, and keep it alive through the signals that ask the run to stop.

    Ctrl-C and many schedulers signal every process of a run at once. The main process finishes its step and saves;
    for that it needs batches a little longer.
    """
    pids[worker] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
