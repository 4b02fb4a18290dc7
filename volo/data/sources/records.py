"""Labelled images, and the splits and class names that they come from.

C is the number of classes, N the number of images. Classes are matched by name, never by position: a folder that is not
in the class list is an error, because silently mapping it to another class would give wrong accuracies.
"""

import hashlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS
from volo.data.sources.base import ImageSource, PackedNames
from volo.data.sources.label_files import LabelsOption, is_number, lines_of, repeated, some


@dataclass(frozen=True)
class ImageRecords:
    """A list of labelled images, sorted by name.

    Args:
        source: Names and contents of the N files.
        labels: Class index of each image, int64 [N].
        classes: The C class names in index order.
        ignored: Number of files left out: hidden images, and visible files without an image suffix.
    """

    source: ImageSource
    labels: np.ndarray
    classes: tuple[str, ...]
    ignored: int = 0

    def __post_init__(self):
        assert len(self.source) == len(self.labels)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> PackedNames:
        """Names of the images: "class/file.suffix", or "file.suffix" if there are no class folders."""
        return self.source.names

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.names[index]

    def read(self, index: int) -> bytes:
        """Return the content of an image's file; UnreadableImage if it is missing or cannot be read."""
        return self.source.read(index)

    def labels_digest(self) -> str:
        """Return a digest of the labels in this order, 16 hexadecimal digits."""
        return hashlib.sha256(np.ascontiguousarray(self.labels, dtype="<i8").tobytes()).hexdigest()[:16]

    def location(self, index: int) -> str:
        """Return where a user finds the file, for messages."""
        return self.source.location(index)


@dataclass(frozen=True)
class Splits:
    """The training images, the validation images (None for no evaluation) and the class names."""

    train: ImageRecords
    val: ImageRecords | None
    classes: tuple[str, ...]


class Split(ABC):
    """The training or validation images in any format, before the class names are known.

    Args:
        location: Where they are, for messages.
        labels: Labels of images that are not sorted into classes.
    """

    def __init__(self, location: str, labels: LabelsOption):
        self.location = location
        self.labels = labels

    @abstractmethod
    def found_classes(self) -> list[str]:
        """Return the class names found in folder names or labels, in any order."""

    @abstractmethod
    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        """List the images.

        Args:
            classes: Class names in index order; a class may have no image.

        Raises:
            ValueError: There is no image, or one has no label or a class that is not in ``classes``.
        """


def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ILSVRC2012 synsets in index order, from timm's package data."""
    content = pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt")
    assert content is not None
    return tuple(content.decode().split())


def class_names(class_list: str, train: Split | None = None) -> tuple[str, ...]:
    """Return the class names in index order.

    Args:
        class_list: "folders": the class folders of ``train`` (or the labels in its labels file), sorted as strings, as
            torchvision sorts them and as the published models index the synsets; or, if every name is a number, sorted
            by value, so that folder 10 is class 10. "imagenet": the ILSVRC2012 synsets. Anything else: a text file
            with one name per line.
        train: The training images; needed for "folders" only.

    Raises:
        ValueError: There is no such file or folder, a name occurs twice, or there are fewer than two classes.
    """
    if class_list == "imagenet":
        return imagenet_classes()
    if class_list == "folders":
        assert train is not None
        source, remedy = train.location, f"Put one folder per class there, or give {train.labels.name}"
        names = train.found_classes()
        key = (lambda name: (int(name), name)) if all(map(is_number, names)) else None
        names = sorted(names, key=key)
    else:
        source, remedy = class_list, 'Give data.class_list "folders", "imagenet" or a text file with one name per line'
        if not os.path.isfile(class_list):
            raise ValueError(f"data.class_list is {class_list!r}, which is not a file. {remedy}")
        names = lines_of(class_list)
        if twice := repeated(names):
            raise ValueError(f"{class_list} names a class more than once: {some(twice)}")
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no class"
        raise ValueError(f"{source} has {found}, and a classifier needs at least two. {remedy}")
    return tuple(names)


def require_known(folders: Sequence[str], index_of: dict[str, int], location: str, expected: str) -> None:
    """Raise ValueError if one of ``folders`` is not a class in ``index_of``, which ``expected`` describes."""
    unknown = [name for name in folders if name not in index_of]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(folders)} folders of {location} are not among the {len(index_of)} classes "
            f"({expected}): {some(unknown)}. Folders are never mapped to other classes: point data.class_list at "
            "the list that the labels follow, or move these folders away"
        )


def has_image_suffix(path: str) -> bool:
    """Return whether a file has an image suffix."""
    return os.path.splitext(path)[1].lower() in SUFFIX_FORMATS
