"""What is measured between two log lines, without waiting for the device."""

import contextlib
import time

import torch

from volo import distributed
from volo.losses import LossTerms

TERMS = ("loss", "loss_cls", "loss_dense")
_NEVER = 2**53 - 1  # exact in float64, as which it travels between ranks


class Window:
    """Sums of the loss terms, counts and clock times since the last log line.

    The sums stay on the device; they are read, once, by :meth:`close`. So is the first step with a loss that is
    not finite: it is found at the next log line or save, and named exactly.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.first_bad = torch.full((len(TERMS),), _NEVER, dtype=torch.int64, device=device)
        self.grad_norm: torch.Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(len(TERMS), dtype=torch.float32, device=self.device)
        self.passes = self.images = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out of the rates what was done since the last line (an evaluation, a save)."""
        self.started = time.perf_counter()
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Count the time in the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

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
        """Return the means over all ranks since the last call, and start anew."""
        *sums, passes, waited = distributed.sum_over_ranks([*self.sums.tolist(), self.passes, self.waited])
        elapsed = time.perf_counter() - self.started
        means = {name: value / passes for name, value in zip(TERMS, sums, strict=True)}
        if self.grad_norm is not None:
            means["grad_norm"] = float(self.grad_norm)
        means["images_per_s"] = self.images / elapsed
        means["data_wait"] = waited / elapsed / distributed.world_size()
        self._reset()
        return means
