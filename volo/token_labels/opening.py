"""Opening token labels of either layout, and checking that they belong to a data set. n images."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volo.token_labels.pt_folder import PublishedLabels
from volo.token_labels.store import FILES, HEADER, TokenLabelStore


def open_labels(path: str | os.PathLike) -> TokenLabelStore | PublishedLabels:
    """Open a packed store, or a folder in the published layout, whichever ``path`` is.

    Raises:
        ValueError: Neither of them, or an incomplete store.
    """
    if any((Path(path) / name).exists() for name in (HEADER, *FILES)):
        return TokenLabelStore(path)
    return PublishedLabels(path)


def match_images(
    labels: TokenLabelStore | PublishedLabels, keys: Sequence[str], num_classes: int, classes: tuple[str, ...] | None
) -> np.ndarray:
    """Return the entry of each image, int64 [n], after checking that the labels belong to the images.

    Published labels do not say how many classes their teacher had; from now on reading them refuses class indices of
    ``num_classes`` and above.

    Args:
        labels: The labels.
        keys: :func:`volo.token_labels.store.label_key` of each image.
        num_classes: Classes of the data set.
        classes: Their names in index order; None if unknown.

    Raises:
        ValueError: Another number or order of classes, images without a label, or images that share a key.
    """
    header = labels.header
    if header.num_classes is None:
        assert isinstance(labels, PublishedLabels)
        labels.expect_classes(num_classes)
    elif header.num_classes != num_classes:
        raise ValueError(
            f"{labels.path}: the teacher {header.teacher} had {header.num_classes:,} classes, but the data set has "
            f"{num_classes:,}; generate labels with a teacher of these classes"
        )
    if header.classes is not None and classes is not None and header.classes != tuple(classes):
        index = next(i for i, (a, b) in enumerate(zip(header.classes, classes, strict=True)) if a != b)
        raise ValueError(
            f"{labels.path}: the teacher {header.teacher} had other classes or another order: its class {index} is "
            f"{header.classes[index]!r}, but {classes[index]!r} in the data set. Give the teacher's class list "
            "(data.class_list), or generate labels with a teacher of these classes"
        )
    if len(set(keys)) != len(keys):
        repeated = sorted(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(
            f"{len(repeated)} names belong to several images that differ only in the suffix, so they would share a "
            f"label: {_some(repeated)}. Rename all but one, and generate labels again"
        )
    entries = labels.find(keys)
    missing = np.flatnonzero(entries < 0)
    if len(missing):
        raise ValueError(
            f"{labels.path} has no label for {len(missing):,} of {len(keys):,} images: "
            f"{_some([keys[i] for i in missing.tolist()])}. Its labels have names like {labels.key(0)!r}, so it may "
            "belong to other images. Give the labels of these images, or generate them with "
            "scripts/generate_token_labels.py"
        )
    return entries


def check_orientation(labels: TokenLabelStore | PublishedLabels, exif: str) -> None:
    """Raise ValueError if the teacher saw images in another orientation than training will.

    Args:
        exif: "ignore" or "apply", what the training does with orientation tags.
    """
    made = labels.header.exif
    if made == exif:
        return
    remedy = f"Set --data.exif {made}, or generate labels with --exif {exif}"
    if isinstance(labels, PublishedLabels):
        remedy = (
            "Set --data.exif ignore. If the teacher of this folder did apply orientation tags, which the published "
            "layout cannot say, pack it with scripts/pack_token_labels.py --exif apply"
        )
    raise ValueError(
        f"{labels.path}: the teacher saw images with exif {made!r}, but data.exif is {exif!r}, so images with an "
        f"orientation tag would be turned against their labels. {remedy}"
    )


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
