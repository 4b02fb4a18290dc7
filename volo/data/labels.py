"""Labels of images that no class folder tells: a labels file, or the development kit of ILSVRC2012."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from volo.data.devkit import is_devkit, validation_synsets


def read_labels(names: Sequence[str], labels_file: str, place: str, classes: tuple[str, ...]) -> np.ndarray:
    """Return the class index of each of ``names``, int64 [N].

    Args:
        names: The images.
        labels_file: A text file of one line an image: "file-name label", or only "label", for the files in sorted
            order. Labels are class names throughout or 0-based class indices throughout. Or the development kit,
            ILSVRC2012_devkit_t12.tar.gz or the folder unpacked from it, for the official validation files. The ids of
            its ILSVRC2012_validation_ground_truth.txt by themselves (1-based, in an order of their own) are neither,
            and are refused.
        place: What holds the images, for messages.
        classes: Class names in index order.

    Raises:
        ValueError: No such file, or lines that do not match the files or the classes.
    """
    if is_devkit(labels_file):
        return _parse(validation_synsets(names, labels_file), classes, labels_file)
    if not os.path.isfile(labels_file):
        raise ValueError(f"data.val_labels is {labels_file!r}, which is not a file")
    return _parse(_by_file(names, lines_of(labels_file), place, labels_file), classes, labels_file)


def _by_file(names: Sequence[str], lines: list[str], place: str, labels_file: str) -> list[str]:
    """Return the label text of each of ``names`` from lines of either form."""
    known = set(names)
    pairs = [line.split(maxsplit=1) for line in lines]
    if not any(pair[0] in known for pair in pairs):
        if len(lines) != len(names):
            raise ValueError(
                f"{labels_file} has {len(lines)} labels, but {place} has {len(names)} images; give one label an "
                'image in the order of the sorted file names, or lines of the form "file-name label"'
            )
        return lines

    stray = [pair[0] for pair in pairs if pair[0] not in known or len(pair) == 1]
    by_name = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    missing = [name for name in names if name not in by_name]
    if stray or missing or len(by_name) != len(pairs):
        problems = {
            "lines without a label or file": stray,
            "images without a line": missing,
            "files with several lines": [] if stray or missing else repeated([pair[0] for pair in pairs]),
        }
        told = "; ".join(f"{what}: {some(which)}" for what, which in problems.items() if which)
        raise ValueError(f"{labels_file} does not match {place}: {told}")
    return [by_name[name] for name in names]


def _parse(texts: list[str], classes: tuple[str, ...], labels_file: str) -> np.ndarray:
    """Turn label texts into class indices: all of them names, or all of them 0-based indices."""
    distinct, which = np.unique(np.array(texts, dtype=object), return_inverse=True)
    return class_indices(distinct.tolist(), classes, labels_file)[which]


def class_indices(texts: list[str], classes: tuple[str, ...], place: str) -> np.ndarray:
    """Return the class index, int64, of label texts: all of them names, or all of them 0-based indices.

    Where the names are numbers themselves ("0", "1", "2", "4"), so are texts: 3 is no class, not the one at index 3.

    Raises ValueError, beginning with ``place``, where they are neither.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    if all(text in index_of for text in texts):
        return np.array([index_of[text] for text in texts], dtype=np.int64)
    if all(map(is_number, classes)):
        wrong = sorted({text for text in texts if text not in index_of})
        raise ValueError(
            f"{place}: labels that are none of the {len(classes)} classes, whose names are numbers ({classes[0]} ... "
            f"{classes[-1]}): {some(wrong)}. Name all classes, in index order, in a file for data.class_list"
        )
    if all(is_number(text) and int(text) < len(classes) for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    by_number = all(map(is_number, texts))
    wrong = [t for t in texts if t not in index_of and not (by_number and int(t) < len(classes))]
    hint = ""
    if by_number:
        hint = (
            " Indices start at 0; the ids of ILSVRC2012_validation_ground_truth.txt start at 1 and follow an order "
            "of their own, so they cannot be used: write synset names instead, or give the development kit"
        )
    raise ValueError(
        f"{place}: labels that are neither class names (such as {classes[0]!r}) nor indices below "
        f"{len(classes)}: {some(sorted(set(wrong)))}.{hint}"
    )


def lines_of(path: str) -> list[str]:
    """Return the lines of a text file that hold anything, stripped; ValueError where it is no text."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error


def is_number(text: str) -> bool:
    """Tell whether ``text`` is a whole number of decimal digits."""
    return text.isascii() and text.isdigit()


def repeated(names: Iterable[str]) -> list[str]:
    """Return what stands more than once in ``names``, sorted."""
    ordered = sorted(names)
    return sorted({a for a, b in zip(ordered, ordered[1:], strict=False) if a == b})


def some(names: list[str], most: int = 10) -> str:
    """Return up to ``most`` of ``names`` for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
