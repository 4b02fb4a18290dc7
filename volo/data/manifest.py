"""Listings that are kept: what is in a folder of a million files, or in archives, without looking again.

A manifest is one .npz file (every array under a checksum of its own) in a cache folder, named after what it lists.
Whether it still holds is for its reader to say, from the cheap evidence kept in it: times of folders, sizes of
archives.
"""

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

from volo.reporting.files import write_atomic

_logger = logging.getLogger("volo")

Arrays = dict[str, np.ndarray]

VERSION = 1
# What changes a file system's clock may not tell apart: the times of ext3, of some NFS servers.
_TICK_SECONDS = 2


class Manifests:
    """The kept listings of a cache folder.

    Args:
        folder: Where they are; None keeps nothing.
        relist: List everything anew, and keep that.
    """

    def __init__(self, folder: str | os.PathLike | None, relist: bool = False):
        self.folder = Path(folder).expanduser() if folder is not None else None
        self.relist = relist

    @classmethod
    def of(cls, cache: str, relist: bool = False) -> "Manifests":
        """Return those of option ``data.cache``: "auto" (the user's cache folder), "none" or a folder."""
        if cache == "auto":
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "volo", relist)
        return cls(None if cache == "none" else cache, relist)

    def get(
        self,
        kind: str,
        place: str,
        build: Callable[[], Arrays],
        is_fresh: Callable[[Arrays], bool],
        changed_at: Callable[[Arrays], float] = lambda arrays: 0.0,
    ) -> Arrays:
        """Return the listing of ``place``: the one that was kept, or a new one, which is kept.

        Args:
            kind: What sort of listing it is; the other functions know the arrays of that sort.
            place: What is listed, told so that it means the same from any folder.
            build: Lists it.
            is_fresh: Whether a kept listing still holds.
            changed_at: When the place was last changed, in seconds since 1970; where that was a moment ago, the same
                times may stand for other files by now, and the listing is not kept.
        """
        path = self._path(kind, place)
        if path is not None and not self.relist:
            kept = _read(path, kind, place)
            if kept is not None:
                if is_fresh(kept):
                    return kept
                _logger.info("%s has changed since it was listed: it is listed again", place)
        begin = time.time()
        arrays = build()
        if path is not None and changed_at(arrays) < begin - _TICK_SECONDS:
            _write(path, kind, place, arrays)
            if time.time() - begin > 10:
                _logger.info("%s: listed in %.0f s; %s keeps that", place, time.time() - begin, path)
        return arrays

    def _path(self, kind: str, place: str) -> Path | None:
        if self.folder is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", place)[-40:].strip("-")
        digest = hashlib.sha256(f"{kind}\n{place}".encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{name}-{digest[:16]}.npz"


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
