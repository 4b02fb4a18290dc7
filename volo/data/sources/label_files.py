"""Labels of images that are not in class folders, from a labels file or the development kit of ILSVRC2012."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS
from volo.data.sources.devkit import is_devkit, validation_synsets

_NAMES_AN_IMAGE = re.compile(rf"({'|'.join(map(re.escape, SUFFIX_FORMATS))})(\W|$)", re.IGNORECASE)


class LabelsOption(NamedTuple):
    """Where the labels of images that are not in class folders come from.

    Args:
        name: The option that names the labels file, for messages.
        file: The labels file, if one is given: see :func:`label_texts`.
        devkit: The development kit, used if images have no labels of their own and no labels file is given.
    """

    name: str = "data.train_labels"
    file: str | None = None
    devkit: str | None = None

    def file_for(self, sorted_already: bool) -> str | None:
        """Return the file that labels the images, or None if ``sorted_already`` into classes and no file is given."""
        return self.file or (None if sorted_already else self.devkit)


def label_texts(names: Sequence[str], labels_file: str, location: str) -> list[str]:
    """Return the label of each of ``names``, as written in the file.

    Args:
        names: The images.
        labels_file: A text file with one line per image: "file-name label", or only "label" with the files in sorted
            order. Or a .csv file whose first two columns are file name and label; a first row that names no file is
            its header. Or the development kit (ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it), for the
            official validation files. Its ILSVRC2012_validation_ground_truth.txt alone is refused: those ids are
            1-based and have an order of their own.
        location: The folder or archive of the images, for messages.

    Raises:
        ValueError: The lines do not match the images.
    """
    if is_devkit(labels_file):
        return validation_synsets(names, labels_file)
    known = set(names)
    lines = lines_of(labels_file)
    if labels_file.lower().endswith(".csv"):
        try:
            table = list(csv.reader(lines, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise ValueError(f"{labels_file} is not a table of comma-separated values ({error})") from error
        rows = [[cell.strip() for cell in row[:2]] for row in table]
        form = '"file-name,label"'
        if rows and rows[0][0] not in known and not os.path.splitext(rows[0][0])[1]:
            rows = rows[1:]
    else:
        rows = [line.split(maxsplit=1) for line in lines]
        form = '"file-name label", with no space in the name (a .csv file may have them)'
        if not any(row[0] in known for row in rows) and not any(map(_NAMES_AN_IMAGE.search, lines)):
            if len(lines) != len(names):
                raise ValueError(
                    f"{labels_file} has {len(lines)} labels, but {location} has {len(names)} images. Give one label "
                    'per image in the order of the sorted file names, or lines of the form "file-name label"'
                )
            return lines
    label_of = {row[0]: row[1] for row in rows if len(row) == 2 and row[1]}
    stray = [row[0] for row in rows if row[0] not in known or row[0] not in label_of]
    missing = [name for name in names if name not in label_of]
    if stray or missing or len(label_of) != len(rows):
        problems = {
            "lines without a label or file": stray,
            "images without a line": missing,
            "files with several lines": [] if stray or missing else repeated([row[0] for row in rows]),
        }
        found = "; ".join(f"{what}: {some(which)}" for what, which in problems.items() if which)
        example = f", such as {names[0]!r}" if names else ""
        raise ValueError(
            f"{labels_file} does not match {location}: {found}. Write lines of the form {form}; names are relative to "
            f"{location}{example}"
        )
    return [label_of[name] for name in names]


def label_indices(texts: list[str], classes: tuple[str, ...], location: str) -> np.ndarray:
    """Return the class index of each text, int64 [N]: see :func:`class_indices`."""
    distinct, which = np.unique(np.array(texts, dtype=object), return_inverse=True)
    return class_indices(distinct.tolist(), classes, location)[which]


def class_indices(texts: list[str], classes: tuple[str, ...], location: str) -> np.ndarray:
    """Return the class index, int64, of each label text: all texts are class names, or all are 0-based indices.

    If the class names are numbers ("0", "1", "2", "4"), texts are names only: 3 is then not the class at index 3.

    Raises ValueError, beginning with ``location``, for any other text.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    if all(text in index_of for text in texts):
        return np.array([index_of[text] for text in texts], dtype=np.int64)
    if all(map(is_number, classes)):
        wrong = sorted({text for text in texts if text not in index_of})
        raise ValueError(
            f"{location}: labels that are not among the {len(classes)} classes, whose names are numbers "
            f"({classes[0]} ... {classes[-1]}): {some(wrong)}. List all classes, in index order, in a file and point "
            "data.class_list at it"
        )
    if all(is_number(text) and int(text) < len(classes) for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    by_number = all(map(is_number, texts))
    wrong = [t for t in texts if t not in index_of and not (by_number and int(t) < len(classes))]
    hint = ""
    if by_number:
        hint = (
            " Indices start at 0. The ids of ILSVRC2012_validation_ground_truth.txt start at 1 and have an order of "
            "their own, so they cannot be used: write synset names instead, or give the development kit"
        )
    raise ValueError(
        f"{location}: labels that are neither class names (such as {classes[0]!r}) nor indices below "
        f"{len(classes)}: {some(sorted(set(wrong)))}.{hint}"
    )


def lines_of(path: str) -> list[str]:
    """Return the non-empty lines of a text file, stripped; ValueError if it is not UTF-8."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def is_number(text: str) -> bool:
    """Return whether ``text`` consists of decimal digits."""
    return text.isascii() and text.isdigit()


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    ordered = sorted(names)
    return sorted({a for a, b in zip(ordered, ordered[1:], strict=False) if a == b})


def some(names: list[str], most: int = 10) -> str:
    """Return up to ``most`` of ``names`` for a message, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
