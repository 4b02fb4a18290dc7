"""Byte ranges of local files and of URLs, read without a shared position: safe in any number of processes.

An object store (s3://, gs://, https://, ...) is spoken to through fsspec, which asks for a package of its own for most
kinds of URL.
"""

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import BinaryIO

_OPEN_FILES = 64  # a process; with thousands of shards the limit of the system would be met
_TRIES = 4  # of one range of a URL; a run of days should outlive a server that restarts
# What file systems of fsspec call the tag of a file's content, or the time of its last change.
_TAGS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "mtime", "Last-Modified", "LastModified", "last_modified"),
    *("updated", "created"),
)
_REMOTE_BLOCK = 1 << 22  # bytes fetched at once while an archive is gone through


def is_url(path: str) -> bool:
    """Tell whether ``path`` is a URL rather than a path of a local file."""
    return "://" in path and not path.startswith("file://")


def file_system(url: str):
    """Return fsspec's file system of ``url``, and the path in there; ValueError where a package is missing."""
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
        raise ValueError(f"{url} is of a kind that cannot be read ({error})") from error


def open_url(url: str) -> BinaryIO:
    """Open a file to be gone through from front to back, with seeks; OSError where that cannot be."""
    if is_url(url):
        system, path = file_system(url)
        return system.open(path, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
    # Headers of 512 bytes are read, with images between them: a large buffer would read the images too.
    return open(url, "rb", buffering=8192)


def stamp(url: str) -> str:
    """Return what tells whether a file is still the same: its size, and when it was changed or a tag of its content.

    Raises OSError where it is not there.
    """
    if not is_url(url):
        return _stamp_of(os.stat(url))
    system, path = file_system(url)
    with _as_os_error():
        info = system.info(path)
    return f"{info.get('size')} {next((info[tag] for tag in _TAGS if info.get(tag)), '')}"


def tells_changes(known: str) -> bool:
    """Tell whether a :func:`stamp` has more than a size, which a file that changes may keep."""
    return known.partition(" ")[2] != ""


def _size_in(known: str) -> str:
    return known.partition(" ")[0]


def _stamp_of(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


class RangeReader:
    """Reads ranges of files; every process opens its own, also after a fork.

    Local files are compared on opening with what they were when the reader was made. Unpickled, it may be on another
    machine, where the same path is a copy with a time of its own: there a file must have the size that it had where
    the ranges were found, and is compared with what it is at that moment from then on.

    Args:
        urls: Local paths or URLs.
        stamps: :func:`stamp` of each, as it was when the ranges were found.
    """

    def __init__(self, urls: Sequence[str], stamps: Sequence[str]):
        self.urls = list(urls)
        self.stamps = list(stamps)
        self._forget()

    def __getstate__(self) -> dict:
        return {"urls": self.urls, "stamps": self.stamps}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)
        for number, url in enumerate(self.urls):
            with contextlib.suppress(OSError):  # reading it names what is missing
                if not is_url(url) and _size_in(here := stamp(url)) == _size_in(self.stamps[number]):
                    self.stamps[number] = here

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of file ``number``, from ``offset`` on.

        Raises OSError, with one line of text, where that cannot be.
        """
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
                f"{len(data):,} of {size:,} bytes came; the file was cut short, or the server gives no ranges"
            )
        return data

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()

    def _read_file(self, number: int, offset: int, size: int) -> bytes:
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = os.open(self.urls[number], os.O_RDONLY)
            here, known = _stamp_of(os.fstat(descriptor)), self.stamps[number]
            if here != known:
                os.close(descriptor)  # kept, it would be read the next time
                sizes = [f"{int(_size_in(one)):,}" for one in (here, known)]
                told = "" if sizes[0] == sizes[1] else f" (or is no whole copy here: {sizes[0]} bytes, not {sizes[1]})"
                raise OSError(
                    f"the archive has changed since it was indexed{told}; start again, and it will be indexed anew"
                )
            self._open[number] = descriptor
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return os.pread(descriptor, size, offset)

    def _read_url(self, number: int, offset: int, size: int) -> bytes:
        system, path = file_system(self.urls[number])  # fsspec keeps one a process
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
    """Turn whatever a client of an object store raises into an OSError of one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # aiohttp, botocore and others have hierarchies of their own
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
