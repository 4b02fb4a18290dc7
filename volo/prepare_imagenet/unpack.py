"""From archives to one folder a class: OUTPUT/train/<synset>/*.JPEG and OUTPUT/val/<synset>/*.JPEG.

A class is written into a hidden folder, which gets its name when the class is whole; so a run that is interrupted
leaves whole classes, and the next one goes on with the others.
"""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from volo.data.sources.records import ImageRecords
from volo.prepare_imagenet.official import ImageNetFiles
from volo.reporting import ProgressBar
from volo.runtime.files import sync_folder
from volo.runtime.program import DONE, checking_usage

_THREADS = 16

_logger = logging.getLogger("volo")


def run_unpack(source: ImageNetFiles, output: str) -> int:
    """Unpack every split, and count; return the exit code."""
    with checking_usage():
        splits = source.open()
        for split, records in splits.items():
            require_ours(Path(output, split), records)
        source.check({split: len(records) for split, records in splits.items()})
    for split, records in splits.items():
        unpack(records, Path(output, split))
    counts = {split: sum(1 for _ in Path(output, split).glob("*/*")) for split in splits}
    _logger.info("%s: %s", output, source.check(counts))
    return DONE


def require_ours(folder: Path, records: ImageRecords) -> None:
    """Raise ValueError where ``folder`` holds what unpacking does not put there."""
    if not folder.exists():
        return
    others = [entry.name for entry in folder.iterdir() if entry.name.removeprefix(".") not in records.classes]
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, which is no class of these images; name another --output, or move it away"
        )


def unpack(records: ImageRecords, folder: Path) -> None:
    """Write the images into ``folder``; classes that are there, with as many files, are kept.

    Raises ValueError where a folder has another number of files.
    """
    bar = ProgressBar(len(records), f"unpacking {folder}", log_every=max(len(records) // 20, 1))
    for label, name in enumerate(records.classes):
        mine = np.flatnonzero(records.labels == label)
        whole = folder / name
        if not len(mine):
            continue
        if whole.exists():
            found = len(os.listdir(whole))
            if found != len(mine):
                raise ValueError(f"{whole} has {found:,} files and should have {len(mine):,}; remove it and run again")
        else:
            _write_class(records, mine, folder / f".{name}", whole)
        bar.update(len(mine))
    bar.close()


def _write_class(records: ImageRecords, indices: np.ndarray, partial: Path, whole: Path) -> None:
    """Write the images of a class; its folder gets its name when they, and their names, are on the disk."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    paths = [partial / os.path.basename(records.name(index)) for index in indices.tolist()]
    if len(set(paths)) != len(paths):
        raise ValueError(f"images of {whole.name} have the same name; they cannot lie in one folder")
    with ThreadPoolExecutor(_THREADS) as pool:  # one after the other would wait for the disk each time
        for begin in range(0, len(paths), 4 * _THREADS):  # their contents are held at once
            some = slice(begin, begin + 4 * _THREADS)
            list(pool.map(_write, paths[some], map(records.read, indices[some].tolist())))
    sync_folder(partial)
    os.replace(partial, whole)
    sync_folder(whole.parent)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
