"""Byte ranges of local files and of URLs, read without a shared file position, so that any process may read.

URLs (s3://, gs://, https://, ...) are read through fsspec, which needs a package of its own for most schemes.
"""

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import BinaryIO

from volo.runtime.files import open_regular, refuse_special

_OPEN_FILES = 64  # per process; thousands of shards would exceed the system's limit
_TRIES = 4  # per range of a URL, so that a run survives a server's restart
# fsspec's file systems use these names for the tag of a file's content or the time of its last change.
_TAGS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "mtime", "Last-Modified", "LastModified", "last_modified"),
    *("updated", "created"),
)
_REMOTE_BLOCK = 1 << 22  # bytes per request while an archive is indexed


def is_url(path: str) -> bool:
    """Return whether ``path`` is a URL rather than a local path; file:// counts as local."""
    return "://" in path and not path.startswith("file://")


def file_system(url: str):
    """Return fsspec's file system of ``url`` and the path in it; ValueError if a package is missing."""
    try:
        import fsspec

        return fsspec.url_to_fs(url)
    except ImportError as error:
        scheme = url.split("://")[0]
        package = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
        raise ValueError(
            f"{url} needs a package that is not installed ({error}): pip install {package.get(scheme, 'fsspec')}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url} has a scheme that cannot be read ({error})") from error


def open_url(url: str) -> BinaryIO:
    """Open a file for reading from front to back, with seeks; raises OSError."""
    if is_url(url):
        system, path = file_system(url)
        return system.open(path, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
    # Only the 512-byte headers between the images are read: a large buffer would read the images too.
    return open(url, "rb", buffering=8192, opener=open_regular)


def fingerprint(url: str) -> str:
    """Return the size of a file, and its time of change or a tag of its content: what differs once it changes.

    Raises OSError if there is no such file, or if it is a pipe or a device.
    """
    if not is_url(url):
        status = os.stat(url)
        refuse_special(status)
        return _fingerprint_of(status)
    system, path = file_system(url)
    with _as_os_error():
        info = system.info(path)
    return f"{info.get('size')} {next((info[tag] for tag in _TAGS if info.get(tag)), '')}"


def shows_changes(known: str) -> bool:
    """Return whether a :func:`fingerprint` has more than a size, which may survive a change."""
    return known.partition(" ")[2] != ""


def _size_in(known: str) -> str:
    return known.partition(" ")[0]


def _fingerprint_of(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


class RangeReader:
    """Reads ranges of files; each process opens them for itself, also after a fork.

    A local file is compared with its fingerprint when it is opened. A reader may be unpickled on another machine, where
    the same path is a copy with another time of change: if the size is the same, the reader adopts the copy's
    fingerprint.

    Args:
        urls: Local paths or URLs.
        fingerprints: :func:`fingerprint` of each at the time of indexing.
    """

    def __init__(self, urls: Sequence[str], fingerprints: Sequence[str]):
        self.urls = list(urls)
        self.fingerprints = list(fingerprints)
        self._forget()

    def __getstate__(self) -> dict:
        return {"urls": self.urls, "fingerprints": self.fingerprints}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)
        for number, url in enumerate(self.urls):
            with contextlib.suppress(OSError):  # reported when it is read
                if not is_url(url) and _size_in(here := fingerprint(url)) == _size_in(self.fingerprints[number]):
                    self.fingerprints[number] = here

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of file ``number``, starting at ``offset``; raises OSError with one line of text."""
        if os.getpid() != self._process:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._forget()
        if size == 0:
            return b""
        read = self._read_url if is_url(self.urls[number]) else self._read_file
        data = read(number, offset, size)
        if len(data) != size:
            raise OSError(
                f"got {len(data):,} of {size:,} bytes: the file is truncated, or the server does not support ranges"
            )
        return data

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()

    def _read_file(self, number: int, offset: int, size: int) -> bytes:
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = open_regular(self.urls[number])
            here, known = _fingerprint_of(os.fstat(descriptor)), self.fingerprints[number]
            if here != known:
                os.close(descriptor)
                sizes = [f"{int(_size_in(one)):,}" for one in (here, known)]
                detail = "" if sizes[0] == sizes[1] else f", or this copy is incomplete: {sizes[0]} of {sizes[1]} bytes"
                raise OSError(f"the archive has changed since it was indexed{detail}. Start again to index it again")
            self._open[number] = descriptor
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return os.pread(descriptor, size, offset)

    def _read_url(self, number: int, offset: int, size: int) -> bytes:
        system, path = file_system(self.urls[number])  # fsspec caches one per process
        for tries_left in reversed(range(_TRIES)):
            try:
                with _as_os_error():
                    return system.cat_file(path, start=offset, end=offset + size)
            except FileNotFoundError:
                raise
            except OSError:
                if not tries_left:
                    raise
                time.sleep(2 ** (_TRIES - tries_left))
        raise AssertionError("not reached")


@contextlib.contextmanager
def _as_os_error():
    """Turn any error of an object store's client into an OSError of one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # aiohttp, botocore and others have exceptions of their own
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
