"""From archives to one folder per class: OUTPUT/train/<synset>/*.JPEG and OUTPUT/val/<synset>/*.JPEG.

A class is written into a hidden folder, which is renamed when the class is complete. So an interrupted run leaves
complete classes, and the next one continues with the others.
"""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from volo.data.sources.records import ImageRecords
from volo.prepare_imagenet.official import check_counts, open_splits
from volo.prepare_imagenet.options import UnpackOptions
from volo.reporting import ProgressBar
from volo.runtime.files import path_below, rename_folder, require_below
from volo.runtime.program import DONE, checking_usage

_THREADS = 16

_logger = logging.getLogger("volo")


def run_unpack(options: UnpackOptions) -> int:
    """Unpack every split and check the counts; return the exit code."""
    output = Path(options.output)
    with checking_usage():
        splits = open_splits(options)
        for split, records in splits.items():
            require_folder_names(records)
            require_only_classes(output / split, records)
        check_counts(options, {split: len(records) for split, records in splits.items()})
    for split, records in splits.items():
        unpack(records, output / split)
    counts = {split: sum(1 for _ in (output / split).glob("*/*")) for split in splits}
    _logger.info("%s: %s", output, check_counts(options, counts))
    return DONE


def require_folder_names(records: ImageRecords) -> None:
    """Raise ValueError if a class has a name that cannot be that of a visible folder in the output."""
    for label, index in zip(*np.unique(records.labels, return_index=True), strict=True):
        name, source = records.classes[label], records.location(index)
        require_below(name, source)
        if name.startswith(".") or "/" in name:
            raise ValueError(
                f"{source} has the class {name!r}, which cannot be the name of a visible folder. Rename the class there"
            )


def require_only_classes(folder: Path, records: ImageRecords) -> None:
    """Raise ValueError if ``folder`` holds anything that unpacking does not put there."""
    if not folder.exists():
        return
    others = [entry.name for entry in folder.iterdir() if entry.name.removeprefix(".") not in records.classes]
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, which is not a class of these images; name another --output, or move it away"
        )


def unpack(records: ImageRecords, folder: Path) -> None:
    """Write the images into ``folder``, except for classes that are complete already.

    Raises ValueError if an existing class folder has another number of files.
    """
    bar = ProgressBar(len(records), f"unpacking {folder}", log_every=max(len(records) // 20, 1))
    for label, name in enumerate(records.classes):
        indices = np.flatnonzero(records.labels == label)
        complete = Path(path_below(folder, name, str(folder)))
        if not len(indices):
            continue
        if complete.exists():
            found = len(os.listdir(complete))
            if found != len(indices):
                raise ValueError(
                    f"{complete} has {found:,} files and should have {len(indices):,}; remove it and run again"
                )
        else:
            _write_class(records, indices, folder / f".{name}", complete)
        bar.update(len(indices))
    bar.close()


def _write_class(records: ImageRecords, indices: np.ndarray, partial: Path, complete: Path) -> None:
    """Write the images of a class; its folder gets its name when all files and their names are on disk."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    paths = [
        Path(path_below(partial, os.path.basename(records.name(index)), records.location(index)))
        for index in indices.tolist()
    ]
    if len(set(paths)) != len(paths):
        raise ValueError(f"images of {complete.name} have the same name, so one folder cannot hold them")
    with ThreadPoolExecutor(_THREADS) as pool:  # a single thread would wait for the disk after every file
        for begin in range(0, len(paths), 4 * _THREADS):  # the contents of one round are in memory at once
            some = slice(begin, begin + 4 * _THREADS)
            list(pool.map(_write, paths[some], map(records.read, indices[some].tolist())))
    rename_folder(partial, complete)


def _write(path: Path, content: bytes) -> None:
    """Write a file of a folder that is still partial, and bring it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
