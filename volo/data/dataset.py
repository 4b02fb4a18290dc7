"""Samples by key, and batches of them.

The key of a training sample is (epoch, index), and everything drawn for it depends on the seed and that key alone, so
any worker of any rank gives the same sample. B is the number of images in a batch, H and W are height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from volo.data.pixels.decode import UnreadableImage, count_notes, read_header
from volo.data.pixels.transforms import EvalTransform, Plan, TrainTransform
from volo.data.sources.records import ImageRecords
from volo.runtime.rng import generator, torch_seed

# Images that are tried in place of an unreadable one before giving up.
_REPLACEMENTS = 10


class SidecarBatch(Protocol):
    """Sidecar data of a batch, in tensors whose first axis is the image."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "SidecarBatch":
        """Return a copy with ``function`` applied to every tensor."""
        ...


class Sidecar(Protocol):
    """Data that belong to every training image and follow its augmentation, such as label maps."""

    def transformed(self, index: int, plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> Any:
        """Return the data of image ``index``, transformed by ``plan``.

        Args:
            index: Index of the image in the records.
            plan: The plan that was applied to the pixels.
            image_hw: Size of the decoded image, in pixels.
            out_hw: Size of the network's input, in pixels.

        Raises:
            ValueError: The data are damaged; the message names the file.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> SidecarBatch:
        """Return the batch of several results of :meth:`transformed`."""
        ...


@dataclass
class Sample:
    """One image with its label.

    Args:
        index: Index of the image in the records.
        image: uint8 [3, H, W], or None if no image could be read.
        label: Class index.
        erase_box: Box (top, left, bottom, right) of random erasing; all zeros for none.
        noise_seed: Seed of the noise in that box.
        notes: Sum of :class:`volo.data.pixels.decode.Note`.
        failures: One line for every file that could not be read: this one, or those that it replaces.
        sidecar: Its sidecar data, if the data set has any.
    """

    index: int
    image: np.ndarray | None
    label: int
    erase_box: tuple[int, int, int, int] = (0, 0, 0, 0)
    noise_seed: int = 0
    notes: int = 0
    failures: tuple[str, ...] = ()
    sidecar: Any = None


@dataclass
class Batch:
    """B images with their labels, all on the host.

    Args:
        images: uint8 [B, 3, H, W].
        labels: int64 [B].
        erase_boxes: int64 [B, 4], (top, left, bottom, right) of random erasing; all zeros for none.
        noise_seeds: int64 [B], seed of the noise in each box.
        indices: int64 [B], index of each image in the records.
        notes: int64 [B], sums of :class:`volo.data.pixels.decode.Note`.
        failures: One line for every file that could not be read. In training another image replaces it; in evaluation
            it is missing from the batch, which may then be empty.
        sidecar: Sidecar data of the images, if the data set has any.
    """

    images: Tensor
    labels: Tensor
    erase_boxes: Tensor
    noise_seeds: Tensor
    indices: Tensor
    notes: Tensor
    failures: list[str]
    sidecar: SidecarBatch | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> "Batch":
        """Return a copy with the tensors that go to the device in page-locked memory; DataLoader calls this."""
        sidecar = self.sidecar and self.sidecar.map(Tensor.pin_memory)
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), sidecar=sidecar)

    def share_memory(self) -> "Batch":
        """Move the tensors into shared memory, if they are not there; RuntimeError if there is no room."""
        for name in ("images", "labels", "erase_boxes", "noise_seeds", "indices", "notes"):
            getattr(self, name).share_memory_()
        if self.sidecar is not None:
            self.sidecar.map(Tensor.share_memory_)
        return self

    def note_counts(self) -> dict[str, int]:
        """Return the number of images with each note; notes that do not occur are left out."""
        return count_notes(self.notes.tolist())


def collate(samples: list[Sample], sidecar: Sidecar | None = None) -> Batch:
    """Return the batch of the samples that have an image, with the failures of all samples."""
    readable = [sample for sample in samples if sample.image is not None]

    def column(values: list, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).reshape(len(readable), *shape)

    images = [torch.from_numpy(sample.image) for sample in readable if sample.image is not None]
    return Batch(
        images=torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        labels=column([sample.label for sample in readable]),
        erase_boxes=column([sample.erase_box for sample in readable], (4,)),
        noise_seeds=column([sample.noise_seed for sample in readable]),
        indices=column([sample.index for sample in readable]),
        notes=column([int(sample.notes) for sample in readable]),
        failures=[failure for sample in samples for failure in sample.failures],
        sidecar=sidecar.collate([sample.sidecar for sample in readable]) if sidecar and readable else None,
    )


class _ImageDataset(torch.utils.data.Dataset):
    """The common part of training and evaluation data sets."""

    def __init__(self, records: ImageRecords, exif: str, sidecar: Sidecar | None = None):
        self.records = records
        self.labels = records.labels
        self.exif = exif
        self.sidecar = sidecar

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, samples: list[Sample]) -> Batch:
        """Return the batch of ``samples``; see :func:`collate`."""
        return collate(samples, self.sidecar)

    def name(self, index: int) -> str:
        """Return the location of image ``index``, for messages."""
        return self.records.location(index)


class TrainImages(_ImageDataset):
    """Augmented training samples, by the key (epoch, index).

    Args:
        records: The images.
        transform: Their augmentation.
        seed: Seed of the run.
        on_error: For an unreadable image "fail" gives a sample without an image, "skip" replaces it by another one,
            drawn from seed, epoch and index. Either way the sample has the reason.
        exif: "ignore" or "apply" orientation tags.
        sidecar: Data that follow the augmentation, such as label maps, or None.
    """

    def __init__(
        self,
        records: ImageRecords,
        transform: TrainTransform,
        seed: int,
        on_error: str,
        exif: str,
        sidecar: Sidecar | None = None,
    ):
        super().__init__(records, exif, sidecar)
        self.transform = transform
        self.seed = seed
        self.on_error = on_error

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        noise_seed = torch_seed(self.seed, "erase", epoch, index)
        sample = self._augmented(index, generator(self.seed, "augment", epoch, index), noise_seed)
        if sample.image is not None or self.on_error == "fail":
            return sample

        failures = sample.failures
        rng = generator(self.seed, "replace", epoch, index)
        for _ in range(_REPLACEMENTS):
            sample = self._augmented(int(rng.integers(len(self))), rng, noise_seed)
            failures += sample.failures
            if sample.image is not None:
                break
        return replace(sample, failures=failures)

    def _augmented(self, index: int, rng: np.random.Generator, noise_seed: int) -> Sample:
        label = int(self.labels[index])
        try:
            image = read_header(self.records.read(index), self.name(index), self.exif)
            plan = self.transform.draw(rng, image.width, image.height)
            box = self.transform.box_needed(plan, image.hw)
            decoded = image.decode(box)
            pixels = self.transform.apply(decoded, plan)
        except UnreadableImage as error:
            return Sample(index, None, label, failures=(str(error),))
        sidecar = None
        if self.sidecar is not None:
            try:
                sidecar = self.sidecar.transformed(index, plan, image.hw, self.transform.image_hw)
            except ValueError as error:
                return Sample(index, None, label, failures=(str(error),))
        return Sample(index, pixels, label, plan.erase, noise_seed, image.notes, sidecar=sidecar)


class EvalImages(_ImageDataset):
    """Evaluation samples by index; an unreadable file gives a sample with the reason and without an image."""

    def __init__(self, records: ImageRecords, transform: EvalTransform, exif: str):
        super().__init__(records, exif)
        self.transform = transform

    def __getitem__(self, index: int) -> Sample:
        label = int(self.labels[index])
        try:
            image = read_header(self.records.read(index), self.name(index), self.exif)
            plan = self.transform.plan(image.width, image.height)
            box = self.transform.box_needed(plan, image.hw)
            decoded = image.decode(box)
            pixels = self.transform.apply(decoded, plan)
        except UnreadableImage as error:
            return Sample(index, None, label, failures=(str(error),))
        return Sample(index, pixels, label, notes=image.notes)
