"""Hugging Face data sets in Parquet files, through timm's reader.

The reader uses the package ``datasets``, which writes a copy of the data set, as Arrow, into its own cache ($HF_HOME).
From there an image is read from mapped memory; a Parquet file is compressed in groups of a hundred images or more, all
of which would be read for one.
"""

import glob
import os
import re
from typing import Any

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS, UnreadableImage
from volo.data.sources.base import ImageSource, PackedNames
from volo.data.sources.label_files import LabelsOption, class_indices, some
from volo.data.sources.records import ImageRecords, Split, imagenet_classes
from volo.runtime.files import path_below, read_regular, refuse_special, require_below

_ALSO_CALLED = {"val": "validation", "validation": "val"}


def has_parquet(folder: str) -> bool:
    """Return whether a folder, or its subfolder data as on the Hub, has Parquet files."""
    folder = glob.escape(folder)
    return any(glob.glob(f"{folder}/{subfolder}*.parquet") for subfolder in ("", "data/"))


class ParquetSource(ImageSource):
    """Images of a data set of the package ``datasets``; each process opens it for itself.

    Args:
        names: Names of the N images.
        folder: The data set.
        split: Its split.
        rows: Row of each image, int64 [N].
        reader: timm's reader of the split, if it is open already.
    """

    def __init__(self, names: PackedNames, folder: str, split: str, rows: np.ndarray, reader=None):
        super().__init__(names)
        self.folder, self.split, self.rows = folder, split, rows
        self._reader = reader

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reader": None}

    def read(self, index: int) -> bytes:
        if self._reader is None:
            self._reader = _open(self.folder, self.split)
        # Not by the reader's own [row], which opens any path.
        image = self._reader.dataset[int(self.rows[index])][self._reader.image_key]
        if image and image["bytes"]:
            return image["bytes"]
        if not image or not image["path"]:
            raise UnreadableImage(f"cannot read {self.location(index)}: the row has no image")
        try:
            return read_regular(path_below(self.folder, _relative(image["path"], self.folder), self.location(index)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadableImage(
                f"cannot read {self.location(index)}: the row has no bytes, only the path {image['path']!r} ({reason})"
            ) from error

    def location(self, index: int) -> str:
        return f"{self.folder}, split {self.split}, row {self.rows[index]}: {self.names[index]}"


class ParquetSplit(Split):
    """A split of a data set of Parquet files with the columns image and label.

    Args:
        folder: The data set.
        split: Name of the split; "val" and "validation" stand for each other.
        option: The option that names it, for messages.
        labels: Must not have a labels file, because every row has its label.
    """

    def __init__(self, folder: str, split: str, option: str, labels: LabelsOption):
        super().__init__(f"{folder} (split {split})", labels)
        self.folder, self.split, self.option = folder, split, option
        self._reader: Any = None

    def reader(self):
        """Return timm's reader of the split."""
        if self._reader is None:
            problem = None
            for name in (self.split, _ALSO_CALLED.get(self.split)):
                try:
                    self._reader = name and _open(self.folder, name)
                except ValueError as error:
                    problem = problem or error
                else:
                    self.split = name or self.split
                    break
            if self._reader is None:
                raise ValueError(f"{self.option} is {self.split!r}: {problem}")
        return self._reader

    def found_classes(self) -> list[str]:
        reader = self.reader()
        return list(reader.class_to_idx) or sorted({str(label) for label in self._label_values(reader)})

    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        reader = self.reader()
        if self.labels.file is not None:
            raise ValueError(f"{self.labels.name} is given, but {self.location} has labels of its own. Leave it out")
        if not len(reader):
            raise ValueError(f"{self.location} has no image")
        self._require_paths_below(reader)
        labels = self._labels(reader, classes)
        names = [
            _name(path, row, classes[label])
            for row, (path, label) in enumerate(zip(_column(reader, "image.path"), labels, strict=True))
        ]
        rows = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        source = ParquetSource(PackedNames.of(names[row] for row in rows), self.folder, self.split, rows, reader)
        return ImageRecords(source, labels[rows], classes)

    def _label_values(self, reader) -> list[int | str]:
        """Return the label of each row; ValueError names the first row without one."""
        values = _column(reader, "label")
        for row, value in enumerate(values):
            if not isinstance(value, int | str):
                raise ValueError(
                    f"{self.location}: row {row} has the label {value!r:.100}, which names no class. Every row needs a "
                    "number or a class name in the column label"
                )
        return values

    def _require_paths_below(self, reader) -> None:
        """Raise ValueError if an image is given by a path that leaves the data set's folder; others are read there."""
        import pyarrow.compute as compute

        lengths = compute.binary_length(_arrow_column(reader, "image.bytes"))  # type: ignore[attr-defined]
        without = np.flatnonzero(np.asarray(lengths.fill_null(0)) == 0)
        paths = _arrow_column(reader, "image.path").take(without).to_pylist()
        for row, path in zip(without.tolist(), paths, strict=True):
            if path:
                require_below(_relative(path, self.folder), f"{self.location}, row {row}, which has no bytes,")

    def _labels(self, reader, classes: tuple[str, ...]) -> np.ndarray:
        """Return the class index of each row, matched by class name if the data set has names.

        ImageNet on the Hub is matched by position: its 1,000 classes are named by descriptions, in the order of the
        synsets. Raises ValueError if the data set has other names than ``classes``.
        """
        values = np.array(self._label_values(reader))
        name_of = {index: name for name, index in reader.class_to_idx.items()}
        ours = set(classes)
        strange = [name for _, name in sorted(name_of.items()) if name not in ours]
        if strange:
            if not (len(strange) == len(name_of) == len(classes) and classes == imagenet_classes()):
                raise ValueError(
                    f"{self.location}: {len(strange)} of its {len(name_of)} classes are not among the {len(classes)} "
                    f"classes ({classes[0]!r} ... {classes[-1]!r}): {some(strange)}. Labels are never mapped to other "
                    "classes: point data.class_list at a list that has these names"
                )
            name_of = {}
        distinct, which = np.unique(values, return_inverse=True)
        texts = [name_of.get(value, str(value)) for value in distinct.tolist()]
        return class_indices(texts, classes, self.location)[which]


def _open(folder: str, split: str) -> Any:
    """Return timm's reader of a split; ValueError if it cannot be opened, or a package is missing."""
    try:
        import datasets
        import datasets.exceptions
        from timm.data.readers.reader_factory import create_reader
    except ImportError as error:
        raise ValueError(f"Parquet files need a package that is missing ({error}): pip install datasets") from error
    try:
        for files in (datasets.load_dataset_builder(folder).config.data_files or {}).values():
            for file in files:  # which a README.md in the folder may name
                refuse_special(os.stat(path_below(folder, _relative(file, folder), folder)))
        return create_reader(f"hfds/{folder}", root=None, split=split)
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be opened as a data set of images: {text}") from error


def _relative(path: str, folder: str) -> str:
    """Return ``path`` relative to ``folder`` if it is absolute and begins with it; else as it is."""
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        if path.startswith(f"{root}/"):
            return path[len(root) + 1 :]
    return path


def _column(reader, name: str) -> list:
    """Return the values of a column, or of a field of it ("image.path"), without reading the other columns.

    Raises ValueError if there is no such column.
    """
    return _arrow_column(reader, name).to_pylist()


def _arrow_column(reader, name: str):
    """Return :func:`_column` as a chunked array of Arrow, which is not read yet."""
    column, _, field = name.partition(".")
    if column not in reader.dataset.column_names:
        raise ValueError(
            f"the Parquet files have no column {column}, only {', '.join(map(repr, reader.dataset.column_names))}. "
            "Images are read from a column image, their classes from a column label"
        )
    values = reader.dataset.with_format("arrow").data.column(column)
    if field:
        import pyarrow.compute

        values = pyarrow.compute.struct_field(values, field)  # type: ignore[attr-defined]
    return values


def _name(path: str | None, row: int, class_name: str) -> str:
    """Return the name of a row's image as in class folders: class/file.

    On the Hub the files of ImageNet have their synset appended (ILSVRC2012_val_00000001_n01751748.JPEG).
    """
    stem, suffix = os.path.splitext(os.path.basename(path or f"{row:08d}"))
    stem = re.sub(rf"_{re.escape(class_name)}$", "", stem)
    return f"{class_name}/{stem}{suffix if suffix.lower() in SUFFIX_FORMATS else suffix + '.jpg'}"
