"""The teacher's input: images are read and resized by worker processes.

Images of different sizes H x W travel as one array of bytes, because every tensor that passes between two processes
costs both of them an open file.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from volo.data.pixels.decode import UnreadableImage, read_image
from volo.data.pixels.pillow_render import to_array
from volo.data.pixels.transforms import EvalTransform
from volo.data.sources.records import ImageRecords
from volo.data.workers import BatchReader

_LARGEST_ASPECT = 4  # beyond it, a label map would be a single row of cells
_CHUNK = 16  # images; enough to hide the cost of passing them between processes


@dataclass(frozen=True)
class TeacherInput:
    """The size of a teacher's input.

    Args:
        image_hw: (H, W) of the input in pixels; if ``keeps_aspect``, only their product counts.
        keeps_aspect: Whether inputs may have any size divisible by ``stride``; otherwise only ``image_hw``.
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
        indices: Their indices in the records.
        sizes: (H, W) of each, in pixels.
        pixels: uint8, the images [3, H, W] one after the other.
        skipped: Index of each unreadable image, and the reason.
    """

    indices: list[int]
    sizes: list[tuple[int, int]]
    pixels: Tensor
    skipped: dict[int, str]

    def __len__(self) -> int:
        return len(self.indices) + len(self.skipped)

    def share_memory(self) -> "Chunk":
        """Move the pixels into shared memory, if they are not there; RuntimeError if there is no room."""
        self.pixels.share_memory_()
        return self

    def images(self) -> Iterator[tuple[int, Tensor]]:
        """Yield index and pixels, uint8 [3, H, W], of each image."""
        parts = self.pixels.split([3 * height * width for height, width in self.sizes])
        for index, (height, width), part in zip(self.indices, self.sizes, parts, strict=True):
            yield index, part.view(3, height, width)


class _TeacherImages(Dataset):
    """By index: (index, pixels or None, the reason if it is unreadable)."""

    def __init__(self, records: ImageRecords, teacher_input: TeacherInput, covers: str, exif: str):
        self.records = records
        self.input = teacher_input
        self.covers = covers
        self.exif = exif

    def name(self, index: int) -> str:
        """Return the name of image ``index`` in messages."""
        return self.records.location(index)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, str]:
        try:
            image, _ = read_image(self.records.read(index), self.name(index), self.exif)
        except UnreadableImage as error:
            return index, None, str(error)
        return index, self.input.prepare(image, self.covers), ""

    @staticmethod
    def collate(samples: list[tuple[int, np.ndarray | None, str]]) -> Chunk:
        """Return the chunk of samples that were read together."""
        readable = [(index, pixels) for index, pixels, _ in samples if pixels is not None]
        flat = [pixels.reshape(-1) for _, pixels in readable]
        return Chunk(
            [index for index, _ in readable],
            [pixels.shape[1:] for _, pixels in readable],
            torch.from_numpy(np.concatenate(flat)) if flat else torch.empty(0, dtype=torch.uint8),
            {index: reason for index, pixels, reason in samples if pixels is None},
        )


def read_chunks(
    records: ImageRecords,
    blocks: Iterable[range],
    teacher_input: TeacherInput,
    *,
    covers: str,
    exif: str,
    workers: int,
    timeout_seconds: float = 0,
    replace_workers: bool = False,
) -> tuple[Generator[Chunk, None, None], list[int]]:
    """Return the chunks of ``blocks``, in order, and the number of chunks of each block.

    The iterator raises :class:`volo.data.workers.WorkerFailed` if a worker dies or hangs.

    Args:
        records: The images.
        blocks: Ranges of image indices.
        teacher_input: The size of the teacher's input.
        covers: "whole_image" or "center_crop".
        exif: "ignore" or "apply" orientation tags.
        workers: Number of processes that read; 0 reads in this one.
        timeout_seconds: Longest wait for one chunk from the workers; 0 for no limit.
        replace_workers: Replace a worker that dies, instead of raising an error.
    """
    chunked = [[block[start : start + _CHUNK] for start in range(0, len(block), _CHUNK)] for block in blocks]
    chunks: list[Any] = [chunk for block in chunked for chunk in block]
    images: Any = _TeacherImages(records, teacher_input, covers, exif)
    reader = BatchReader(
        images,
        lambda number: iter(chunks[number:]),
        workers=min(workers, len(chunks)),
        pin_memory=False,
        timeout_seconds=timeout_seconds,
        replace_workers=replace_workers,
    )
    return _all_of(reader, len(chunks)), [len(block) for block in chunked]


def _all_of(reader: Any, count: int) -> Generator[Chunk, None, None]:
    try:
        for number in range(count):
            yield reader.read(number)
    finally:
        reader.close()
