"""Going through tar archives once: which images are in there, where each begins and how long it is."""

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
from volo.data.sources.ranges import open_url, stamp
from volo.data.sources.records import has_image_suffix
from volo.reporting import ProgressBar

_THREADS = 16  # going through an archive is mostly waiting for the disk or the network
_BLOCK = 512
_CHUNK = 1 << 20  # bytes


class _Part(NamedTuple):
    """What one archive, or one archive in an archive, holds: names, offsets and sizes of its images; the text of each
    .cls by key; the archives in it (name, offset, size); other files."""

    names: PackedNames
    offset: array
    size: array
    classes: dict[str, str]
    nested: list[tuple[str, int, int]]
    ignored: int


def stamps_of(urls: list[str]) -> list[str]:
    """Return the stamp of each archive; ValueError where one is not there."""

    def stamp_of(url: str) -> str:
        try:
            return stamp(url)
        except OSError as error:
            raise ValueError(f"{url} cannot be read: {error.strerror or error}") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(stamp_of, urls))


def index_archives(urls: list[str], stamps: list[str], place: str) -> Arrays:
    """Go through all archives.

    Returns, for N images sorted by name: names; archive int32, offset and size int64 [N]; folder and text int32 [N],
    which of ``folders`` (the first folder of the name) and of ``texts`` (of .cls files) each has, -1 for none; stamps
    of the archives; how many files are hidden images, or no images.
    """
    parts: list[tuple[int, _Part]] = []
    tasks = [(number, url, 0, None, "") for number, url in enumerate(urls)]
    while tasks:
        bar = ProgressBar(len(tasks), f"indexing {place}", log_every=max(len(tasks) // 10, 1), delay=10)
        inner = []
        with ThreadPoolExecutor(_THREADS) as pool:
            done = pool.map(lambda task: _go_through(*task[1:]), tasks)
            for (number, url, *_), part in zip(tasks, done, strict=True):
                parts.append((number, part))
                inner += [(number, url, begin, size, name) for name, begin, size in part.nested]
                bar.update(1)
        bar.close()
        tasks = inner
    return _sorted_index(parts, stamps)


def _go_through(url: str, begin: int, size: int | None, folder: str) -> _Part:
    """List the tar archive in bytes ``begin`` ... of a file; what it holds lies in ``folder`` ("" for none).

    Raises ValueError where it is damaged, or no tar archive.
    """
    names, offsets, sizes, classes, nested, ignored = [], array("q"), array("q"), {}, [], 0
    where = f"{url}: {folder}.tar" if folder else url
    prefix = f"{folder}/" if folder else ""
    try:
        with open_url(url) as file:
            for member, archive in _members(file, begin, size, where):
                name = posixpath.normpath(member.name)
                if name.startswith("../") or any(part.startswith(".") for part in name.split("/")):
                    ignored += has_image_suffix(name)  # what some systems leave behind: counted, but no image
                    continue
                if member.issym() or member.islnk():
                    raise ValueError(
                        f"{where}: {name} is a link to another file; make the archive anew with tar --dereference "
                        "--hard-dereference"
                    )
                if name.endswith(".tar") and not folder:
                    nested.append((posixpath.basename(name)[:-4], member.offset_data, member.size))
                elif name.endswith(".cls"):
                    classes[prefix + _key(name)] = archive.extractfile(member).read().decode("utf-8", "replace").strip()
                elif has_image_suffix(name):
                    names.append(prefix + name)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                else:
                    ignored += 1
    except ValueError:
        raise
    except Exception as error:  # clients of object stores have errors of their own, beside OSError and TarError
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{where} cannot be read: {text}") from error
    if len(set(names)) != len(names):
        name, count = Counter(names).most_common(1)[0]
        raise ValueError(
            f"{where} holds {name} {count} times; unpacking it would leave the last of them, training on it would see "
            "all: make the archive anew, with each file once"
        )
    return _Part(PackedNames.of(names), offsets, sizes, classes, nested, ignored)


def _members(file, begin: int, size: int | None, where: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield what is in an archive that begins at ``begin``; ValueError where it ends otherwise than archives end.

    tarfile takes anything that is no header for the end, and so would lose all that comes after a damaged one.
    """
    file.seek(begin)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{where} is no tar archive, or a compressed one ({error}); images are read in place, which takes an "
            "uncompressed archive"
        ) from error
    end = None if size is None else begin + size
    while (member := archive.next()) is not None:
        archive.members.clear()  # else a million of them stay
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
            f"{where} is damaged or was cut short: at byte {archive.offset:,} it neither goes on nor ends as a tar "
            "archive does; copy it again"
        )
    _require_end(file, archive.offset + _BLOCK, end, where)


def _require_end(file, offset: int, end: int | None, where: str) -> None:
    """Raise ValueError where anything but zeros comes behind the end mark: there may be images in it.

    Archives are padded with little, 10 KiB by GNU tar.
    """
    file.seek(offset)
    while chunk := file.read(_CHUNK if end is None else max(min(_CHUNK, end - offset), 0)):
        if rest := chunk.lstrip(b"\0"):
            raise ValueError(
                f"{where} goes on at byte {offset + len(chunk) - len(rest):,}, behind its end mark: a part of it "
                "was lost, or archives were joined as files are; copy it again, or join archives with tar --concatenate"
            )
        offset += len(chunk)


def _key(name: str) -> str:
    """Return the key of a file in a WebDataset shard: its name up to the first dot behind the folders."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])


def _sorted_index(parts: list[tuple[int, _Part]], stamps: list[str]) -> Arrays:
    names = [name for _, part in parts for name in part.names]
    archive = np.repeat(
        np.array([number for number, _ in parts], dtype=np.int32), [len(part.names) for _, part in parts]
    )
    offset = np.concatenate([np.frombuffer(part.offset, dtype=np.int64) for _, part in parts])
    size = np.concatenate([np.frombuffer(part.size, dtype=np.int64) for _, part in parts])
    texts, unmatched = [], 0
    for _, part in parts:
        beside, without_image = _texts_beside(part)
        texts += beside
        unmatched += without_image
    keep = [i for i, text in enumerate(texts) if text is not _ANOTHER]
    order = np.array(sorted(keep, key=lambda i: (names[i], archive[i], offset[i])), dtype=np.int64)

    sorted_names = PackedNames.of(names[i] for i in order)
    folder, folders = _numbered(name.split("/", 1)[0] if "/" in name else None for name in sorted_names)
    text, distinct = _numbered(texts[i] for i in order)
    known = PackedNames.of(stamps)
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
        "stamps": known.text,
        "stamp_ends": known.ends,
        "ignored": np.array(sum(part.ignored for _, part in parts) + len(names) - len(keep) + unmatched),
    }


_ANOTHER = object()


def _texts_beside(part: _Part) -> tuple[list[object], int]:
    """Return the class text of each image, and how many texts have no image.

    The text is None where there is none, and _ANOTHER for what is no sample's own image: where samples have a .cls,
    their image is KEY.jpg (or .png, ...), and KEY.mask.png is something else.
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
            raise ValueError(f"{matched[key]} and {name} are images of the same sample; which of them is not told")
        texts.append(part.classes.get(key))
    return texts, len(part.classes.keys() - matched.keys())


def _numbered(texts) -> tuple[np.ndarray, PackedNames]:
    """Return which of the distinct texts each is, int32, -1 for None, and the distinct texts in sorted order."""
    numbers: dict[str, int] = {}
    found = np.fromiter((-1 if t is None else numbers.setdefault(t, len(numbers)) for t in texts), dtype=np.int32)
    distinct = sorted(numbers)
    rank = np.empty(len(distinct) + 1, dtype=np.int32)
    rank[-1] = -1
    rank[[numbers[text] for text in distinct]] = np.arange(len(distinct))
    return rank[found], PackedNames.of(distinct)
