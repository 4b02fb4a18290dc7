"""The finished part of a generation: one file per block of images, either complete or absent.

The list of images, which is sorted, is cut into blocks of equal size; block b is the same images for any number of
processes. A folder of them holds:

    options.json        what the labels depend on; a run resumes only with the same
    block-000012.npz    scores [S] and classes [S] of its maps, one after the other; indices [n] of the images;
                        shapes [n, 2] of the maps; correct [2], number of images with a top-1 and a top-5 hit;
                        skipped [m] and reasons [m], unreadable images

A file gets its name when all of it is on disk, so a kill at any moment leaves only complete blocks. k top scores per
cell, h x w cells of a map, S the sum of k * h * w over the n maps.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from volo.runtime.files import atomic_file, remove_temporary_files, write_atomic
from volo.token_labels.store import TokenLabelMap

_OPTIONS = "options.json"


@dataclass
class LabelBlock:
    """The labels of one block: (index of the image, map), counts of top-1 and top-5 hits, and unreadable images."""

    labels: list[tuple[int, TokenLabelMap]]
    correct: tuple[int, int]
    skipped: dict[int, str] = field(default_factory=dict)


class BlockFolder:
    """The blocks of one generation, written by any number of processes, each block by one of them.

    Args:
        path: The folder.
        num_images: Images of the generation.
        block_size: Images of a block; the last may have fewer.
        top_k: k.
    """

    def __init__(self, path: Path, num_images: int, block_size: int, top_k: int):
        self.path = path
        self.num_images = num_images
        self.block_size = block_size
        self.top_k = top_k

    def __len__(self) -> int:
        return -(-self.num_images // self.block_size)

    def images(self, number: int) -> range:
        """Return the indices of the images of a block."""
        start = number * self.block_size
        return range(start, min(start + self.block_size, self.num_images))

    def open(self, options: dict[str, str | int]) -> None:
        """Make the folder, or resume in it.

        Args:
            options: What the labels depend on: name of the option to its value.

        Raises:
            ValueError: The blocks were made with other options, or the folder holds other files.
        """
        file = self.path / _OPTIONS
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} exists, but holds no blocks of an earlier run; move it away")
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(options, indent=1))
            return
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged; remove {self.path} to start again") from error
        changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
        if changed:
            differences = "; ".join(f"{name} was {before.get(name)}, now {options.get(name)}" for name in changed)
            raise ValueError(
                f"{self.path} holds labels made with other options: {differences}. Give the same options to resume, "
                "remove that folder to start again, or name another --output"
            )
        remove_temporary_files(self.path)

    def remaining(self) -> list[int]:
        """Return the numbers of the missing blocks, ascending."""
        there = {entry.name for entry in os.scandir(self.path)}
        return [number for number in range(len(self)) if self._file(number).name not in there]

    def write(self, number: int, block: LabelBlock) -> None:
        """Write a block; it is on disk when this returns."""
        maps = [label for _, label in block.labels]
        arrays = {
            "scores": _joined([label.scores for label in maps], np.float16),
            "classes": _joined([label.classes for label in maps], np.int16),
            "indices": np.array([index for index, _ in block.labels], dtype=np.int64),
            "shapes": np.array([label.scores.shape[1:] for label in maps], dtype=np.int64).reshape(-1, 2),
            "correct": np.array(block.correct, dtype=np.int64),
            "skipped": np.array(list(block.skipped), dtype=np.int64),
            "reasons": np.array(list(block.skipped.values()), dtype=np.str_),
        }
        with atomic_file(self._file(number)) as file:
            np.savez(file, **arrays)

    def read(self, number: int) -> LabelBlock:
        """Read a block; ValueError if its file is damaged."""
        file = self._file(number)
        try:
            with np.load(file) as content:
                arrays = {name: content[name] for name in content.files}  # the archive's checksums are compared
            ends = np.cumsum(self.top_k * arrays["shapes"].prod(1))
            labels = list(self._maps(arrays, ends))
            skipped = dict(zip(arrays["skipped"].tolist(), arrays["reasons"].tolist(), strict=True))
            correct = tuple(arrays["correct"].tolist())
        except Exception as error:  # the parsers raise all kinds of exceptions on damaged bytes
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}: {error}). Remove it and start again; only its "
                "images are labelled again"
            ) from error
        return LabelBlock(labels, correct, skipped)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)

    def _maps(self, arrays: dict[str, np.ndarray], ends: np.ndarray) -> Iterator[tuple[int, TokenLabelMap]]:
        start = 0
        for index, shape, end in zip(arrays["indices"].tolist(), arrays["shapes"].tolist(), ends.tolist(), strict=True):
            scores, classes = (arrays[name][start:end].reshape(self.top_k, *shape) for name in ("scores", "classes"))
            yield index, TokenLabelMap(scores, classes)
            start = end

    def _file(self, number: int) -> Path:
        return self.path / f"block-{number:06d}.npz"


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, dtype)
