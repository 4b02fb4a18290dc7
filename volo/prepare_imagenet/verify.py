"""Comparing the official archives with their published checksums."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from volo.data.sources.listing_cache import ListingCache
from volo.data.sources.ranges import stamp
from volo.prepare_imagenet.official import MD5
from volo.reporting import ProgressBar
from volo.runtime.program import DONE, FAILED, checking_usage

_logger = logging.getLogger("volo")
_CHUNK = 1 << 24


def run_verify(folder: str, given: dict[str, str], cache: str) -> int:
    """Compare every official archive in ``folder``, and every file of ``given`` (name: MD5); return the exit code.

    What was computed is kept until the file changes, so that an interrupted run goes on with the next archive.
    """
    listing_cache = ListingCache.of(cache)
    with checking_usage():
        files = files_to_verify(folder, given)
    wrong = []
    for path, expected in files.items():
        found = md5_of(path, listing_cache)
        _logger.info("%s  %s  %s", "as published" if found == expected else "DIFFERS     ", found, path)
        if found != expected:
            wrong.append(f"{path.name} (MD5 {found}, expected {expected})")
    if wrong:
        raise ValueError(f"not what was published, or not whole, in {folder}: {'; '.join(wrong)}. Fetch it again")
    missing = [name for name in MD5 if not (Path(folder) / name).exists()]
    _logger.info("%d files are whole%s", len(files), f"; not there: {', '.join(missing)}" if missing else "")
    return DONE if files else FAILED


def files_to_verify(folder: str, given: dict[str, str]) -> dict[Path, str]:
    """Return the MD5 that each file is to have; ValueError where there is nothing to verify."""
    if not os.path.isdir(folder):
        raise ValueError(f"--source is {folder!r}, which is not a folder")
    official = {Path(folder) / name: md5 for name, md5 in MD5.items() if (Path(folder) / name).is_file()}
    for name, md5 in given.items():
        if not (Path(folder) / name).is_file():
            raise ValueError(f"--md5 names {name}, which is not a file in {folder}")
        official[Path(folder) / name] = md5.lower()
    if not official:
        raise ValueError(f"{folder} holds none of {', '.join(MD5)}; name other files with --md5 NAME=MD5")
    return official


def md5_of(path: Path, listing_cache: ListingCache) -> str:
    """Return the MD5 of a file, in hexadecimal."""

    def build() -> dict[str, np.ndarray]:
        size, before = path.stat().st_size, stamp(str(path))
        md5 = hashlib.md5(usedforsecurity=False)
        steps = -(-size // _CHUNK)
        bar = ProgressBar(steps, path.name, log_every=max(steps // 10, 1), delay=10)
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                md5.update(chunk)
                bar.update(1)
        bar.close()
        return {"md5": np.array(md5.hexdigest()), "stamp": np.array(before)}

    kept = listing_cache.get(
        "md5",
        os.path.abspath(path),
        build,
        lambda kept: str(kept["stamp"]) == stamp(str(path)),
        lambda _: path.stat().st_mtime,
    )
    return str(kept["md5"])
