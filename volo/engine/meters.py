"""What is measured between two log lines, without waiting for the device."""

import contextlib
import time
from dataclasses import dataclass

import torch

from volo.losses import LossTerms
from volo.runtime import distributed

TERMS = ("loss", "loss_cls", "loss_dense")
_NEVER = 2**53 - 1  # exact in float64, as which it travels between ranks


@dataclass(frozen=True)
class Throughput:
    """What went through in a time.

    Args:
        images: Images of all ranks.
        seconds: The time.
        waited: Seconds of it in which the rank that waited longest had nothing to compute on for want of images.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: "Throughput") -> "Throughput":
        return Throughput(self.images + other.images, self.seconds + other.seconds, self.waited + other.waited)


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


class Window:
    """Sums of the loss terms, counts and clock times since the last log line.

    Waiting for data is what the device spends without work because the next batch is not there. On the CPU that is the
    time in :meth:`waiting`. On CUDA the host runs ahead, and while it waits the device may well have work queued. So
    events are put into the stream before and after, between which the device finds nothing to do unless it is behind,
    and then they follow each other at once; they are read at :meth:`close`, when all is done. The first wait is left
    out: workers and decoders are starting. A rank that waits makes the others wait for its gradients, which is not
    seen as waiting for data there, so the rank that waited longest counts.

    The sums stay on the device; they are read, once, by :meth:`close`. So is the first step with a loss that is
    not finite: it is found at the next log line or save, and named exactly.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.first_bad = torch.full((len(TERMS),), _NEVER, dtype=torch.int64, device=device)
        self.grad_norm: torch.Tensor | None = None
        self.pace = Throughput()
        self._mark = _CudaMark if device.type == "cuda" else _HostMark
        self._started_up = False
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(len(TERMS), dtype=torch.float32, device=self.device)
        self.passes = self.images = 0
        self.waits = []
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out of the rates what was done since the last line (an evaluation, a save)."""
        self.started = time.perf_counter()
        self.waits = []

    @contextlib.contextmanager
    def waiting(self):
        """Count the time in the block as waiting for data."""
        begin = self._mark()
        yield
        self.waits.append((begin, self._mark()))
        if not self._started_up:
            self._started_up = True
            self.restart_clock()

    def add_losses(self, terms: LossTerms, step: int) -> None:
        """Add the loss terms of one pass of optimizer step ``step`` (from 0)."""
        values = torch.stack([term.detach().float() for term in terms])
        self.sums += values
        self.first_bad = torch.minimum(self.first_bad, torch.where(values.isfinite(), _NEVER, step))
        self.passes += 1

    def count_images(self, images: int) -> None:
        """Count the images, over all ranks, of one optimizer step."""
        self.images += images

    def first_non_finite(self) -> tuple[int, list[str]] | None:
        """Return the first step with a loss that was not finite on any rank, and which terms; None if all were."""
        first = distributed.min_over_ranks(self.first_bad.tolist())
        step = int(min(first))
        if step == _NEVER:
            return None
        return step, [name for name, bad in zip(TERMS, first, strict=True) if int(bad) == step]

    def close(self) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start anew; ``pace`` is that of the time closed."""
        *sums, passes = distributed.sum_over_ranks([*self.sums.tolist(), self.passes])  # waits for the device
        elapsed = time.perf_counter() - self.started
        waited = distributed.max_over_ranks([sum(begin.until(end) for begin, end in self.waits)])[0]
        self.pace = Throughput(self.images, elapsed, waited)
        means = {name: value / passes for name, value in zip(TERMS, sums, strict=True)}
        if self.grad_norm is not None:
            means["grad_norm"] = float(self.grad_norm)
        means["images_per_s"] = self.images / elapsed
        means["data_wait"] = waited / elapsed
        self._reset()
        return means
