"""Files that are written completely or not at all; folders with one writer; and paths from foreign names.

A name that stands in a file (an archive's member, a class, a row) is the word of whoever made the file. Before it
becomes a path, :func:`path_below` refuses what leads elsewhere. Links that a user puts into a folder are followed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_logger = logging.getLogger("volo")


def require_below(name: str, source: str) -> None:
    """Raise ValueError unless ``name`` is a relative path that names something below any folder it is put into.

    Args:
        name: A name with forward slashes, as it stands in a file.
        source: That file, which begins the message.
    """
    parts = name.split("/")
    if parts[0] == "" or parts[-1] in ("", ".") or ".." in parts or "\0" in name:
        raise ValueError(
            f"{source} has the name {name!r}, which may lead out of its folder. Names are relative paths of files, "
            "without '..': rename it there"
        )


def path_below(root: str | os.PathLike, name: str, source: str) -> str:
    """Return the path of ``name`` in the folder ``root``; ValueError as in :func:`require_below`."""
    require_below(name, source)
    return os.path.join(root, name)


def refuse_special(status: os.stat_result) -> None:
    """Raise OSError for a pipe, a socket or a device: reading it may never end. Folders pass, to fail as such."""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a regular file")


def open_regular(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` and return its descriptor, also as the ``opener`` of :func:`open`; never waits for a pipe.

    Raises OSError as :func:`refuse_special` does.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        refuse_special(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | os.PathLike) -> bytes:
    """Return the content of a file; raises OSError as :func:`open_regular` does."""
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        return file.read()


def user_cache() -> Path | None:
    """Return the user's cache folder, $XDG_CACHE_HOME or ~/.cache; None for a user without a home, as in containers."""
    named = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if named.startswith("~") else Path(named)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk: without it, a new or renamed file may be lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Return a hidden name beside ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` when the block ends; at every moment ``path`` is complete, old or new.

    The temporary file is hidden, beside ``path``, and created exclusively under a unique name, so that it never
    overwrites another process's file or follows a link that a killed process left. If the block raises, it is removed.

    Raises:
        OSError: The folder does not exist, or the disk is full.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text in UTF-8) to ``path`` as :func:`atomic_file` does; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def link_atomic(path: Path, name: Path) -> None:
    """Give the file at ``path`` a second name in the same folder, replacing any file of that name.

    Without hard links it is a copy. Raises OSError if the disk is full; ``name`` is then unchanged.
    """
    temporary = _temporary(name)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic_file(name) as copy:
            shutil.copyfileobj(source, copy)
        return
    try:
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if both names already were one file, too
    sync_folder(name.parent)


def rename_folder(partial: Path, path: Path) -> None:
    """Give a folder its final name, durably, once all files below it are on disk; an empty ``path`` is replaced."""
    sync_folder(partial)
    os.replace(partial, path)
    sync_folder(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of killed writers in ``folder``; no process may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class FolderInUse(Exception):
    """Another process writes to the folder; the message says which."""


def lock_folder(folder: Path) -> BinaryIO:
    """Keep other processes out of ``folder`` until the returned file is closed or the process ends, however it ends.

    The lock is one of POSIX: forked processes do not inherit it, and network file systems pass it on to other machines.
    If the file system has no locks, a warning says so.

    Raises:
        FolderInUse: Another process holds the lock.
        OSError: The folder cannot be written to.
    """
    file = open(folder / ".lock", "a+b")  # noqa: SIM115  # it stays open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _logger.warning("%s: this file system has no locks; see to it that no other run uses the folder", folder)
            return file
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise FolderInUse(holder) from None
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
    file.flush()
    return file
