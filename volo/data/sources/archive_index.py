"""Indexes tar archives: which images they hold, and the offset and size of each."""

import os
import posixpath
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from volo.data.sources.base import PackedNames
from volo.data.sources.listing_cache import Arrays
from volo.data.sources.ranges import fingerprint, open_url
from volo.data.sources.records import has_image_suffix
from volo.reporting import ProgressBar
from volo.runtime.files import require_below

_THREADS = 16  # indexing mostly waits for the disk or the network
_BLOCK = 512
_CHUNK = 1 << 20  # bytes


class _Part(NamedTuple):
    """The content of one archive, which may itself be a member of an archive.

    Args:
        names: Names of its images.
        offset: Where each image begins in the outer file, in bytes.
        size: Size of each image, in bytes.
        classes: Content of each .cls file, by key.
        nested: Name, offset and size of each archive in it.
        ignored: Number of hidden images and of other files.
    """

    names: PackedNames
    offset: array
    size: array
    classes: dict[str, str]
    nested: list[tuple[str, int, int]]
    ignored: int


def fingerprints_of(urls: list[str]) -> list[str]:
    """Return the fingerprint of each archive; ValueError if one cannot be read."""

    def fingerprint_of(url: str) -> str:
        try:
            return fingerprint(url)
        except OSError as error:
            raise ValueError(f"{url} cannot be read: {error.strerror or error}") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(fingerprint_of, urls))


