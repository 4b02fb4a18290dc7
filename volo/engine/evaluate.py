"""The one evaluation: exact counts of any model on any image list, over any number of processes.

Every image is evaluated once: a process takes every ``world_size``-th image, nothing is padded, nothing dropped, and
the integer counts are summed at the end. B images of one batch, C classes.
"""

import json
import logging
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.data.dataset import Batch
from volo.data.normalise import normalise_and_erase
from volo.data.sources.records import ImageRecords
from volo.runtime import distributed
from volo.runtime.errors import DataError

_logger = logging.getLogger("volo")


@dataclass(frozen=True)
class Accuracy:
    """Exact counts over a dataset, by one kind of labels; the percentages and the mean loss (nats) are derived."""

    images: int
    top1_correct: int
    top5_correct: int
    loss_sum: float = float("nan")

    @property
    def top1(self) -> float:
        return self._mean(100.0 * self.top1_correct)

    @property
    def top5(self) -> float:
        return self._mean(100.0 * self.top5_correct)

    @property
    def loss(self) -> float:
        return self._mean(self.loss_sum)

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}"

    def _mean(self, total: float) -> float:
        return total / self.images if self.images else float("nan")


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over a dataset, the same on every rank.

    Args:
        labels: Accuracy by the labels of the dataset.
        real: Accuracy by ImageNet-ReaL labels, if they were asked for.
        skipped: Why each unreadable image could not be read; these images are in no count.
        notes: How many images were unusual in some way (volo.data.dataset.Batch.note_counts).
    """

    labels: Accuracy
    real: Accuracy | None = None
    skipped: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)


class ReaLLabels:
    """ImageNet-ReaL (arXiv 2006.07159) for the official validation files: any of several labels may be right.

    Images with an empty list of labels count neither as right nor as wrong: 46,837 of the 50,000 count.
    """

    def __init__(self, records: ImageRecords):
        """Look up every image of ``records`` by its official name; ValueError if one has another name."""
        lists = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")
        self.label_sets: list[frozenset[int]] = []
        for path in records.names:
            name = PurePosixPath(path).name
            number = name.removeprefix("ILSVRC2012_val_").split(".")[0]
            if not name.startswith("ILSVRC2012_val_") or not number.isdigit() or not 1 <= int(number) <= len(lists):
                raise ValueError(
                    f"ImageNet-ReaL labels go by the official file names, ILSVRC2012_val_00000001.JPEG to "
                    f"ILSVRC2012_val_{len(lists):08d}.JPEG; {path} has another name"
                )
            self.label_sets.append(frozenset(lists[int(number) - 1]))

    @property
    def counted(self) -> int:
        """How many of the images have at least one label."""
        return sum(bool(labels) for labels in self.label_sets)


class _Counts:
    """Running counts of this rank, which stay on the device until they are asked for: no batch waits for the last.

    Args:
        device: Where the logits are.
        real: ImageNet-ReaL labels, to be counted as well.
    """

    def __init__(self, device: torch.device, real: ReaLLabels | None):
        self.real = real
        self.images = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-5 and loss; counts are exact
        self._ranked: list[tuple[Tensor, Tensor]] = []  # of every batch, if ReaL labels are counted

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Count one batch.

        Args:
            logits: float32 [B, C], on the device.
            labels: [B], on the device.
            indices: Which images these are, [B], on the host.
        """
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5], best first
        hits = ranked == labels[:, None]  # [B, 5]
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        self._sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss])
        self.images += len(labels)
        if self.real is not None:
            self._ranked.append((ranked, indices))

    def over_ranks(self) -> Accuracy:
        """Return the accuracy by the labels of the dataset."""
        return _over_ranks(self.images, *self._sums.tolist())

    def real_over_ranks(self) -> Accuracy | None:
        """Return the accuracy by ImageNet-ReaL labels, of which any may be right; there is no loss to take on them."""
        if self.real is None:
            return None
        images = top1 = top5 = 0
        for ranked, indices in self._ranked:
            for guesses, index in zip(ranked.tolist(), indices.tolist(), strict=True):
                if right := self.real.label_sets[index]:
                    images += 1
                    top1 += guesses[0] in right
                    top5 += any(guess in right for guess in guesses)
        return _over_ranks(images, top1, top5, float("nan"))


def _over_ranks(*counts: float) -> Accuracy:
    images, top1, top5, loss = distributed.sum_over_ranks(list(counts))
    return Accuracy(int(images), int(top1), int(top5), loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    mean: list[float],
    std: list[float],
    autocast: Callable[[], AbstractContextManager] = lambda: torch.autocast("cpu", enabled=False),
    channels_last: bool = False,
    real: ReaLLabels | None = None,
    on_batch: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Return the exact accuracy of ``model`` on this rank's ``batches``, summed over all ranks.

    Returns None, on every rank, if ``should_stop`` returned true on any rank.

    Args:
        model: Gives logits [B, C] in evaluation mode; its training mode is restored afterwards.
        batches: This rank's share of the dataset, as :func:`volo.data.loader.eval_loader` gives it.
        device: The device of ``model``.
        mean, std: Normalisation of each channel, in [0, 1].
        autocast: Gives the autocast context of a forward.
        channels_last: Memory order of the images.
        real: ImageNet-ReaL labels, to be counted in the same pass.
        on_batch: Called after each batch (a progress bar).
        should_stop: Called before each batch; a signal makes it true.

    Raises:
        DataError: On every rank, if the ``batches`` of any rank raise it.
    """
    was_training = model.training
    model.eval()
    counts = _Counts(device, real)
    skipped: list[str] = []
    notes: Counter[str] = Counter()
    stopped = False
    unreadable: list[str] = []
    for batch in _up_to_unreadable(batches, unreadable):
        if stopped := should_stop():
            break
        skipped += batch.failures
        notes.update(batch.note_counts())
        if len(batch.labels) > 0:
            images, labels = normalise_and_erase(batch, device, mean, std, channels_last=channels_last)
            with autocast():
                logits = model(images)  # [B, C]
            counts.add(logits.float(), labels, batch.indices)
        on_batch()
    model.train(was_training)

    if everyone_unreadable := distributed.gather_lists(unreadable):
        raise DataError(everyone_unreadable[0])
    if distributed.max_over_ranks([float(stopped)])[0]:
        return None
    everyone_notes: Counter[str] = Counter()
    for name, count in distributed.gather_lists(list(notes.items())):
        everyone_notes[name] += count
    return Evaluation(
        counts.over_ranks(),
        counts.real_over_ranks(),
        tuple(distributed.gather_lists(skipped)),
        dict(everyone_notes),
    )


def _up_to_unreadable(batches: Iterable[Batch], reasons: list[str]) -> Iterator[Batch]:
    """Yield ``batches`` up to one that cannot be read, and add the reason to ``reasons``."""
    try:
        yield from batches
    except DataError as error:  # the other ranks have to learn of it before this one ends
        reasons.append(str(error))
        if distributed.world_size() > 1:  # they may take minutes to get there
            _logger.error("%s (the other processes finish their share first)", error)
