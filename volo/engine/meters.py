"""What is measured between two log lines, without waiting for the device."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from volo.losses import LossTerms
from volo.runtime import distributed

TERMS = ("loss", "loss_cls", "loss_dense")
_NEVER = 2**53 - 1  # exact in float64, the type in which it travels between ranks

_Batch = TypeVar("_Batch")


@dataclass(frozen=True)
class Throughput:
    """Images over a span of time.

    Args:
        images: Images of all ranks.
        seconds: Length of the span.
        waited: Seconds of it without work for lack of images, on the rank that waited longest.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: "Throughput") -> "Throughput":
        return Throughput(self.images + other.images, self.seconds + other.seconds, self.waited + other.waited)


class BottleneckHint:
    """Tells the user, once per run, that the network waits for images, how long, and what may help.

    It judges spans of at least ``SPAN_SECONDS``, and leaves out the first log line, at which the queues are still full.

    Args:
        workers: Data workers of each training process.
        processes: Training processes on this machine.
        cores: Cores that they may use.
    """

    WAITING_SHARE = 0.1
    SPAN_SECONDS = 30.0

    def __init__(self, workers: int, processes: int, cores: int):
        self._workers, self._processes, self._cores = workers, processes, cores
        self._is_first_line, self._given = True, False
        self._span = Throughput()

    def __call__(self, throughput: Throughput) -> str | None:
        """Take the throughput of one log line; return the hint, if it is time for it."""
        if self._is_first_line or self._given:
            self._is_first_line = False
            return None
        self._span += throughput
        if self._span.seconds < self.SPAN_SECONDS:
            return None
        span, self._span = self._span, Throughput()
        self._given = span.waited >= self.WAITING_SHARE * span.seconds
        return self._hint(span) if self._given else None

    def _hint(self, span: Throughput) -> str:
        share, rate = span.waited / span.seconds, span.images / span.seconds
        possible = f"; the network could take {rate / (1 - share):,.0f}" if share < 0.99 else ""
        readers = self._processes * self._workers
        if readers == 0:
            who, advice = "the training process reads the images itself", "Set data.workers to read ahead"
        else:
            who = f"{readers} data workers{' on this machine' if self._processes > 1 else ''}"
            busy = readers + self._processes
            advice = (
                f"More data.workers may help: training and workers take {busy} of {self._cores} cores"
                if busy < self._cores
                else f"All {self._cores} cores are in use: use more cores, smaller images or faster storage"
            )
        return (
            f"the loader is the bottleneck: the network waits for images {100 * share:.0f} % of the time "
            f"({who}, {rate:,.0f} images/s{possible}). {advice}. scripts/benchmark/loader.py shows where the time goes"
        )


class _HostMark:
    """A moment on the host's clock."""

    def __init__(self):
        self.at = time.perf_counter()

    def until(self, later: "_HostMark") -> float:
        return later.at - self.at


class _CudaMark:
    """A moment in the stream of work of the current CUDA device; read only when the device is past it."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def until(self, later: "_CudaMark") -> float:
        return self.event.elapsed_time(later.event) / 1000


class TrainMeters:
    """Loss terms, gradient norm and throughput since the last log line, and the hint to draw from it.

    The sums stay on the device and are read once, by :meth:`close`. So is the first step with a non-finite loss: it is
    found at the next log line or save, and named exactly.

    Waiting for data is time in which the device has nothing to do because the next batch is missing. On the CPU that is
    the time that :meth:`timed` spends. On CUDA the host runs ahead, and while it waits the device may well have queued
    work. So events go into the stream before and after: between them the device is idle, unless it is behind, and then
    they follow each other at once. The first wait is left out, because workers and decoders are starting. A rank that
    waits makes the others wait for its gradients, which they do not see as waiting for data, so the rank that waited
    longest counts.
    """

    def __init__(self, device: torch.device, bottleneck: BottleneckHint):
        self.device = device
        self.bottleneck = bottleneck
        self.throughput = Throughput()
        self.hint: str | None = None
        self._first_bad = torch.full((len(TERMS),), _NEVER, dtype=torch.int64, device=device)
        self._grad_norm = torch.tensor(torch.nan)
        self._mark = _CudaMark if device.type == "cuda" else _HostMark
        self._started_up = False
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(TERMS), dtype=torch.float32, device=self.device)
        self._passes = self._images = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last line (an evaluation, a save) out of the rates."""
        self._started = time.perf_counter()
        self._waits = []

    def timed(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield ``batches``, counting the time that each takes to arrive as waiting for data."""
        iterator = iter(batches)
        while True:
            begin = self._mark()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waits.append((begin, self._mark()))
            if not self._started_up:
                self._started_up = True
                self.restart_clock()
            yield batch

    def add_pass(self, terms: LossTerms, step: int) -> None:
        """Add the loss terms of one pass of optimizer step ``step`` (from 0)."""
        values = torch.stack([term.detach().float() for term in terms])
        self._sums += values
        self._first_bad = torch.minimum(self._first_bad, torch.where(values.isfinite(), _NEVER, step))
        self._passes += 1

    def add_step(self, images: int, grad_norm: torch.Tensor) -> None:
        """Add one optimizer step: its images, over all ranks, and the gradient norm."""
        self._images += images
        self._grad_norm = grad_norm

    def first_non_finite(self) -> tuple[int, list[str]] | None:
        """Return the first step with a non-finite loss on any rank, and which terms; None if all were finite."""
        first = distributed.min_over_ranks(self._first_bad.tolist())
        step = int(min(first))
        if step == _NEVER:
            return None
        return step, [name for name, bad in zip(TERMS, first, strict=True) if int(bad) == step]

    def state(self) -> list[list[float]]:
        """Return each rank's loss sums and passes since the last log line, for a checkpoint."""
        return distributed.gather_lists([[*self._sums.tolist(), self._passes]])

    def load_state(self, state: list[list[float]], world: distributed.World) -> None:
        """Go on with the sums of ``state``, of as many ranks as there were; throughput is measured from now on."""
        for *sums, passes in state[world.rank :: world.size]:
            self._sums += torch.tensor(sums, device=self.device)
            self._passes += int(passes)

    def close(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start again.

        ``throughput`` and ``hint`` then belong to the closed span.
        """
        *sums, passes = distributed.sum_over_ranks([*self._sums.tolist(), self._passes])  # waits for the device
        seconds = time.perf_counter() - self._started
        waited = distributed.max_over_ranks([sum(begin.until(end) for begin, end in self._waits)])[0]
        self.throughput = Throughput(self._images, seconds, waited)
        self.hint = self.bottleneck(self.throughput)
        means = {name: value / passes for name, value in zip(TERMS, sums, strict=True)}
        means["grad_norm"] = float(self._grad_norm)
        means["images_per_s"] = self._images / seconds
        means["data_wait"] = waited / seconds
        self._reset()
        return means
