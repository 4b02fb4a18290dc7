"""Writing finished blocks in the format asked for: a packed store, or a folder of files in the published layout.

k top scores per cell, h x w cells of a map.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from volo.data.sources.records import ImageRecords
from volo.reporting import ProgressBar
from volo.runtime.files import path_below, rename_folder, require_below
from volo.runtime.signals import StopRequest
from volo.token_labels.generation.label_blocks import BlockFolder
from volo.token_labels.generation.options import GenerateOptions
from volo.token_labels.pt_folder import EXACT_IN_FLOAT16
from volo.token_labels.store import MAX_CLASSES, TokenLabelMap, label_key
from volo.token_labels.writer import StoreWriter


class Stopped(Exception):
    """A signal asked the run to stop."""


@dataclass(frozen=True)
class Totals:
    """The result: images labelled, top-1 and top-5 hits of the teacher among them, and why others were skipped."""

    images: int
    top1_correct: int
    top5_correct: int
    skipped: list[str]


def published_name(path: str) -> str:
    """Return the name that the published code gives to an image's label: the path before its first dot."""
    return path.split(".")[0]


def require_storable(layout: str, records: ImageRecords) -> None:
    """Raise ValueError if two images would share a label's name, one cannot be a file's, or classes are too many."""
    num_classes = len(records.classes)
    if num_classes > MAX_CLASSES:
        raise ValueError(f"--class_list has {num_classes:,} classes; labels are stored for up to {MAX_CLASSES:,}")
    if layout == "published" and num_classes > EXACT_IN_FLOAT16 + 1:
        raise ValueError(
            f"--format published keeps class indices in float16, which is exact up to {EXACT_IN_FLOAT16:,}, but "
            f"there are {num_classes:,} classes; use --format packed"
        )
    name_of = published_name if layout == "published" else label_key
    owner: dict[str, str] = {}
    for index, path in enumerate(records.names):
        if layout == "published":
            require_below(name_of(path), records.location(index))  # it becomes the name of a file
        other = owner.setdefault(name_of(path), path)
        if other != path:
            raise ValueError(
                f"the labels of {other} and {path} would both be called {name_of(path)!r}; rename one of the images"
            )


def write_output(
    options: GenerateOptions, records: ImageRecords, teacher: str, folder: BlockFolder, stop: StopRequest
) -> Totals | None:
    """Write the labels of all blocks to the output, which gets its name when it is complete.

    Returns the totals, or None if ``stop`` was requested meanwhile; then no output is left.

    Raises:
        ValueError: A block is damaged, or no image has a label.
    """
    writer = write_published if options.format == "published" else write_packed
    counts, skipped = np.zeros(3, dtype=np.int64), []
    progress = ProgressBar(len(folder), "writing", log_every=max(len(folder) // 10, 1))

    def labels() -> Iterator[tuple[str, TokenLabelMap]]:
        for number in range(len(folder)):
            if stop.requested:
                raise Stopped
            block = folder.read(number)
            counts[:] += (len(block.labels), *block.correct)
            skipped.extend(block.skipped.values())
            yield from ((records.name(index), label) for index, label in block.labels)
            progress.update(1)
        if not counts[0]:
            raise ValueError(f"all {len(skipped)} images are unreadable, so there is no label. {skipped[0]}")

    with contextlib.closing(progress):
        try:
            writer(options, records, teacher, labels())
        except Stopped:
            return None
    images, top1, top5 = counts.tolist()
    return Totals(images, top1, top5, skipped)


def write_packed(
    options: GenerateOptions, records: ImageRecords, teacher: str, labels: Iterator[tuple[str, TokenLabelMap]]
) -> None:
    """Write (image path, map) as one store."""
    with StoreWriter(
        options.output,
        teacher=teacher,
        covers=options.covers,
        top_k=options.top_k,
        num_classes=len(records.classes),
        classes=records.classes,
        exif=options.exif,
    ) as store:
        for path, label in labels:
            store.add(label_key(path), label)


def write_published(
    options: GenerateOptions, records: ImageRecords, teacher: str, labels: Iterator[tuple[str, TokenLabelMap]]
) -> None:
    """Write (image path, map) as one file per image, float16 [2, k, h, w]: scores, and class indices.

    The folder gets its name when all of it is on disk, because the blocks are removed afterwards.
    """
    output = Path(options.output)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path, label in labels:
            file = Path(path_below(partial, f"{published_name(path)}.pt", options.images))
            file.parent.mkdir(parents=True, exist_ok=True)
            planes = np.stack([label.scores, label.classes.astype(np.float16)])
            torch.save(torch.from_numpy(planes), file)
    except BaseException:
        shutil.rmtree(partial)
        raise
    os.sync()  # once, rather than for each of a million files
    rename_folder(partial, output)