def index_archives(urls: list[str], fingerprints: list[str], location: str) -> Arrays:
    """Read the headers of all archives.

    Returns:
        For N images sorted by name: ``names``; ``archive`` int32, ``offset`` and ``size`` int64 [N]; ``folder`` and
        ``text`` int32 [N], the number of the image's first folder in ``folders`` and of its .cls text in ``texts``, -1
        for none; ``fingerprints`` of the archives; ``ignored``, the number of hidden images and of other files.

    Raises:
        ValueError: An archive is damaged, compressed, or holds links, devices, a name that leaves its folder, a name
            twice, or an ambiguous sample.
    """
    parts: list[tuple[int, _Part]] = []
    tasks = [(number, url, 0, None, "") for number, url in enumerate(urls)]
    while tasks:
        bar = ProgressBar(len(tasks), f"indexing {location}", log_every=max(len(tasks) // 10, 1), delay=10)
        inner = []
        with ThreadPoolExecutor(_THREADS) as pool:
            done = pool.map(lambda task: _index_one(*task[1:]), tasks)
            for (number, url, *_), part in zip(tasks, done, strict=True):
                parts.append((number, part))
                inner += [(number, url, begin, size, name) for name, begin, size in part.nested]
                bar.update(1)
        bar.close()
        tasks = inner
    return _sorted_index(parts, fingerprints)


def _index_one(url: str, begin: int, size: int | None, folder: str) -> _Part:
    """Index the tar archive at byte ``begin`` of a file; its members are put into ``folder`` ("" for none).

    Raises ValueError if it is damaged or not a tar archive.
    """
    names, offsets, sizes, classes, nested, ignored = [], array("q"), array("q"), {}, [], 0
    location = f"{url}: {folder}.tar" if folder else url
    prefix = f"{folder}/" if folder else ""
    try:
        with open_url(url) as file:
            end = file.seek(0, os.SEEK_END) if size is None else begin + size
            for member, archive in _members(file, begin, size, location):
                name = posixpath.normpath(member.name)
                used = has_image_suffix(name) or name.endswith((".tar", ".cls"))
                if used:
                    require_below(name, location)
                if any(part.startswith(".") for part in name.split("/")):
                    ignored += has_image_suffix(name)  # metadata of some operating systems, not images
                    continue
                if member.issym() or member.islnk():
                    raise ValueError(
                        f"{location}: {name} is a link to another file. Create the archive again with tar "
                        "--dereference --hard-dereference"
                    )
                if used and not member.isreg():
                    raise ValueError(
                        f"{location}: {name} is a pipe or a device, which cannot be read in place. Create the archive "
                        "again from regular files"
                    )
                if used:
                    _require_plain(member, name, end, location)
                if name.endswith(".tar") and not folder:
                    nested.append((posixpath.basename(name)[:-4], member.offset_data, member.size))
                elif name.endswith(".cls"):
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file"
                    classes[prefix + _key(name)] = content.read().decode("utf-8", "replace").strip()
                elif has_image_suffix(name):
                    names.append(prefix + name)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                else:
                    ignored += 1
    except ValueError:
        raise
    except Exception as error:  # clients of object stores also raise errors of their own
        text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{location} cannot be read: {text}") from error
    if len(set(names)) != len(names):
        name, count = Counter(names).most_common(1)[0]
        raise ValueError(
            f"{location} holds {name} {count} times: unpacking would keep only the last one, training would see all. "
            "Create the archive again, with each file once"
        )
    return _Part(PackedNames.of(names), offsets, sizes, classes, nested, ignored)


def _require_plain(member: tarfile.TarInfo, name: str, end: int, location: str) -> None:
    """Raise ValueError if a member's bytes do not stand in the archive, one after the other, before byte ``end``."""
    if member.issparse():
        raise ValueError(
            f"{location}: {name} is stored as a sparse file, whose holes are left out. Create the archive again "
            "without tar --sparse"
        )
    if not 0 <= member.size <= end - member.offset_data:
        raise ValueError(
            f"{location} is damaged or truncated: {name} has {member.size:,} bytes by its header, and "
            f"{max(end - member.offset_data, 0):,} follow. Copy it again"
        )


def _members(file, begin: int, size: int | None, location: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the members of the archive at byte ``begin``; ValueError if it does not end as an archive must.

    tarfile takes anything that is not a header for the end, and would silently lose everything after a damaged one.
    """
    file.seek(begin)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{location} is not a tar archive, or is compressed ({error}). Images are read in place: give an "
            "uncompressed archive"
        ) from error
    end = None if size is None else begin + size
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a million of them
        if end is not None and member.offset >= end:
            return
        if not member.isdir():
            yield member, archive
    if end is not None and archive.offset >= end:
        return
    file.seek(archive.offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise ValueError(
            f"{location} is damaged or truncated: there is neither a header nor an end mark at byte "
            f"{archive.offset:,}. Copy it again"
        )
    _require_end(file, archive.offset + _BLOCK, end, location)


def _require_end(file, offset: int, end: int | None, location: str) -> None:
    """Raise ValueError if anything but zeros follows the end mark: there may be images in it."""
    file.seek(offset)
    while chunk := file.read(_CHUNK if end is None else max(min(_CHUNK, end - offset), 0)):
        if rest := chunk.lstrip(b"\0"):
            raise ValueError(
                f"{location} continues after its end mark, at byte {offset + len(chunk) - len(rest):,}: part of it was "
                "overwritten, or archives were joined with cat. Copy it again, or join archives with tar --concatenate"
            )
        offset += len(chunk)


def _key(name: str) -> str:
    """Return the key of a file in a WebDataset shard: its path up to the first dot of the file name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])


def _sorted_index(parts: list[tuple[int, _Part]], fingerprints: list[str]) -> Arrays:
    names = [name for _, part in parts for name in part.names]
    archive = np.repeat(
        np.array([number for number, _ in parts], dtype=np.int32), [len(part.names) for _, part in parts]
    )
    offset = np.concatenate([np.frombuffer(part.offset, dtype=np.int64) for _, part in parts])
    size = np.concatenate([np.frombuffer(part.size, dtype=np.int64) for _, part in parts])
    texts, unmatched = [], 0
    for _, part in parts:
        texts_of_part, without_image = _class_texts(part)
        texts += texts_of_part
        unmatched += without_image
    keep = [i for i, text in enumerate(texts) if text is not _ANOTHER]
    order = np.array(sorted(keep, key=lambda i: (names[i], archive[i], offset[i])), dtype=np.int64)

    sorted_names = PackedNames.of(names[i] for i in order)
    folder, folders = _numbered(name.split("/", 1)[0] if "/" in name else None for name in sorted_names)
    text, distinct = _numbered(texts[i] for i in order)
    known = PackedNames.of(fingerprints)
    return {
        "names": sorted_names.text,
        "name_ends": sorted_names.ends,
        "archive": archive[order],
        "offset": offset[order],
        "size": size[order],
        "folder": folder,
        "folders": folders.text,
        "folder_ends": folders.ends,
        "text": text,
        "texts": distinct.text,
        "text_ends": distinct.ends,
        "fingerprints": known.text,
        "fingerprint_ends": known.ends,
        "ignored": np.array(sum(part.ignored for _, part in parts) + len(names) - len(keep) + unmatched),
    }


_ANOTHER = object()


def _class_texts(part: _Part) -> tuple[list[object], int]:
    """Return the .cls text of each image, and how many texts have no image.

    The text is None if there is none, and _ANOTHER for an image that is not a sample's own: in a shard with .cls files
    the image of a sample is KEY.jpg (or .png, ...), while KEY.mask.png is something else.
    """
    if not part.classes:
        return [None] * len(part.names), 0
    texts: list[object] = []
    matched: dict[str, str] = {}
    for name in part.names:
        key = _key(name)
        if name.count(".", name.rfind("/") + 1) > 1 and key in part.classes:
            texts.append(_ANOTHER)
            continue
        if matched.setdefault(key, name) != name:
            raise ValueError(f"{matched[key]} and {name} are images of the same sample. Keep one of them")
        texts.append(part.classes.get(key))
    return texts, len(part.classes.keys() - matched.keys())


def _numbered(texts) -> tuple[np.ndarray, PackedNames]:
    """Return the number of each text among the distinct ones, int32, -1 for None, and the distinct texts, sorted."""
    numbers: dict[str, int] = {}
    found = np.fromiter((-1 if t is None else numbers.setdefault(t, len(numbers)) for t in texts), dtype=np.int32)
    distinct = sorted(numbers)
    rank = np.empty(len(distinct) + 1, dtype=np.int32)
    rank[-1] = -1
    rank[[numbers[text] for text in distinct]] = np.arange(len(distinct))
    return rank[found], PackedNames.of(distinct)
