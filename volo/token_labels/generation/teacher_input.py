"""Images on their way to a teacher: read, resized, and handed over by worker processes.

n images of different sizes H x W travel as one array of bytes, because every tensor that passes between processes
takes an open file of both.
"""

import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from volo.data.pixels.decode import UnreadableImage, read_image
from volo.data.pixels.transforms import EvalTransform, to_array
from volo.data.sources.records import ImageRecords

_LARGEST_ASPECT = 4  # a map of an image that is longer still would be one row of cells
_CHUNK = 16  # images; enough to hide the cost of passing them on


@dataclass(frozen=True)
class TeacherInput:
    """What a teacher takes.

    Args:
        image_hw: (H, W); where ``keeps_aspect``, a size of as many pixels as the input is to have.
        keeps_aspect: Takes inputs of any size divisible by ``stride``; otherwise of ``image_hw`` alone.
        stride: Pixels between two cells.
        interpolation: Resampling of the resize, as timm names it.
    """

    image_hw: tuple[int, int]
    keeps_aspect: bool
    stride: int
    interpolation: str

    def whole_image_hw(self, height: int, width: int) -> tuple[int, int]:
        """Return the input size for a whole image of height x width pixels."""
        if not self.keeps_aspect:
            return self.image_hw
        aspect = min(max(width / height, 1 / _LARGEST_ASPECT), _LARGEST_ASPECT)
        cells = math.prod(self.image_hw) / self.stride**2
        rows, cols = (max(1, round(math.sqrt(cells * ratio))) for ratio in (1 / aspect, aspect))
        return rows * self.stride, cols * self.stride

    def prepare(self, image: Image.Image, covers: str) -> np.ndarray:
        """Return an RGB image as the teacher sees it in ``covers``, uint8 [3, H, W]."""
        if covers == "center_crop":
            return EvalTransform(self.image_hw, 1.0, self.interpolation)(image)
        height, width = self.whole_image_hw(image.height, image.width)
        return to_array(image.resize((width, height), Image.Resampling[self.interpolation.upper()]))


@dataclass
class Chunk:
    """A few images that were read together.

    Args:
        indices: Their places in the records.
        sizes: (H, W) of each.
        pixels: uint8, the images [3, H, W] one after the other.
        skipped: Place of each image that cannot be read, and why.
    """

    indices: list[int]
    sizes: list[tuple[int, int]]
    pixels: Tensor
    skipped: dict[int, str]

    def __len__(self) -> int:
        return len(self.indices) + len(self.skipped)

    def images(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the place and the pixels [3, H, W] of each image."""
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        for index, (height, width), part in zip(self.indices, self.sizes, parts, strict=True):
            yield index, part.view(3, height, width)


class _Images(Dataset):
    """(index, pixels or None, why not) by index."""

    def __init__(self, records: ImageRecords, teacher_input: TeacherInput, covers: str, exif: str):
        self.records = records
        self.input = teacher_input
        self.covers = covers
        self.exif = exif

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, str]:
        try:
            image, _ = read_image(self.records.read(index), self.records.location(index), self.exif)
        except UnreadableImage as error:
            return index, None, str(error)
        return index, self.input.prepare(image, self.covers), ""


def read_chunks(
    records: ImageRecords,
    blocks: Iterable[range],
    teacher_input: TeacherInput,
    *,
    covers: str,
    exif: str,
    workers: int,
) -> tuple[Iterator[Chunk], list[int]]:
    """Return the chunks of ``blocks``, ranges of image indices, in order, and the number of chunks of each block."""
    cut = [[block[start : start + _CHUNK] for start in range(0, len(block), _CHUNK)] for block in blocks]
    chunks = [chunk for block in cut for chunk in block]
    loader = DataLoader(
        _Images(records, teacher_input, covers, exif),
        batch_sampler=chunks,
        collate_fn=_collate,
        num_workers=min(workers, len(chunks)),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return iter(loader), [len(block) for block in cut]


def _collate(samples: list[tuple[int, np.ndarray | None, str]]) -> Chunk:
    readable = [(index, pixels) for index, pixels, _ in samples if pixels is not None]
    flat = [pixels.reshape(-1) for _, pixels in readable]
    return Chunk(
        [index for index, _ in readable],
        [pixels.shape[1:] for _, pixels in readable],
        torch.from_numpy(np.concatenate(flat)) if flat else torch.empty(0, dtype=torch.uint8),
        {index: reason for index, pixels, reason in samples if pixels is None},
    )


def _start_worker(worker: int) -> None:
    # A signal that stops the run goes to all its processes; the one that labels sees to the end of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
