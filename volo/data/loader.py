"""Batches in a defined order, read by worker processes.

G is the global batch: the images of one optimizer step over all R ranks and M micro-batches (accumulation steps).
Epoch e goes through one permutation of the data set, drawn from (seed, e); step s takes rows [s*G, (s+1)*G) of it,
cut into M*R equal chunks, and micro-batch m of rank r is chunk m*R + r. What one optimizer step sees is thereby
the same for any number of ranks.
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

    @property
    def passes_per_epoch(self) -> int:
        """Micro-batches of an epoch, of this rank."""
        return self.steps_per_epoch * self.micro_batches

    def keys_from(self, number: int, epochs: int | None) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of micro-batch ``number``, counted from epoch 0, and of all after it, over ``epochs``."""
        epoch, passed = divmod(number, self.passes_per_epoch)
        step, micro = divmod(passed, self.micro_batches)
        yield from islice(self.keys(epoch, step), micro, None)
        for later in count(epoch + 1) if epochs is None else range(epoch + 1, epochs):
            yield from self.keys(later)


class TrainLoader:
    """Training batches of this rank; make it with :func:`train_loader`."""

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
        """Optimizer steps of an epoch."""
        return self.batches.steps_per_epoch

    @property
    def left_out(self) -> int:
        """Images an epoch does not see."""
        return self.batches.left_out

    @property
    def lost_workers(self) -> int:
        """How many processes that read images died and were replaced."""
        return self._reader.lost_workers

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of ``epoch`` in order, from ``start_step`` on; nothing before it is read.

        The first batches of the next epoch are read ahead while this one ends.

        Raises:
            UnreadableImage: A file of the batch that is due cannot be read, and ``on_error`` is "fail" or no other
                image could be read in its place either. Or a process that reads died or hangs (``WorkerFailed``).
        """
        passes = self.batches.passes_per_epoch
        for number in range(start_step * self.batches.micro_batches, passes):
            batch = self._reader.read(epoch * passes + number)
            if len(batch) < self.batches.chunk:
                self._reader.close()
                raise _unreadable(batch.failures, self._dataset.on_error)
            yield batch

    def first_images(self, epoch: int, step: int, most: int) -> Batch:
        """Return the first ``most`` images that this rank sees in a step, read in this process for a picture of them.

        Unreadable files are left out: they are reported when their turn comes.
        """
        number = epoch * self.batches.passes_per_epoch + step * self.batches.micro_batches
        keys = next(self.batches.keys_from(number, None))[:most]
        return self._dataset.collate([self._dataset[key] for key in keys])


class EvalLoader:
    """Evaluation batches of this rank; make it with :func:`eval_loader`. Every pass gives the same batches.

    Each pass has workers of its own, and ends them: between evaluations they would hold memory for nothing.

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
            lambda number: iter(chunks[number:]),
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
        global_batch: Images of an optimizer step, over all ranks and micro-batches.
        world_size: Number of ranks.
        rank: This rank.
        micro_batches: Accumulation steps of an optimizer step.
        workers: Processes that read; 0 reads in this one.
        on_error: "fail", or "skip": another image takes the place of an unreadable one, and other workers that of
            workers that die.
        exif: "ignore" or "apply" orientation tags.
        pin_memory: Put batches into page-locked memory (for CUDA).
        timeout_seconds: Longest wait for a batch, where there are workers; 0 for no limit.
        epochs: Epochs of the run, after which nothing is read ahead; None for no end.
        sidecar: What follows the augmentation beside the pixels, such as label maps, or None.

    Raises:
        ValueError: ``global_batch`` is larger than the data set, or cannot be shared out evenly.
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

    Nothing is padded and nothing dropped, so the last batch may be smaller and a rank may have no batch at all.
    With ``on_error`` "skip" a batch lacks its unreadable images and lists them in ``failures``. Other arguments as
    in :func:`train_loader`; ``batch_size`` is this rank's.
    """
    indices = range(rank, len(records), world_size)
    images = EvalImages(records, transform, exif)
    return EvalLoader(images, indices, batch_size, workers, on_error, pin_memory, timeout_seconds)


def _unreadable(failures: list[str], on_error: str) -> UnreadableImage:
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    if on_error == "skip":
        return UnreadableImage(f"{failures[0]}{more}; no other image could be read in its place")
    return UnreadableImage(
        f"{failures[0]}{more}; replace the file, or set data.on_error to skip, which goes on without it and counts it"
    )
