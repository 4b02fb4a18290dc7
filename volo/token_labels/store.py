"""The packed label store: what it holds, and reading it.

k top scores per cell, h x w cells (rows, columns) of a label map, which may differ from entry to entry; n entries, C
classes of the teacher. A store is a folder:

    scores.bin    float16, the raw logits [k, h, w] of entry 0, then those of entry 1, ...
    classes.bin   int16, their class indices, laid out alike
    entries.bin   for every entry: where its map begins, where its key ends, height, width (ENTRY)
    keys.bin      the keys, UTF-8, one after the other
    index.bin     uint64 [n], the keys' hashes in ascending order, then int64 [n], the entry of each hash
    checksums.bin uint32 [n], CRC-32 of an entry's record in entries.bin, its scores and its classes, in this order;
                  stores of earlier code have no such file
    header.json   format, version, StoreHeader, and size and SHA-256 of every file above

All numbers are little-endian. The files are mapped into memory read-only and shared: however many workers and ranks
read them, the machine holds each page once.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from volo.runtime.files import open_regular, read_regular

FORMAT = "volo token labels"
VERSION = 1
HEADER = "header.json"
FILES = ("scores.bin", "classes.bin", "entries.bin", "keys.bin", "index.bin")
CHECKSUMS = "checksums.bin"
COVERS = ("whole_image", "center_crop")
EXIF_MODES = ("ignore", "apply")
MAX_CLASSES = 1 << 15  # class indices are int16
_LARGEST_HEADER = 64 << 20  # bytes; some 30 kB for ImageNet's class names

# First value of the map in scores.bin and classes.bin, end of the key in keys.bin, height, width.
ENTRY = struct.Struct("<qqii")
_ENTRY_FIELDS = np.dtype([("start", "<i8"), ("key_end", "<i8"), ("height", "<i4"), ("width", "<i4")])


class TokenLabelMap(NamedTuple):
    """The best classes of each cell of one image.

    Args:
        scores: float16 [k, h, w], raw logits of the k best classes of each cell.
        classes: int16 [k, h, w], the indices of those classes.
    """

    scores: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class StoreHeader:
    """What all entries have in common.

    Args:
        teacher: Name of the network that gave the labels.
        covers: What a map covers: "whole_image", or "center_crop" for the centre crop that the published labels
            were made from, which the published code treats as if it were the whole image.
        top_k: Scores per cell, k.
        num_classes: Classes of the teacher, C; None if unknown.
        classes: Their C names in index order; None if unknown.
        entries: Number of label maps, n.
        exif: Whether the teacher saw images as their pixels are stored ("ignore") or as their EXIF orientation tag
            turns them ("apply"); older stores do not say, and are "ignore".
    """

    teacher: str
    covers: str
    top_k: int
    num_classes: int | None
    classes: tuple[str, ...] | None
    entries: int
    exif: str = "ignore"


def label_key(relative_image_path: str) -> str:
    """Return the key of an image's label: its path without the last suffix, "n01440764/n01440764_10026"."""
    return os.path.splitext(relative_image_path)[0].replace(os.sep, "/")


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # as Python decodes file names that are not UTF-8


def hash_keys(keys: Sequence[bytes]) -> np.ndarray:
    """Return the keys' 64-bit hashes, uint64 [n], the same on every machine."""
    digests = b"".join([hashlib.blake2b(key, digest_size=8).digest() for key in keys])
    return np.frombuffer(digests, "<u8")


def map_checksum(record: bytes, label: TokenLabelMap) -> int:
    """Return the CRC-32 of an entry: of its 24 bytes in entries.bin, and of its map as it is stored."""
    return zlib.crc32(label.classes.data, zlib.crc32(label.scores.data, zlib.crc32(record)))


def check_map(
    label: TokenLabelMap, top_k: int, num_classes: int | None, where: str, remedy: str = "generate this label again"
) -> None:
    """Raise ValueError if the map's shape, classes or scores are invalid; ``where`` begins the message."""
    shape = label.scores.shape
    if len(shape) != 3 or shape[0] != top_k or 0 in shape or label.classes.shape != shape:
        raise ValueError(
            f"{where}: scores {list(shape)} and classes {list(label.classes.shape)}, but both should be "
            f"[{top_k}, height, width], top {top_k} as in the other entries; {remedy}"
        )
    lowest, highest = int(label.classes.min()), int(label.classes.max())
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        wrong = lowest if lowest < 0 else highest
        allowed = "0 or more" if num_classes is None else f"0 ... {num_classes - 1}"
        raise ValueError(
            f"{where}: class index {wrong}, allowed is {allowed}; give the number of classes that the teacher had, "
            f"or {remedy}"
        )
    if not np.isfinite(label.scores).all():
        raise ValueError(f"{where}: scores that are NaN or beyond float16; {remedy}")


