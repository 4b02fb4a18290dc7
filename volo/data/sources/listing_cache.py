"""Cached listings of folders and archives, so that a million files are not listed in every run.

A cached listing is one .npz file, with a checksum for each array, in the cache folder. Its reader decides whether it is
still fresh from cheap evidence in it, such as the times of folders. Evidence that is known before the file is read
(the fingerprints of archives) is part of its name, so that several states of a location, such as the copies on machines
that share a cache folder, are all kept.
"""

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from volo.runtime.files import user_cache, write_atomic

_logger = logging.getLogger("volo")

Arrays = dict[str, np.ndarray]

_VERSION = 3
_TICK_SECONDS = 2  # resolution of the coarsest clocks: ext3, some NFS servers
_UNUSED_SECONDS = 30 * 24 * 3600  # after which the listing of another state of a location is removed


class ListingCache:
    """Listings in a cache folder.

    Args:
        folder: The cache folder; None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = Path(folder).expanduser() if folder is not None else None

    @classmethod
    def of(cls, cache: str) -> "ListingCache":
        """Return the cache of option ``data.cache``: "auto" (the user's cache folder), "none" or a folder."""
        if cache == "auto":
            user = user_cache()
            if user is None:
                _logger.warning("listings are not cached: this user has no home. Name a folder in data.cache")
            return cls(user and user / "volo")
        return cls(None if cache == "none" else cache)

    def get(
        self,
        kind: str,
        location: str,
        build: Callable[[], Arrays],
        is_fresh: Callable[[Arrays], bool],
        changed_at: Callable[[Arrays], float] = lambda arrays: 0.0,
        state: str = "",
    ) -> Arrays:
        """Return the cached listing of ``location`` if it is fresh, else a new one, which is cached.

        Args:
            kind: Kind of listing, which determines its arrays.
            location: What is listed, independent of the working directory.
            build: Returns a new listing.
            is_fresh: Returns whether a cached listing still holds.
            changed_at: Returns when the location last changed, in seconds since 1970. If that was a moment ago, files
                may still change without changing the times, and the listing is not cached.
            state: Identifies one of several states of the location that are all kept; "" keeps the latest only.
        """
        path = self._path(kind, location, state)
        if path is not None:
            kept = _read(path, kind, location)
            if kept is not None:
                if is_fresh(kept):
                    _mark_used(path)
                    return kept
                _logger.info("%s has changed since it was listed; listing it again", location)
        begin = time.time()
        arrays = build()
        changed = changed_at(arrays)
        if path is not None and changed > begin + _TICK_SECONDS:
            _logger.warning(
                "%s last changed %.0f s in the future, by the clock of its file system. Until then its listing is not "
                "cached and every run lists it again",
                *(location, changed - begin),
            )
        if path is not None and changed < begin - _TICK_SECONDS:
            _write(path, kind, location, arrays)
            if state:
                _remove_unused(path)
            if time.time() - begin > 10:
                _logger.info("%s: listed in %.0f s, cached in %s", location, time.time() - begin, path)
        return arrays

    def _path(self, kind: str, location: str, state: str) -> Path | None:
        if self.folder is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", location)[-40:].strip("-")
        digest = hashlib.sha256(f"{kind}\n{location}".encode("utf-8", "surrogateescape")).hexdigest()
        of_state = f"-{hashlib.sha256(state.encode()).hexdigest()[:16]}" if state else ""
        return self.folder / f"{name}-{digest[:16]}{of_state}.npz"


def _about(kind: str, location: str) -> str:
    return json.dumps({"format": "volo listing", "version": _VERSION, "kind": kind, "location": location})


def _read(path: Path, kind: str, location: str) -> Arrays | None:
    """Return the arrays of a cached listing; None if there is none, and after a warning if it cannot be used."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("about")) == _about(kind, location):
            return arrays
        problem = "has another version or lists something else"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        problem = f"cannot be read ({type(error).__name__})"
    _logger.warning("the cached listing %s %s; listing again", path, problem)
    return None


def _write(path: Path, kind: str, location: str, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez(content, **{**arrays, "about": np.array(_about(kind, location))})  # type: ignore[arg-type]
    try:
        write_atomic(path, content.getvalue())
    except OSError as error:
        _logger.warning(
            "the listing of %s cannot be written to %s (%s), so every run lists it again. Give another folder with "
            'data.cache, or "none"',
            *(location, path.parent, error.strerror),
        )


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # the cache folder may be another user's
        os.utime(path)


def _remove_unused(path: Path) -> None:
    """Remove listings of other states of the location of ``path`` that no run has used for a month."""
    begin = path.name.rpartition("-")[0]
    for other in path.parent.glob(f"{glob.escape(begin)}-*.npz"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                other.unlink()
