"""Images in tar archives, read in place: the official ones of ILSVRC2012, WebDataset shards, a tar of class folders.

Each archive is gone through once. Where an image begins and how long it is goes into an index, which is kept like a
listing; from then on any image is one read away, so order, epochs, ranks and resuming are those of a folder.

What an image is called, and its class:

    tar of tars (ILSVRC2012_img_train.tar)   n01440764.tar holds n01440764_10026.JPEG: n01440764/n01440764_10026.JPEG
    class folders                            by the first folder of the name in the archive
    WebDataset shards                        by KEY.cls beside KEY.jpg: a class name, or its 0-based index; a key
                                             without a folder gets its class in front, as a folder would have it
    none of these (ILSVRC2012_img_val.tar)   by a labels file or the development kit
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS, UnreadableImage
from volo.data.sources.archive_index import index_archives, stamps_of
from volo.data.sources.base import ImageSource, PackedNames
from volo.data.sources.label_files import LabelsOption, class_indices, label_indices, label_texts, some
from volo.data.sources.listing_cache import Arrays, ListingCache
from volo.data.sources.ranges import RangeReader, is_url, tells_changes
from volo.data.sources.records import ImageRecords, Split, require_known

_UNKEPT = ListingCache(None)
_NO_LABELS = LabelsOption()


class ArchiveSource(ImageSource):
    """Images in archives.

    Args:
        names: Names of the N images.
        reader: Reads the archives.
        archive: Which archive each image is in, int32 [N].
        offset: Where it begins, int64 [N].
        size: Its bytes, int64 [N].
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
    """The images of some archives.

    Args:
        urls: Local paths or URLs, each once.
        place: What they are called together, for messages.
        labels: Labels of the images where they have none of their own; a labels file comes before these.
        listing_cache: Where the index is kept.
    """

    def __init__(
        self,
        urls: Sequence[str],
        place: str,
        labels: LabelsOption = _NO_LABELS,
        listing_cache: ListingCache = _UNKEPT,
    ):
        super().__init__(place, labels)
        self.urls = [url if is_url(url) else os.path.abspath(url.removeprefix("file://")) for url in urls]
        self.listing_cache = listing_cache
        self._index: Arrays | None = None

    def index(self) -> Arrays:
        """Return the index, made or found: see :func:`volo.data.sources.archive_index.index_archives`."""
        if self._index is None:
            stamps = stamps_of(self.urls)
            text = "\n".join(self.urls)
            place = f"{self.place} ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
            keep = all(map(tells_changes, stamps))
            self._index = (self.listing_cache if keep else ListingCache(None)).get(
                "archives",
                place,
                lambda: index_archives(self.urls, stamps, self.place),
                lambda kept: list(PackedNames(kept["stamps"], kept["stamp_ends"])) == stamps,
                lambda _: max((os.stat(url).st_mtime for url in self.urls if not is_url(url)), default=0.0),
                # Copies of the same archives on several machines differ in their times, and may share a cache folder.
                state="\n".join(stamps),
            )
        return self._index

    def found_classes(self) -> list[str]:
        index = self.index()
        if labels_file := self._labels_file(index):
            return sorted(
                set(label_texts(list(PackedNames(index["names"], index["name_ends"])), labels_file, self.place))
            )
        if (index["folder"] >= 0).all():
            return list(PackedNames(index["folders"], index["folder_ends"]))
        return list(PackedNames(index["texts"], index["text_ends"]))

    def _labels_file(self, index: Arrays) -> str | None:
        return self.labels.file_for(bool((index["text"] >= 0).any() or (index["folder"] >= 0).any()))

    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        index = self.index()
        self._index = None  # what is needed of it lives on in the records
        names = PackedNames(index["names"], index["name_ends"])
        if not len(names):
            raise ValueError(f"{self.place} has no image ({', '.join(SUFFIX_FORMATS)})")
        order = np.arange(len(names))
        has_class, has_folder = index["text"] >= 0, index["folder"] >= 0
        if labels_file := self._labels_file(index):
            labels = label_indices(label_texts(list(names), labels_file, self.place), classes, labels_file)
        elif has_class.any():
            self._require_all(has_class, names, "have no .cls beside them, as others have")
            labels = self._labels_beside(index, classes)
            if not has_folder.any():
                order, names = _into_class_folders(names, labels, classes)
        else:
            self._require_all(
                has_folder,
                names,
                f"lie in no class folder and have no .cls beside them; give their labels with {self.labels.name} (a "
                "labels file, or the development kit for the official validation images)",
            )
            labels = self._labels_by_folder(index, classes)
        reader = RangeReader(self.urls, PackedNames(index["stamps"], index["stamp_ends"]))
        places = (index[part][order] for part in ("archive", "offset", "size"))
        return ImageRecords(ArchiveSource(names, reader, *places), labels[order], classes, int(index["ignored"]))

    def _labels_by_folder(self, index: Arrays, classes: tuple[str, ...]) -> np.ndarray:
        index_of = {name: number for number, name in enumerate(classes)}
        folders = list(PackedNames(index["folders"], index["folder_ends"]))
        require_known(folders, index_of, self.place, f"{classes[0]!r} ... {classes[-1]!r}")
        return np.array([index_of[name] for name in folders], dtype=np.int64)[index["folder"]]

    def _labels_beside(self, index: Arrays, classes: tuple[str, ...]) -> np.ndarray:
        """Return the labels of the .cls files; ValueError where a class folder contradicts them."""
        texts = list(PackedNames(index["texts"], index["text_ends"]))
        labels = class_indices(texts, classes, f"{self.place}, .cls files")[index["text"]]
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
                f"{self.place}: the .cls of {len(wrong):,} images says another class than their folder: "
                f"{PackedNames(index['names'], index['name_ends'])[first]} has {texts[index['text'][first]]!r}, which "
                f"is {classes[labels[first]]!r}. Point data.class_list at the list that the .cls files follow"
            )
        return labels

    def _require_all(self, has: np.ndarray, names: PackedNames, problem: str) -> None:
        missing = np.flatnonzero(~has)
        if len(missing):
            shown = some([names[i] for i in missing])
            raise ValueError(f"{len(missing):,} of {len(names):,} images of {self.place} {problem}: {shown}")


def _into_class_folders(
    names: PackedNames, labels: np.ndarray, classes: tuple[str, ...]
) -> tuple[np.ndarray, PackedNames]:
    """Put each image's class in front of its name; return the order in which they are sorted again, and the names."""
    rank = np.argsort(np.argsort(np.array([f"{name}/" for name in classes], dtype=object)))
    order = np.argsort(rank[labels], kind="stable")
    return order, PackedNames.of(f"{classes[labels[i]]}/{names[i]}" for i in order)