class TokenLabelStore:
    """A packed store, open for reading. It may be forked, and pickled: the copy maps the same files.

    Args:
        path: Folder of the store.

    Raises:
        ValueError: Not a store, of another version, or incomplete.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self._header_bytes = _read_header(self.path)
        self.header, self._files = _parse_header(self._header_bytes, self.path)
        maps = {name: self._map(name, record["bytes"]) for name, record in self._files.items()}
        self._scores, self._classes = maps["scores.bin"], maps["classes.bin"]
        self._keys, self._entries = maps["keys.bin"], maps["entries.bin"]
        index = np.frombuffer(maps["index.bin"], "<u8")
        self._hashes, self._order = index[: len(self)], index[len(self) :].view("<i8")
        self._checksums = np.frombuffer(maps[CHECKSUMS], "<u4") if CHECKSUMS in maps else None
        self._check_entries()
        self._check_index()

    def __len__(self) -> int:
        return self.header.entries

    @property
    def has_checksums(self) -> bool:
        """Whether :meth:`read` notices every change of a map; stores of earlier code have no checksums of maps."""
        return self._checksums is not None

    def __reduce__(self):
        return _reopen, (self.path, self._header_bytes)

    def read(self, entry: int) -> TokenLabelMap:
        """Return the map of an entry: read-only views of the mapped files, not copies.

        Raises ValueError if the values are invalid or not those of the checksum: the file has changed since.
        """
        assert 0 <= entry < len(self), f"entry {entry} of {len(self)}"
        record = self._entries[entry * ENTRY.size : (entry + 1) * ENTRY.size]
        start, _, height, width = ENTRY.unpack(record)
        shape = (self.header.top_k, height, width)
        count = shape[0] * height * width
        scores = np.frombuffer(self._scores, "<f2", count, 2 * start)
        classes = np.frombuffer(self._classes, "<i2", count, 2 * start)
        label = TokenLabelMap(scores.reshape(shape), classes.reshape(shape))
        # A faulty disk may have changed them: the loss would be NaN, or indexing would fail on the device.
        where = f"{self.path}: label of {self.key(entry)!r}"
        remedy = "copy the store again, or pack it again"
        check_map(label, self.header.top_k, self.header.num_classes, where, remedy)
        if self._checksums is not None and map_checksum(record, label) != self._checksums[entry]:
            raise ValueError(f"{where} has changed since it was packed (its CRC-32 is another); {remedy}")
        return label

    def key(self, entry: int) -> str:
        """Return the key of an entry: whatever stands in the store, which is compared and never opened as a path."""
        assert 0 <= entry < len(self), f"entry {entry} of {len(self)}"
        ends = self._fields()["key_end"]
        begin = int(ends[entry - 1]) if entry else 0
        return self._keys[begin : int(ends[entry])].decode("utf-8", "surrogateescape")

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the entry of each key, int64 [n]; -1 where there is none."""
        encoded = [encode_key(key) for key in keys]
        hashes = hash_keys(encoded)
        first = np.searchsorted(self._hashes, hashes)  # [n], the first of equal hashes
        candidate = self._order[np.minimum(first, len(self) - 1)]
        ends = self._fields()["key_end"]
        begins = np.where(candidate > 0, ends[candidate - 1], 0)
        bounds = zip(begins.tolist(), ends[candidate].tolist(), strict=True)
        same = [self._keys[a:b] == key for (a, b), key in zip(bounds, encoded, strict=True)]
        found = np.where(np.array(same, dtype=bool), candidate, -1)
        # If another key has the same hash, ours may come after it.
        clash = (found < 0) & (first < len(self)) & (self._hashes[np.minimum(first, len(self) - 1)] == hashes)
        for i in np.flatnonzero(clash).tolist():
            last = np.searchsorted(self._hashes, hashes[i], side="right")
            others = self._order[first[i] : last].tolist()
            found[i] = next((entry for entry in others if self.key(entry) == keys[i]), -1)
        return found

    def map_hw(self, entries: np.ndarray) -> tuple[int, int]:
        """Return the height and width that the maps of ``entries`` have; ValueError if they differ."""
        fields = self._fields()[entries]
        sizes, counts = np.unique(fields["height"].astype(np.int64) << 32 | fields["width"], return_counts=True)
        height, width = sizes >> 32, sizes & 0xFFFFFFFF
        if len(sizes) > 1:
            first, second = np.argsort(-counts, kind="stable")[:2]
            a, b, c, d = height[first], width[first], height[second], width[second]
            raise ValueError(
                f"{self.path} has maps of {len(sizes):,} sizes ({a}x{b}, {c}x{d}, ...), and "
                "token_label.geometry published takes only one: set token_label.geometry to aligned"
            )
        return int(height[0]), int(width[0])

    def verify_checksums(self) -> None:
        """Read every file from end to end; ValueError names one that has changed since it was packed."""
        for name, record in self._files.items():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != record["sha256"]:
                raise ValueError(
                    f"{self.path / name} has changed since it was packed (SHA-256 {found[:12]}..., expected "
                    f"{record['sha256'][:12]}...); copy the store again, or pack it again"
                )

    def _fields(self) -> np.ndarray:
        return np.frombuffer(self._entries, _ENTRY_FIELDS)

    def _map(self, name: str, size: int) -> mmap.mmap:
        path = self.path / name
        try:
            with open(path, "rb", opener=open_regular) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise _incomplete(path, f"{found:,} bytes instead of {size:,}")
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise _incomplete(path, "missing") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def _check_entries(self) -> None:
        """Make sure that entries are in order and end with the files, so that none reads the labels of another."""
        entries = self._fields()
        height, width, key_end = entries["height"].astype(np.int64), entries["width"], entries["key_end"]
        sizes = self.header.top_k * height * width
        ends = np.cumsum(sizes)
        if (
            min(height.min(), width.min()) <= 0
            or (height * width).max() > len(self._scores)  # so that the products above did not overflow
            or not np.array_equal(entries["start"], ends - sizes)
            or 2 * ends[-1] != len(self._scores)
            or key_end[0] < 0
            or (key_end[1:] < key_end[:-1]).any()
            or key_end[-1] != len(self._keys)
        ):
            raise _incomplete(self.path / "entries.bin", "not the table of the files beside it")

    def _check_index(self) -> None:
        """Make sure that the index is sorted and names entries that there are."""
        hashes, order = self._hashes, self._order
        if (hashes[1:] < hashes[:-1]).any() or order.min() < 0 or order.max() >= len(self):
            raise _incomplete(self.path / "index.bin", "not the index of the files beside it")


