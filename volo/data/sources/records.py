"""Which images there are and what class each of them has.

C is the number of classes, N the number of images. Classes are matched by name, never by position: a folder that
is not in the class list is an error, because a silent remap turns a good model into a bad number.
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
        ignored: Files left out because they are hidden images, or no images by their suffix.
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
        """Names of the images: "class/file.suffix", or "file.suffix" where there are no class folders."""
        return self.source.names

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.names[index]

    def read(self, index: int) -> bytes:
        """Return the content of an image's file; UnreadableImage where it is not there, or cannot be read."""
        return self.source.read(index)

    def labels_digest(self) -> str:
        """Return what tells these labels, in this order, from others: 16 hexadecimal digits."""
        return hashlib.sha256(np.ascontiguousarray(self.labels, dtype="<i8")).hexdigest()[:16]

    def location(self, index: int) -> str:
        """Return where a user finds the file, for messages."""
        return self.source.location(index)


@dataclass(frozen=True)
class Splits:
    """The training images, the validation images (None where there is nothing to evaluate), the classes."""

    train: ImageRecords
    val: ImageRecords | None
    classes: tuple[str, ...]


class Split(ABC):
    """The training or validation images before anyone has said which classes count, in whatever they are stored.

    Args:
        place: Where they are, for messages.
        labels: Labels of images that are not sorted into classes.
    """

    def __init__(self, place: str, labels: LabelsOption):
        self.place = place
        self.labels = labels

    @abstractmethod
    def found_classes(self) -> list[str]:
        """Return the names of the classes that the images have by their place or labels, in any order."""

    @abstractmethod
    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        """List the images.

        Args:
            classes: Class names in index order. Not every class needs an image.

        Raises:
            ValueError: No image, or one without a label, or of a class that is none of ``classes``.
        """


def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ILSVRC2012 synsets in index order, from timm's package data."""
    return tuple(pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split())


def class_names(class_list: str, train: Split | None = None) -> tuple[str, ...]:
    """Return the class names in index order.

    Args:
        class_list: "folders": the class folders of ``train`` (or the labels of its labels file), sorted as strings,
            as torchvision sorts them and as the published models index the synsets; where every name is a number, by
            its value, so that folder 10 is class 10. "imagenet": the ILSVRC2012 synsets. Anything else: a text file,
            one name a line.
        train: The training images; only "folders" looks at it.

    Raises:
        ValueError: No such file or folder, a name given twice, or fewer than two classes.
    """
    if class_list == "imagenet":
        return imagenet_classes()
    if class_list == "folders":
        source, remedy = train.place, f"put one folder a class there, or give {train.labels.name}"
        names = train.found_classes()
        key = (lambda name: (int(name), name)) if all(map(is_number, names)) else None
        names = sorted(names, key=key)
    else:
        source, remedy = class_list, 'data.class_list takes "folders", "imagenet" or such a file'
        if not os.path.isfile(class_list):
            raise ValueError(f"data.class_list is {class_list!r}, which is not a file; {remedy}")
        names = lines_of(class_list)
        if twice := repeated(names):
            raise ValueError(f"{class_list} names a class more than once: {some(twice)}")
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no class"
        raise ValueError(f"{source} holds {found}; a classifier needs at least two: {remedy}")
    return tuple(names)


def require_known(folders: Sequence[str], index_of: dict[str, int], place: str, expected: str) -> None:
    """Raise ValueError where one of ``folders`` is no class of ``index_of``; ``expected`` describes those."""
    unknown = [name for name in folders if name not in index_of]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(folders)} folders of {place} are not among the {len(index_of)} classes "
            f"({expected}): {some(unknown)}. Folders are never mapped to other classes: point data.class_list at "
            "the list that the labels follow, or move these folders away"
        )


def has_image_suffix(path: str) -> bool:
    """Tell whether a file is an image by its suffix."""
    return os.path.splitext(path)[1].lower() in SUFFIX_FORMATS
