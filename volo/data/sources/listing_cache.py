"""Listings that are kept: what is in a folder of a million files, or in archives, without looking again.

A manifest is one .npz file (every array under a checksum of its own) in a cache folder, named after what it lists.
Whether it still holds is for its reader to say, from the cheap evidence kept in it: times of folders, sizes of
archives. Where that evidence is there before the manifest is read, it is part of the name, so that several states of
a place (copies on several machines that share a cache folder) have a manifest each.
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

from volo.runtime.files import write_atomic

_logger = logging.getLogger("volo")

Arrays = dict[str, np.ndarray]

VERSION = 2
# What changes a file system's clock may not tell apart: the times of ext3, of some NFS servers.
_TICK_SECONDS = 2
_UNUSED_SECONDS = 30 * 24 * 3600  # after which the manifest of another state of a place is removed


class ListingCache:
    """The kept listings of a cache folder.

    Args:
        folder: Where they are; None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = Path(folder).expanduser() if folder is not None else None

    @classmethod
    def of(cls, cache: str) -> "ListingCache":
        """Return those of option ``data.cache``: "auto" (the user's cache folder), "none" or a folder."""
        if cache == "auto":
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "volo")
        return cls(None if cache == "none" else cache)

    def get(
        self,
        kind: str,
        place: str,
        build: Callable[[], Arrays],
        is_fresh: Callable[[Arrays], bool],
        changed_at: Callable[[Arrays], float] = lambda arrays: 0.0,
        state: str = "",
    ) -> Arrays:
        """Return the listing of ``place``: the one that was kept, or a new one, which is kept.

        Args:
            kind: What sort of listing it is; the other functions know the arrays of that sort.
            place: What is listed, told so that it means the same from any folder.
            build: Lists it.
            is_fresh: Whether a kept listing still holds.
            changed_at: When the place was last changed, in seconds since 1970; where that was a moment ago, the same
                times may stand for other files by now, and the listing is not kept.
            state: Which of several states of the place it is, each of which is kept; "" where the last one is.
        """
        path = self._path(kind, place, state)
        if path is not None:
            kept = _read(path, kind, place)
            if kept is not None:
                if is_fresh(kept):
                    _mark_used(path)
                    return kept
                _logger.info("%s has changed since it was listed: it is listed again", place)
        begin = time.time()
        arrays = build()
        changed = changed_at(arrays)
        if path is not None and changed > begin + _TICK_SECONDS:
            _logger.warning(
                "%s was last changed %.0f s from now, by the clock of its file system: while that lies in the future "
                "its listing is not kept, and made in every run",
                *(place, changed - begin),
            )
        if path is not None and changed < begin - _TICK_SECONDS:
            _write(path, kind, place, arrays)
            if state:
                _remove_unused(path)
            if time.time() - begin > 10:
                _logger.info("%s: listed in %.0f s; %s keeps that", place, time.time() - begin, path)
        return arrays

    def _path(self, kind: str, place: str, state: str) -> Path | None:
        if self.folder is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", place)[-40:].strip("-")
        digest = hashlib.sha256(f"{kind}\n{place}".encode("utf-8", "surrogateescape")).hexdigest()
        of_state = f"-{hashlib.sha256(state.encode()).hexdigest()[:16]}" if state else ""
        return self.folder / f"{name}-{digest[:16]}{of_state}.npz"


def _about(kind: str, place: str) -> str:
    return json.dumps({"format": "volo listing", "version": VERSION, "kind": kind, "place": place})


def _read(path: Path, kind: str, place: str) -> Arrays | None:
    """Return the arrays of a manifest; None, after a line where it should have been one, where it is not."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("about")) == _about(kind, place):
            return arrays
        problem = "is of another version, or lists something else"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        problem = f"cannot be read ({type(error).__name__})"
    _logger.warning("the kept listing %s %s: it is made anew", path, problem)
    return None


def _write(path: Path, kind: str, place: str, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez(content, about=np.array(_about(kind, place)), **arrays)
    try:
        write_atomic(path, content.getvalue())
    except OSError as error:
        _logger.warning(
            "the listing of %s cannot be kept in %s (%s), so it is made in every run; name another folder with "
            'data.cache, or "none"',
            *(place, path.parent, error.strerror),
        )


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # the cache folder may be another user's
        os.utime(path)


def _remove_unused(path: Path) -> None:
    """Remove listings of other states of the place of ``path`` that no run has used for a month."""
    begin = path.name.rpartition("-")[0]
    for other in path.parent.glob(f"{glob.escape(begin)}-*.npz"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                other.unlink()
