"""The one evaluation: exact counts of any model on any image list, over any number of processes.

Every image is looked at once: a process takes every ``world_size``-th image, nothing is padded, nothing dropped,
and the integer counts are summed at the end. C is the number of classes.
"""

import json
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn

from volo.data.dataset import Batch
from volo.data.normalise import normalise_and_erase
from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.records import ImageRecords
from volo.runtime import distributed

_logger = logging.getLogger("volo")


@dataclass(frozen=True)
class Accuracy:
    """Exact counts over a data set; the percentages are derived."""

    images: int
    top1_correct: int
    top5_correct: int
    loss_sum: float = float("nan")
    skipped: tuple[str, ...] = ()

    @property
    def top1(self) -> float:
        return 100.0 * self.top1_correct / self.images if self.images else float("nan")

    @property
    def top5(self) -> float:
        return 100.0 * self.top5_correct / self.images if self.images else float("nan")

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images if self.images else float("nan")


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a data set gave: accuracy on its labels and, where asked for, on ReaL labels."""

    labels: Accuracy
    real: Accuracy | None = None
    notes: dict[str, int] = field(default_factory=dict)


class ReaLLabels:
    """ImageNet-ReaL (arXiv 2006.07159) for the official validation files: any of several labels may be right.

    Images whose list of labels is empty count neither as right nor as wrong: 46,837 of the 50,000 count.
    """

    def __init__(self, records: ImageRecords):
        """Look up every image of ``records`` by its official name; ValueError where one has another name."""
        lists = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
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
    """Running integer counts of one labelling."""

    def __init__(self):
        self.images = self.top1 = self.top5 = 0
        self.loss_sum = 0.0

    def reduce(self, skipped: tuple[str, ...] = ()) -> Accuracy:
        images, top1, top5, loss = distributed.sum_over_ranks([self.images, self.top1, self.top5, self.loss_sum])
        return Accuracy(int(images), int(top1), int(top5), loss, skipped)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    mean: list[float],
    std: list[float],
    autocast: Callable = lambda: torch.autocast("cpu", enabled=False),
    channels_last: bool = False,
    real: ReaLLabels | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Return the exact accuracy of ``model`` on this rank's ``batches``, summed over all ranks.

    Returns None, on every rank, where ``should_stop`` turned true on any rank on the way. Raises UnreadableImage, on
    every rank, where a rank's ``batches`` raise it.

    Args:
        model: Gives logits [B, C] in evaluation mode; its training mode is restored afterwards.
        batches: This rank's share of the data set, as :func:`volo.data.loader.eval_loader` gives it.
        device: Where ``model`` is.
        mean, std: Normalisation of each channel, in [0, 1].
        autocast: Gives the autocast context of a forward.
        channels_last: Memory order of the images.
        real: Labels of ImageNet-ReaL, to be counted in the same pass.
        on_batch: Called with the number of images after each batch (a progress bar).
        should_stop: Asked before each batch; a signal sets it.
    """
    was_training = model.training
    model.eval()
    counts, real_counts = _Counts(), _Counts()
    skipped: list[str] = []
    notes: dict[str, int] = {}
    stopped = False
    unreadable: list[str] = []
    for batch in _up_to_unreadable(batches, unreadable):
        if stopped := should_stop():
            break
        skipped += batch.failures
        for name, count in batch.note_counts().items():
            notes[name] = notes.get(name, 0) + count
        if len(batch.labels) == 0:
            continue
        images, labels = normalise_and_erase(batch, device, mean, std, channels_last=channels_last)
        with autocast():
            logits = model(images)  # [B, C]
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        hits = ranked == labels[:, None]  # [B, 5]
        counts.images += len(labels)
        counts.top1 += int(hits[:, 0].sum())
        counts.top5 += int(hits.any(1).sum())
        counts.loss_sum += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        if real is not None:
            _count_real(real_counts, real, batch.indices.tolist(), ranked.tolist())
        on_batch(len(labels))
    model.train(was_training)
    if everyone_unreadable := distributed.gather_lists(unreadable):
        raise UnreadableImage(everyone_unreadable[0])
    if distributed.max_over_ranks([float(stopped)])[0]:
        return None

    everyone_skipped = tuple(distributed.gather_lists(skipped))
    all_notes: dict[str, int] = {}
    for name, count in distributed.gather_lists(list(notes.items())):
        all_notes[name] = all_notes.get(name, 0) + count
    labels_accuracy = counts.reduce(everyone_skipped)
    real_counts.loss_sum = float("nan")  # ReaL has no single label to take a loss on
    real_accuracy = real_counts.reduce(everyone_skipped) if real is not None else None
    return Evaluation(labels_accuracy, real_accuracy, all_notes)


def _up_to_unreadable(batches: Iterable[Batch], reasons: list[str]) -> Iterator[Batch]:
    """Yield ``batches`` up to one that cannot be read, and put the reason into ``reasons``."""
    try:
        yield from batches
    except UnreadableImage as error:  # the other ranks are to hear of it before this one goes
        reasons.append(str(error))
        if distributed.world_size() > 1:  # they get there in minutes
            _logger.error("%s (the other processes finish their share first)", error)


def _count_real(counts: _Counts, real: ReaLLabels, indices: list[int], ranked: list[list[int]]) -> None:
    for index, guesses in zip(indices, ranked, strict=True):
        right = real.label_sets[index]
        if right:
            counts.images += 1
            counts.top1 += guesses[0] in right
            counts.top5 += any(guess in right for guess in guesses)
