"""Batches in a defined order, read by worker processes.

G is the global batch: the images of one optimizer step over all R ranks and M micro-batches (accumulation steps).
Epoch e goes through one permutation of the data set, drawn from (seed, e); step s takes rows [s*G, (s+1)*G) of it,
cut into M*R equal chunks, and micro-batch m of rank r is chunk m*R + r. What one optimizer step sees is thereby
the same for any number of ranks.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from volo.data.augment import EvalTransform, TrainTransform
from volo.data.dataset import Batch, EvalImages, TrainImages, collate
from volo.data.decode import UnreadableImage
from volo.data.records import ImageRecords
from volo.rng import generator
from volo.token_labels.source import LabelSource

__all__ = ["Batch", "EpochBatches", "EvalLoader", "TrainLoader", "eval_loader", "train_loader"]

_PREFETCHED_BATCHES = 2  # a worker
_GRACE_SECONDS = 60


class EpochBatches:
    """Which samples each micro-batch of this rank holds, for any epoch and step.

    What is left of a permutation after the last full batch is not seen in that epoch; another epoch leaves out
    other samples.

    Args:
        num_samples: Size of the data set.
        seed: Seed of the run.
        global_batch: G.
        world_size: R.
        rank: Which of the R ranks.
        micro_batches: M.

    Raises:
        ValueError: The data set is smaller than G, or G does not divide by R*M.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        global_batch: int,
        world_size: int = 1,
        rank: int = 0,
        micro_batches: int = 1,
    ):
        assert 0 <= rank < world_size
        if global_batch % (world_size * micro_batches):
            raise ValueError(
                f"train.batch_size is {global_batch}, which does not divide by {world_size} processes times "
                f"{micro_batches} accumulation steps; give a multiple of {world_size * micro_batches}"
            )
        if num_samples < global_batch:
            raise ValueError(
                f"train.batch_size is {global_batch}, but there are only {num_samples} training images; give at "
                f"most {num_samples}"
            )
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch = global_batch
        self.world_size = world_size
        self.rank = rank
        self.micro_batches = micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.num_samples // self.global_batch

    @property
    def left_out(self) -> int:
        """Samples an epoch does not see."""
        return self.num_samples % self.global_batch

    @property
    def chunk(self) -> int:
        """Images of a micro-batch."""
        return self.global_batch // (self.world_size * self.micro_batches)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the order, int64 [N], in which ``epoch`` sees the samples."""
        return generator(self.seed, "shuffle", epoch).permutation(self.num_samples)

    def keys(self, epoch: int, start_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys (epoch, index) of each micro-batch of this rank, from ``start_step`` on."""
        order = self.permutation(epoch)
        for step in range(start_step, self.steps_per_epoch):
            chunks = order[step * self.global_batch : (step + 1) * self.global_batch].reshape(-1, self.chunk)
            for mine in chunks[self.rank :: self.world_size]:
                yield [(epoch, int(index)) for index in mine]


class _From:
    """The batch sampler of a DataLoader whose workers outlive the epoch: ``keys`` from a place that can be set."""

    def __init__(self, batches: EpochBatches):
        self.batches = batches
        self.place = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches.keys(*self.place)


class TrainLoader:
    """Training batches of this rank; make it with :func:`train_loader`."""

    def __init__(self, dataset: TrainImages, batches: EpochBatches, workers: int, pin_memory: bool):
        self.batches = batches
        self._dataset = dataset
        self._on_error = dataset.on_error
        self._from = _From(batches)
        self._loader = _data_loader(dataset, self._from, workers, pin_memory)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.batches.steps_per_epoch

    @property
    def left_out(self) -> int:
        """Images an epoch does not see."""
        return self.batches.left_out

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of ``epoch`` in order, from ``start_step`` on; nothing before it is read.

        Raises:
            UnreadableImage: A file of the batch that is due cannot be read, and ``on_error`` is "fail" or no other
                image could be read in its place either.
        """
        self._from.place = (epoch, start_step)
        for batch in self._loader:
            if len(batch) < self.batches.chunk:
                raise _unreadable(batch.failures, self._on_error)
            yield batch

    def peek(self, epoch: int, step: int, most: int) -> Batch:
        """Return the first ``most`` images of the micro-batch that ``step`` begins with, read in this process.

        Unreadable files are left out: they are reported when their turn comes.
        """
        keys = next(self.batches.keys(epoch, step))[:most]
        return collate([self._dataset[key] for key in keys])


class EvalLoader:
    """Evaluation batches of this rank; make it with :func:`eval_loader`. Every pass gives the same batches.

    Args:
        indices: The images of this rank, each exactly once.
    """

    def __init__(
        self, dataset: EvalImages, indices: range, batch_size: int, workers: int, on_error: str, pin_memory: bool
    ):
        self.indices = indices
        self._on_error = on_error
        chunks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        self._loader = _data_loader(dataset, chunks, min(workers, len(chunks)), pin_memory)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; with ``on_error`` "fail" an unreadable file raises :class:`UnreadableImage`."""
        for batch in self._loader:
            if batch.failures and self._on_error == "fail":
                raise _unreadable(batch.failures, self._on_error)
            yield batch


def train_loader(
    records: ImageRecords,
    transform: TrainTransform,
    *,
    seed: int,
    global_batch: int,
    world_size: int = 1,
    rank: int = 0,
    micro_batches: int = 1,
    workers: int = 0,
    on_error: str = "fail",
    exif: str = "ignore",
    pin_memory: bool = False,
    token_labels: LabelSource | None = None,
) -> TrainLoader:
    """Return the loader of this rank's training batches.

    Args:
        records: The training images.
        transform: Their augmentation.
        seed: Seed of the run: order, augmentation and replacements.
        global_batch: Images of an optimizer step, over all ranks and micro-batches.
        world_size: Number of ranks.
        rank: This rank.
        micro_batches: Accumulation steps of an optimizer step.
        workers: Processes that read; 0 reads in this one.
        on_error: "fail", or "skip": another image takes the place of an unreadable one.
        exif: "ignore" or "apply" orientation tags.
        pin_memory: Put batches into page-locked memory (for CUDA).
        token_labels: Label maps of the images, or None.

    Raises:
        ValueError: ``global_batch`` is larger than the data set, or cannot be shared out evenly.
    """
    batches = EpochBatches(len(records), seed, global_batch, world_size, rank, micro_batches)
    images = TrainImages(records, transform, seed, on_error, exif, token_labels)
    return TrainLoader(images, batches, workers, pin_memory)


def eval_loader(
    records: ImageRecords,
    transform: EvalTransform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    on_error: str = "fail",
    exif: str = "ignore",
    pin_memory: bool = False,
) -> EvalLoader:
    """Return the loader of this rank's share of an evaluation: images rank, rank + R, rank + 2R, ...

    Nothing is padded and nothing dropped, so the last batch may be smaller and a rank may have no batch at all.
    With ``on_error`` "skip" a batch lacks its unreadable images and lists them in ``failures``. Other arguments as
    in :func:`train_loader`; ``batch_size`` is this rank's.
    """
    indices = range(rank, len(records), world_size)
    return EvalLoader(EvalImages(records, transform, exif), indices, batch_size, workers, on_error, pin_memory)


def _data_loader(dataset, batch_sampler, workers: int, pin_memory: bool) -> DataLoader:
    # Where processes can fork they do: the workers then share the list of files. They stay clear of CUDA, and
    # DataLoader gives each of them one thread.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # Else each pass would draw a seed for the workers from the global generator, which is the run's.
        generator=torch.Generator(),
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context="fork" if workers and can_fork else None,
        prefetch_factor=_PREFETCHED_BATCHES if workers else None,
        persistent_workers=workers > 0,
    )


def _start_worker(worker: int) -> None:
    """Keep a worker alive through the signals that ask the run to stop.

    Ctrl-C and many schedulers signal every process of a run at once. The main process finishes its step and saves;
    for that it needs batches a little longer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


def _unreadable(failures: list[str], on_error: str) -> UnreadableImage:
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    if on_error == "skip":
        return UnreadableImage(f"{failures[0]}{more}; no other image could be read in its place")
    return UnreadableImage(
        f"{failures[0]}{more}; replace the file, or set data.on_error to skip, which goes on without it and counts it"
    )
