"""Images in tar archives, read in place: the official ILSVRC2012 archives, WebDataset shards, a tar of class folders.

Each archive is indexed once: the offset and size of every image go into the listing cache. After that any image takes
one read, so order, epochs, ranks and resuming work as for a folder.

Names and classes of the images:

    tar of tars (ILSVRC2012_img_train.tar)   n01440764.tar holds n01440764_10026.JPEG: n01440764/n01440764_10026.JPEG
    class folders                            by the first folder of the name in the archive
    WebDataset shards                        by KEY.cls beside KEY.jpg: a class name, or its 0-based index; a key
                                             without a folder gets its class as one
    none of these (ILSVRC2012_img_val.tar)   by a labels file or the development kit
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS, UnreadableImage
from volo.data.sources.archive_index import fingerprints_of, index_archives
from volo.data.sources.base import ImageSource, PackedNames
from volo.data.sources.label_files import LabelsOption, class_indices, label_indices, label_texts, some
from volo.data.sources.listing_cache import Arrays, ListingCache
from volo.data.sources.ranges import RangeReader, is_url, shows_changes
from volo.data.sources.records import ImageRecords, Split, require_known

_UNKEPT = ListingCache(None)
_NO_LABELS = LabelsOption()


class ArchiveSource(ImageSource):
    """Images in archives.

    Args:
        names: Names of the N images.
        reader: Reads the archives.
        archive: Number of the archive that holds each image, int32 [N].
        offset: Where the image begins in it, int64 [N], in bytes.
        size: Size of the image's file, int64 [N], in bytes.
    """

    def __init__(
        self, names: PackedNames, reader: RangeReader, archive: np.ndarray, offset: np.ndarray, size: np.ndarray
    ):
        super().__init__(names)
        self.reader = reader
        self.archive, self.offset, self.size = archive, offset, size

    def read(self, index: int) -> bytes:
        try:
            return self.reader.read(int(self.archive[index]), int(self.offset[index]), int(self.size[index]))
        except OSError as error:
            raise UnreadableImage(f"cannot read {self.location(index)}: {error.strerror or error}") from error

    def location(self, index: int) -> str:
        return f"{self.reader.urls[self.archive[index]]}: {self.names[index]}"


class ArchiveSplit(Split):
    """The images of one split, in one or more archives.

    Args:
        urls: Local paths or URLs, each once.
        location: Name of the archives as a whole, for messages.
        labels: Labels of images that have none of their own; a labels file overrides those in the archives.
        listing_cache: Keeps the index.
    """

    def __init__(
        self,
        urls: Sequence[str],
        location: str,
        labels: LabelsOption = _NO_LABELS,
        listing_cache: ListingCache = _UNKEPT,
    ):
        super().__init__(location, labels)
        self.urls = [url if is_url(url) else os.path.abspath(url.removeprefix("file://")) for url in urls]
        self.listing_cache = listing_cache
        self._index: Arrays | None = None

    def index(self) -> Arrays:
        """Return the index, cached or new; see :func:`volo.data.sources.archive_index.index_archives`."""
        if self._index is None:
            fingerprints = fingerprints_of(self.urls)
            text = "\n".join(self.urls)
            location = f"{self.location} ({hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:16]})"
            keep = all(map(shows_changes, fingerprints))
            self._index = (self.listing_cache if keep else ListingCache(None)).get(
                "archives",
                location,
                lambda: index_archives(self.urls, fingerprints, self.location),
                lambda kept: list(PackedNames(kept["fingerprints"], kept["fingerprint_ends"])) == fingerprints,
                lambda _: max((os.stat(url).st_mtime for url in self.urls if not is_url(url)), default=0.0),
                # Several machines may share a cache folder, and the times of their copies of the archives differ.
                state="\n".join(fingerprints),
            )
        return self._index

    def found_classes(self) -> list[str]:
        index = self.index()
        if labels_file := self._labels_file(index):
            return sorted(
                set(label_texts(list(PackedNames(index["names"], index["name_ends"])), labels_file, self.location))
            )
        if (index["folder"] >= 0).all():
            return list(PackedNames(index["folders"], index["folder_ends"]))
        return list(PackedNames(index["texts"], index["text_ends"]))

    def _labels_file(self, index: Arrays) -> str | None:
        return self.labels.file_for(bool((index["text"] >= 0).any() or (index["folder"] >= 0).any()))

    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        index = self.index()
        self._index = None  # the records keep the parts that are still needed
        names = PackedNames(index["names"], index["name_ends"])
        if not len(names):
            raise ValueError(f"{self.location} has no image ({', '.join(SUFFIX_FORMATS)})")
        order = np.arange(len(names))
        has_class, has_folder = index["text"] >= 0, index["folder"] >= 0
        if labels_file := self._labels_file(index):
            labels = label_indices(label_texts(list(names), labels_file, self.location), classes, labels_file)
        elif has_class.any():
            self._require_all(has_class, names, "have no .cls file, but others have one")
            labels = self._labels_by_text(index, classes)
            if not has_folder.any():
                order, names = _into_class_folders(names, labels, classes)
        else:
            self._require_all(
                has_folder,
                names,
                f"are in no class folder and have no .cls file; give their labels with {self.labels.name} (a labels "
                "file, or the development kit for the official validation images)",
            )
            labels = self._labels_by_folder(index, classes)
        reader = RangeReader(self.urls, PackedNames(index["fingerprints"], index["fingerprint_ends"]))
        ranges = (index[part][order] for part in ("archive", "offset", "size"))
        return ImageRecords(ArchiveSource(names, reader, *ranges), labels[order], classes, int(index["ignored"]))

    def _labels_by_folder(self, index: Arrays, classes: tuple[str, ...]) -> np.ndarray:
        index_of = {name: number for number, name in enumerate(classes)}
        folders = list(PackedNames(index["folders"], index["folder_ends"]))
        require_known(folders, index_of, self.location, f"{classes[0]!r} ... {classes[-1]!r}")
        return np.array([index_of[name] for name in folders], dtype=np.int64)[index["folder"]]

    def _labels_by_text(self, index: Arrays, classes: tuple[str, ...]) -> np.ndarray:
        """Return the labels of the .cls files; ValueError if a class folder contradicts them."""
        texts = list(PackedNames(index["texts"], index["text_ends"]))
        labels = class_indices(texts, classes, f"{self.location}, .cls files")[index["text"]]
        folders = PackedNames(index["folders"], index["folder_ends"])
        by_folder = np.array([classes.index(name) if name in classes else -1 for name in folders], dtype=np.int64)
        wrong = (
            np.flatnonzero(
                (index["folder"] >= 0) & (by_folder[index["folder"]] >= 0) & (by_folder[index["folder"]] != labels)
            )
            if len(by_folder)
            else []
        )
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"{self.location}: the .cls files of {len(wrong):,} images contradict their folders: "
                f"{PackedNames(index['names'], index['name_ends'])[first]} has {texts[index['text'][first]]!r}, which "
                f"is {classes[labels[first]]!r}. Point data.class_list at the list that the .cls files follow"
            )
        return labels

    def _require_all(self, has: np.ndarray, names: PackedNames, problem: str) -> None:
        missing = np.flatnonzero(~has)
        if len(missing):
            shown = some([names[i] for i in missing.tolist()])
            raise ValueError(f"{len(missing):,} of {len(names):,} images of {self.location} {problem}: {shown}")


def _into_class_folders(
    names: PackedNames, labels: np.ndarray, classes: tuple[str, ...]
) -> tuple[np.ndarray, PackedNames]:
    """Put each image's class in front of its name; return the order that sorts the new names, and the names."""
    rank = np.argsort(np.argsort(np.array([f"{name}/" for name in classes], dtype=object)))
    order = np.argsort(rank[labels], kind="stable")
    return order, PackedNames.of(f"{classes[labels[i]]}/{names[i]}" for i in order)