def _reopen(path: Path, header_bytes: bytes) -> TokenLabelStore:
    """Unpickle a store: open the same folder again."""
    store = TokenLabelStore(path)
    if store._header_bytes != header_bytes:
        # Entry numbers found in the old store would name other images in this one.
        raise ValueError(f"{path} was replaced by another store while it was in use; start the run again")
    return store


def _incomplete(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is {what}, so the store is incomplete. Copy it again, or pack it again")


def _read_header(path: Path) -> bytes:
    try:
        with open(path / HEADER, "rb", opener=open_regular) as file:
            text = file.read(_LARGEST_HEADER + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{path} is not a store of token labels (it has no {HEADER}); give the folder that "
            "scripts/pack_token_labels.py wrote, or pack it again if packing was interrupted"
        ) from error
    except OSError as error:
        raise ValueError(f"{path / HEADER} cannot be read: {error.strerror}") from error
    if len(text) > _LARGEST_HEADER:
        raise _incomplete(path / HEADER, f"damaged (it has more than {_LARGEST_HEADER:,} bytes)")
    return text


def is_store(path: Path) -> bool:
    """Tell whether ``path`` is a packed store, of any version, complete or not."""
    try:
        return json.loads(read_regular(path / HEADER))["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _covers(values: dict) -> str:
    """Return what maps cover; a header of an earlier version calls it geometry, and the centre crop "reference"."""
    covers = values["covers"] if "covers" in values else values["geometry"]
    return {"reference": "center_crop"}.get(covers, str(covers))


def _possible(header: StoreHeader) -> bool:
    """Tell whether a writer of stores could have written the header."""
    names, count = header.classes, header.num_classes
    return (
        count is not None
        and 1 <= header.top_k <= count <= MAX_CLASSES
        and (names is None or (len(names) == count and all(isinstance(name, str) for name in names)))
        and header.covers in COVERS
        and header.exif in EXIF_MODES
    )


def _parse_header(text: bytes, path: Path) -> tuple[StoreHeader, dict[str, dict]]:
    """Return the header, and the record of each file: size and checksum."""
    try:
        values = json.loads(text)
        known = values["format"] == FORMAT
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / HEADER} is not the header of a store of token labels; pack it again") from error
    if not known:
        raise ValueError(f"{path} is not a store of token labels: its format is {values['format']!r}")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {values.get('version')!r} of the format, but this code reads version {VERSION}. Pack "
            "it again with this code, or read it with the code that wrote it"
        )
    try:
        classes = values["classes"]
        header = StoreHeader(
            teacher=str(values["teacher"]),
            covers=_covers(values),
            top_k=int(values["top_k"]),
            num_classes=int(values["num_classes"]),
            classes=None if classes is None else tuple(classes),
            entries=int(values["entries"]),
            exif=str(values.get("exif", "ignore")),
        )
        names = (*FILES, CHECKSUMS) if CHECKSUMS in values["files"] else FILES
        files = {name: values["files"][name] for name in names}
        sizes = {name: int(record["bytes"]) for name, record in files.items()}
        whole = all(len(record["sha256"]) == 64 for record in files.values()) and min(sizes.values()) > 0
        whole = whole and header.entries > 0 and _possible(header)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise _incomplete(path / HEADER, f"damaged ({type(error).__name__}: {error})") from error
    n = header.entries
    expected = {"entries.bin": ENTRY.size * n, "index.bin": 16 * n, CHECKSUMS: 4 * n}
    if not whole or any(sizes.get(name, size) != size for name, size in expected.items()):
        raise _incomplete(path / HEADER, "damaged (its numbers contradict each other)")
    if sizes["scores.bin"] != sizes["classes.bin"]:
        raise _incomplete(path / HEADER, "damaged (it has different numbers of scores and classes)")
    return header, files
