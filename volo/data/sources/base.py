"""A list of N image files: the name and the content of each, by its index."""

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from volo.data.pixels.decode import UnreadableImage
from volo.runtime.files import read_regular


class PackedNames(Sequence[str]):
    """N strings in two arrays, immutable.

    A list of a million Python strings takes four times the memory, and every forked worker would copy it page by page
    as reference counts change.

    Args:
        text: The concatenated strings in UTF-8, uint8; file names that are not UTF-8 are encoded as by ``os.fsencode``.
        ends: Where each string ends in ``text``, int64 [N].
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        assert text.dtype == np.uint8 and ends.dtype == np.int64
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "PackedNames":
        """Pack ``names``, one at a time, so that a generator is never held in memory as a whole."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(np.frombuffer(text, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence["PackedNames"]) -> "PackedNames":
        """Return the names of all ``parts``, concatenated."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])[:-1]
        ends = [part.ends + start for part, start in zip(parts, starts, strict=True)]
        return cls(
            np.concatenate([part.text for part in parts] or [np.empty(0, np.uint8)]),
            np.concatenate(ends or [np.empty(0, np.int64)]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other) -> bool:
        if not isinstance(other, PackedNames):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)

    __hash__ = None  # type: ignore[assignment]


class ImageSource(ABC):
    """The files of N images, in any format. Safe to fork and to pickle: each process opens its own files.

    Args:
        names: Name of each image in messages, label stores and ImageNet-ReaL: "class/file.suffix", or "file.suffix" if
            there are no class folders; with forward slashes.
    """

    def __init__(self, names: PackedNames):
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the content of a file.

        Raises:
            UnreadableImage: The file is missing or cannot be read.
        """

    @abstractmethod
    def location(self, index: int) -> str:
        """Return where a user finds the file: its full path, or the archive or data set and the name in it."""


class FolderSource(ImageSource):
    """Image files in a folder.

    Args:
        root: The folder.
        names: Paths relative to it.
    """

    def __init__(self, root: str, names: PackedNames):
        super().__init__(names)
        self.root = root

    def read(self, index: int) -> bytes:
        path = self.location(index)
        try:
            return read_regular(path)
        except OSError as error:
            raise UnreadableImage(f"cannot read {path}: {error.strerror}") from error

    def location(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])
