"""Batches in a defined order, read by worker processes.

G is the global batch size: the images per optimizer step over all R ranks and M micro-batches (accumulation steps).
The order of epoch e is one permutation of the data set, drawn from (seed, e). Step s takes rows [s*G, (s+1)*G) of it,
cut into M*R equal chunks, and micro-batch m of rank r is chunk m*R + r. So an optimizer step has the same images for
any number of ranks.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import numpy as np

from volo.data.dataset import Batch, EvalImages, Sidecar, TrainImages
from volo.data.pixels.decode import UnreadableImage
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.records import ImageRecords
from volo.data.workers import BatchReader
from volo.runtime.rng import generator

__all__ = ["Batch", "EpochBatches", "EvalLoader", "TrainLoader", "eval_loader", "train_loader"]


class EpochBatches:
    """The samples in each micro-batch of this rank, for any epoch and step.

    The rest of a permutation after the last full batch is left out in that epoch; the next epoch leaves out others.

    Args:
        num_samples: Size of the data set.
        seed: Seed of the run.
        global_batch: G.
        world_size: R.
        rank: Which of the R ranks.
        micro_batches: M.

    Raises:
        ValueError: The data set is smaller than G, or G is not divisible by R*M.
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
                f"train.batch_size is {global_batch}, which is not divisible by {world_size} processes times "
                f"{micro_batches} accumulation steps. Give a multiple of {world_size * micro_batches}"
            )
        if num_samples < global_batch:
            raise ValueError(
                f"train.batch_size is {global_batch}, but there are only {num_samples} training images. Give at "
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
        """Optimizer steps per epoch."""
        return self.num_samples // self.global_batch

    @property
    def left_out(self) -> int:
        """Samples that an epoch leaves out."""
        return self.num_samples % self.global_batch

    @property
    def chunk(self) -> int:
        """Images per micro-batch."""
        return self.global_batch // (self.world_size * self.micro_batches)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the order of the samples in ``epoch``, int64 [num_samples]."""
        return generator(self.seed, "shuffle", epoch).permutation(self.num_samples)

    def keys(self, epoch: int, start_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys (epoch, index) of each micro-batch of this rank, from ``start_step`` on."""
        order = self.permutation(epoch)
        for step in range(start_step, self.steps_per_epoch):
            chunks = order[step * self.global_batch : (step + 1) * self.global_batch].reshape(-1, self.chunk)
            for mine in chunks[self.rank :: self.world_size]:
                yield [(epoch, int(index)) for index in mine]

    @property
    def passes_per_epoch(self) -> int:
        """Micro-batches per epoch of this rank."""
        return self.steps_per_epoch * self.micro_batches

    def keys_from(self, number: int, epochs: int | None) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of micro-batch ``number``, counted from epoch 0, and of all that follow in ``epochs``."""
        epoch, passed = divmod(number, self.passes_per_epoch)
        step, micro = divmod(passed, self.micro_batches)
        yield from islice(self.keys(epoch, step), micro, None)
        for later in count(epoch + 1) if epochs is None else range(epoch + 1, epochs):
            yield from self.keys(later)


class TrainLoader:
    """Training batches of this rank; created by :func:`train_loader`."""

    def __init__(
        self,
        dataset: TrainImages,
        batches: EpochBatches,
        workers: int,
        pin_memory: bool,
        timeout_seconds: float,
        epochs: int | None,
    ):
        self.batches = batches
        self._dataset = dataset
        self._reader = BatchReader(
            dataset,
            partial(batches.keys_from, epochs=epochs),
            workers=workers,
            pin_memory=pin_memory,
            timeout_seconds=timeout_seconds,
            replace_workers=dataset.on_error == "skip",
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.batches.steps_per_epoch

    @property
    def left_out(self) -> int:
        """Images that an epoch leaves out."""
        return self.batches.left_out

    @property
    def lost_workers(self) -> int:
        """Number of workers that died and were replaced."""
        return self._reader.lost_workers

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of ``epoch`` in order, from ``start_step`` on; earlier ones are not read.

        Workers read ahead into the next epoch.

        Raises:
            DataError: A file of the next batch cannot be read, and ``on_error`` is "fail" or no replacement could be
                read either (``UnreadableImage``); or a worker died or hangs (``WorkerFailed``).
        """
        passes = self.batches.passes_per_epoch
        for number in range(start_step * self.batches.micro_batches, passes):
            batch = self._reader.read(epoch * passes + number)
            if len(batch) < self.batches.chunk:
                self._reader.close()
                raise _unreadable(batch.failures, self._dataset.on_error)
            yield batch

    def first_images(self, epoch: int, step: int, most: int) -> Batch:
        """Return the first ``most`` images of this rank in a step, read in this process, for a picture of them.

        Unreadable files are left out; :meth:`epoch` reports them.
        """
        number = epoch * self.batches.passes_per_epoch + step * self.batches.micro_batches
        keys = next(self.batches.keys_from(number, None))[:most]
        return self._dataset.collate([self._dataset[key] for key in keys])


class EvalLoader:
    """Evaluation batches of this rank; created by :func:`eval_loader`. Every pass gives the same batches.

    Each pass starts its own workers and ends them, so that they take no memory between evaluations.

    Args:
        indices: The images of this rank, each exactly once.
    """

    def __init__(
        self,
        dataset: EvalImages,
        indices: range,
        batch_size: int,
        workers: int,
        on_error: str,
        pin_memory: bool,
        timeout_seconds: float,
    ):
        self.indices = indices
        self._on_error = on_error
        chunks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        self._num_batches = len(chunks)
        self._reader = BatchReader(
            dataset,
            lambda number: map(list, chunks[number:]),
            workers=min(workers, len(chunks)),
            pin_memory=pin_memory,
            timeout_seconds=timeout_seconds,
            replace_workers=on_error == "skip",
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; with ``on_error`` "fail" an unreadable file raises :class:`UnreadableImage`."""
        try:
            for number in range(len(self)):
                batch = self._reader.read(number)
                if batch.failures and self._on_error == "fail":
                    raise _unreadable(batch.failures, self._on_error)
                yield batch
        finally:
            self._reader.close()


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
    timeout_seconds: float = 0,
    epochs: int | None = None,
    sidecar: Sidecar | None = None,
) -> TrainLoader:
    """Return the loader of this rank's training batches.

    Args:
        records: The training images.
        transform: Their augmentation.
        seed: Seed of the run: order, augmentation and replacements.
        global_batch: Images per optimizer step, over all ranks and micro-batches.
        world_size: Number of ranks.
        rank: This rank.
        micro_batches: Accumulation steps per optimizer step.
        workers: Worker processes; 0 reads in this process.
        on_error: "fail" on an unreadable image or a dead worker, or "skip", which replaces either.
        exif: "ignore" or "apply" orientation tags.
        pin_memory: Put batches into page-locked memory (for CUDA).
        timeout_seconds: Longest wait for a batch, if there are workers; 0 for no limit.
        epochs: Epochs of the run, after which nothing is read ahead; None for no end.
        sidecar: Data that follow the augmentation, such as label maps, or None.

    Raises:
        ValueError: ``global_batch`` is larger than the data set, or cannot be divided evenly.
    """
    batches = EpochBatches(len(records), seed, global_batch, world_size, rank, micro_batches)
    images = TrainImages(records, transform, seed, on_error, exif, sidecar)
    return TrainLoader(images, batches, workers, pin_memory, timeout_seconds, epochs)


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
    timeout_seconds: float = 0,
) -> EvalLoader:
    """Return the loader of this rank's share of an evaluation: images rank, rank + R, rank + 2R, ...

    Nothing is padded or dropped, so the last batch may be smaller and a rank may have no batch at all. With
    ``on_error`` "skip" unreadable images are missing from a batch and listed in its ``failures``. ``batch_size`` is per
    rank; other arguments are those of :func:`train_loader`.
    """
    indices = range(rank, len(records), world_size)
    images = EvalImages(records, transform, exif)
    return EvalLoader(images, indices, batch_size, workers, on_error, pin_memory, timeout_seconds)


def _unreadable(failures: list[str], on_error: str) -> UnreadableImage:
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    if on_error == "skip":
        return UnreadableImage(f"{failures[0]}{more}. No replacement could be read either")
    return UnreadableImage(
        f"{failures[0]}{more}. Replace the file, or set data.on_error to skip, which leaves it out and counts it"
    )
