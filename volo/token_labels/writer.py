"""Writing a packed store: at any moment there is either a complete store under its name, or none.

k top scores per cell, h x w cells of a label map. The files are written into a hidden folder beside the store,
``.<name>.partial``, which is renamed when all of it is on disk.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from volo.runtime.files import rename_folder
from volo.token_labels.store import (
    CHECKSUMS,
    COVERS,
    ENTRY,
    EXIF_MODES,
    FILES,
    FORMAT,
    HEADER,
    MAX_CLASSES,
    VERSION,
    StoreHeader,
    TokenLabelMap,
    check_map,
    encode_key,
    hash_keys,
    is_store,
    map_checksum,
)

_logger = logging.getLogger("volo")


class StoreWriter:
    """Writes one store: add the entries, then close. An exception in the ``with`` block removes what was written.

    Args:
        path: Folder to make.
        teacher, covers, top_k, num_classes, classes, exif: As in :class:`StoreHeader`.
        overwrite: Replace an existing store, once the new one is complete.

    Raises:
        ValueError: ``path`` exists, another process is writing it, or the header is invalid.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        teacher: str,
        covers: str,
        top_k: int,
        num_classes: int,
        classes: tuple[str, ...] | None = None,
        exif: str = "ignore",
        overwrite: bool = False,
    ):
        self.path = Path(path).resolve()
        self._header = StoreHeader(teacher, covers, top_k, num_classes, classes, entries=0, exif=exif)
        _check_header(self._header)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")
        self._lock = self._claim(overwrite)
        self._files = {name: _HashedFile(self._partial / name) for name in (*FILES, CHECKSUMS)}
        self._seen: set[bytes] = set()
        self._keys: list[bytes] = []
        self._values = self._key_bytes = 0  # written so far

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, key: str, label: TokenLabelMap) -> None:
        """Write one more entry.

        Args:
            key: :func:`label_key` of the image.
            label: float16 scores and int16 classes, both [k, h, w].

        Raises:
            ValueError: The key was added before; another k; a class out of range; a score that is NaN or infinite.
        """
        assert key, "the name of an image is not empty"
        assert label.scores.dtype == np.float16 and label.classes.dtype == np.int16, "dtypes as TokenLabelMap says"
        check_map(label, self._header.top_k, self._header.num_classes, f"label of {key!r}")
        encoded = encode_key(key)
        if encoded in self._seen:
            raise ValueError(
                f"label of {key!r}: there is one already. Images of one folder need names that differ in more than "
                "the suffix: rename one of them and generate its label again"
            )
        self._seen.add(encoded)
        self._keys.append(encoded)
        self._key_bytes += len(encoded)
        entry = ENTRY.pack(self._values, self._key_bytes, *label.scores.shape[1:])
        self._values += label.scores.size
        stored = TokenLabelMap(
            np.ascontiguousarray(label.scores, dtype="<f2"), np.ascontiguousarray(label.classes, dtype="<i2")
        )
        self._files["scores.bin"].write(stored.scores.tobytes())
        self._files["classes.bin"].write(stored.classes.tobytes())
        self._files[CHECKSUMS].write(map_checksum(entry, stored).to_bytes(4, "little"))
        self._files["entries.bin"].write(entry)
        self._files["keys.bin"].write(encoded)

    def close(self) -> None:
        """Write index and header, and give the store its name; ValueError if it has no entry."""
        if not self._keys:
            self.abort()
            raise ValueError(f"{self.path}: no label was added, so there is nothing to store")
        try:
            hashes = hash_keys(self._keys)
            order = np.argsort(hashes, kind="stable")
            self._files["index.bin"].write(hashes[order].tobytes() + order.astype("<i8").tobytes())
            self._write_header()
        except BaseException:
            self.abort()
            raise
        self._publish()

    def abort(self) -> None:
        """Remove what was written; a store that was there before stays."""
        for file in self._files.values():
            file.discard()
        shutil.rmtree(self._partial)
        os.close(self._lock)

    def _write_header(self) -> None:
        """Write the header, the last file: before it is there, the folder does not open."""
        header = {"format": FORMAT, "version": VERSION, **asdict(self._header), "entries": len(self._keys)}
        header["files"] = {name: file.close() for name, file in self._files.items()}
        file = _HashedFile(self._partial / HEADER)
        file.write(json.dumps(header, indent=1).encode())
        file.close()

    def _claim(self, overwrite: bool) -> int:
        """Make the hidden folder, empty and ours until the process ends; return its locked descriptor."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            lock = os.open(self._partial, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}; name another folder") from error
        try:
            self._take_lock(lock)
            if self._replaced.exists() and not self.path.exists():
                os.rename(self._replaced, self.path)  # a kill came between the two renames of _publish
                _logger.warning("restored %s: replacing it was interrupted", self.path)
            self._require_free(overwrite)
        except BaseException:
            os.close(lock)
            raise
        if leftover := sorted(self._partial.iterdir()):
            size = sum(file.stat().st_size for file in leftover)
            _logger.warning("%s has %s bytes of an interrupted packing, which starts again", self._partial, f"{size:,}")
            for file in leftover:
                file.unlink()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        return lock

    def _take_lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {self.path}; let it finish, or name another folder"
            ) from error
        except OSError:
            _logger.warning(
                "%s cannot be locked on this file system: make sure that no other process writes it", self.path
            )
        if not self._partial.exists() or not os.path.samestat(os.fstat(lock), self._partial.stat()):
            raise ValueError(f"another process has just written {self.path}; start again if it is not yours")

    def _require_free(self, overwrite: bool) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not is_store(self.path):
            problem = f"{self.path} exists, is not a store of token labels, and is left as it is; name another folder"
        elif not overwrite:
            problem = f"{self.path} exists already; name another folder, or replace it with --overwrite true"
        else:
            return
        if not any(self._partial.iterdir()):
            self._partial.rmdir()
        raise ValueError(problem)

    def _publish(self) -> None:
        if self.path.exists():
            os.rename(self.path, self._replaced)
        rename_folder(self._partial, self.path)
        os.close(self._lock)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)


class _HashedFile:
    """A file and the SHA-256 of what was written to it, as opposed to what a faulty disk may have made of it."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=1 << 20)  # noqa: SIM115 (closed by close or discard)
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> dict:
        """Bring the file to disk; return its record for the header."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._sha256.hexdigest()}

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # the disk may be full; the rest of the buffer is not needed
            self._file.close()


def _check_header(header: StoreHeader) -> None:
    if header.covers not in COVERS:
        raise ValueError(f"covers is {header.covers!r}, allowed is {' or '.join(COVERS)}")
    if header.exif not in EXIF_MODES:
        raise ValueError(f"exif is {header.exif!r}, allowed is {' or '.join(EXIF_MODES)}")
    assert header.num_classes is not None
    if not 1 <= header.num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {header.num_classes}; a store holds class indices of 1 ... {MAX_CLASSES:,}")
    if not 1 <= header.top_k <= header.num_classes:
        raise ValueError(f"top_k is {header.top_k}, allowed is 1 ... {header.num_classes}, the number of classes")
    if header.classes is not None and len(header.classes) != header.num_classes:
        raise ValueError(f"the class list has {len(header.classes)} names for num_classes {header.num_classes}")
