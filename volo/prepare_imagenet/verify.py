"""Comparing the official archives with their published checksums."""

import contextlib
import hashlib
import io
import logging
from pathlib import Path

from torchvision.datasets.imagenet import ARCHIVE_META

from volo.reporting import ProgressBar
from volo.runtime.program import DONE, UsageError

_logger = logging.getLogger("volo")


def run_verify(folder: str) -> int:
    """Compare every official archive in ``folder`` with its checksum; return the exit code.

    Raises:
        UsageError: ``folder`` holds none of the archives.
        ValueError: An archive differs from the published one.
    """
    published = {Path(folder) / name: md5 for name, md5 in ARCHIVE_META.values()}
    found = [path for path in published if path.is_file()]
    missing = [path.name for path in published if path not in found]
    if not found:
        raise UsageError(f"--source {folder} is not a folder with any of {', '.join(missing)}")
    wrong = []
    for path in found:
        md5 = md5_of(path)
        _logger.info("%s  %s  %s", "as published" if md5 == published[path] else "DIFFERS     ", md5, path)
        if md5 != published[path]:
            wrong.append(f"{path.name} (MD5 {md5}, published {published[path]})")
    if wrong:
        raise ValueError(f"damaged or incomplete in {folder}: {'; '.join(wrong)}. Download again")
    _logger.info("%d archives are intact%s", len(found), f"; missing: {', '.join(missing)}" if missing else "")
    return DONE


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, in hexadecimal, and show progress while it is read."""
    size = path.stat().st_size
    bar = ProgressBar(size, path.name, log_every=max(size // 10, 1), delay=10)
    with contextlib.closing(bar), _ReportingFile(path, bar) as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class _ReportingFile(io.FileIO):
    """A file that reports reads to a bar; file_digest calls ``readinto``, which tqdm's own wrapper lacks."""

    def __init__(self, path: Path, bar: ProgressBar):
        super().__init__(path)
        self._bar = bar

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._bar.update(count)
        return count
