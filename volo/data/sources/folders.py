"""Images in folders: one folder a class, or any folder with a file of labels."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from volo.data.pixels.decode import SUFFIX_FORMATS
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.label_files import LabelsOption, is_number, label_indices, label_texts, some
from volo.data.sources.listing_cache import Arrays, ListingCache
from volo.data.sources.records import ImageRecords, Split, has_image_suffix, imagenet_classes, require_known
from volo.reporting import ProgressBar

_THREADS = 16  # on a network file system listing is all waiting
_SHOWN = 10  # names in a message
_UNKEPT = ListingCache(None)
_NO_LABELS = LabelsOption()


class FolderSplit(Split):
    """A folder with one folder a class; with a labels file, or the development kit, a folder of any images.

    Args:
        place: The folder.
        labels: Labels of the images where they do not lie in class folders.
        listing_cache: Where its listing is kept.
    """

    def __init__(self, place: str, labels: LabelsOption = _NO_LABELS, listing_cache: ListingCache = _UNKEPT):
        super().__init__(place, labels)
        self.listing_cache = listing_cache
        self._found: LabelledFolder | None = None

    def found_classes(self) -> list[str]:
        folders = _subfolders(self.place)
        labels_file = self.labels.file_for(bool(folders))
        if labels_file is None:
            _loose_files(self.place, self.labels.name)
        return sorted(set(self._labelled(labels_file).texts)) if labels_file else folders

    def has_class_folders(self) -> bool:
        return bool(_subfolders(self.place))

    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        labels_file = self.labels.file_for(self.has_class_folders())
        if labels_file is None:
            return scan_class_folders(
                self.place, classes, listing_cache=self.listing_cache, labels_option=self.labels.name
            )
        found, self._found = self._labelled(labels_file), None
        labels = label_indices(found.texts, classes, labels_file)
        return ImageRecords(FolderSource(self.place, found.names), labels, classes, found.ignored)

    def _labelled(self, labels_file: str) -> "LabelledFolder":
        self._found = self._found or scan_labelled(self.place, labels_file, self.listing_cache)
        return self._found


def folder_layout(directory: str, classes: tuple[str, ...]) -> Literal["names", "indices"]:
    """Tell how the folders of ``directory`` are to be read.

    "indices" only for the layout of ImageNet-V2: the classes are the ILSVRC2012 synsets and every folder is called
    by a number below 1,000. Otherwise "names".
    """
    names = _subfolders(directory)
    numbered = bool(names) and all(is_number(name) and int(name) < len(classes) for name in names)
    return "indices" if numbered and classes == imagenet_classes() else "names"


def scan_class_folders(
    directory: str,
    classes: tuple[str, ...],
    layout: Literal["names", "indices"] = "names",
    listing_cache: ListingCache = _UNKEPT,
    labels_option: str = _NO_LABELS.name,
) -> ImageRecords:
    """List the images of a folder that has one folder a class; images may lie deeper inside it.

    Not every class needs a folder. Hidden files and folders are passed over; hidden images are counted as ignored.

    Args:
        directory: The folder of a split.
        classes: Class names in index order.
        layout: The folders are called by class "names", or by class "indices" (0, 1, ...) as in ImageNet-V2.
        listing_cache: Where the listing is kept.
        labels_option: The option that takes a labels file, for messages.

    Raises:
        ValueError: No such folder, a folder that is no class, an image outside the class folders, or no image.
    """
    folders = sorted(_subfolders(directory), key=_before_its_files)
    loose = _loose_files(directory, labels_option)
    if layout == "names":
        index_of = {name: index for index, name in enumerate(classes)}
        expected = f"{classes[0]!r} ... {classes[-1]!r}"
    else:
        index_of = {str(index): index for index in range(len(classes))}
        index_of |= {name: int(name) for name in folders if is_number(name) and int(name) < len(classes)}
        expected = f"0 ... {len(classes) - 1}"
    require_known(folders, index_of, directory, expected)
    if not folders:
        raise ValueError(f"{directory} has no class folders; put one folder of images a class there")

    listing = _listing(directory, folders, listing_cache)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"]) + loose
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    labels = np.repeat(np.array([index_of[name] for name in folders], dtype=np.int64), listing["counts"])
    return ImageRecords(FolderSource(directory, names), labels, classes, ignored)


class LabelledFolder(NamedTuple):
    """The N images of a folder and the label of each as its labels file has it; how many other files there are."""

    names: PackedNames
    texts: list[str]
    ignored: int


def scan_labelled(directory: str, labels_file: str, listing_cache: ListingCache = _UNKEPT) -> LabelledFolder:
    """List the images of a folder, and of the folders in it, that a labels file labels.

    For ``labels_file`` see :func:`volo.data.sources.label_files.label_texts`; names in it are relative to
    ``directory``.

    Raises:
        ValueError: No such folder, no image, or lines that do not match the files.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root, data.train_split and data.val_split")
    listing = _listing(directory, [""], listing_cache)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"])  # the labels file, it may be
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    return LabelledFolder(names, label_texts(list(names), labels_file, directory), ignored)


# ------------------------------------------------------------------------------------------------- listing


def _before_its_files(folder: str) -> str:
    """Key that sorts folders as the paths of their files are sorted: "a-b/x" stands before "a/x"."""
    return folder + "/"


def _listing(directory: str, folders: list[str], listing_cache: ListingCache) -> Arrays:
    """List ``folders``, or find them listed: names of the images, how many each folder has, what else was there.

    Folder "" stands for ``directory`` itself.
    """
    place = os.path.abspath(directory)
    kind = "folder" if folders == [""] else "class folders"

    def is_fresh(kept: Arrays) -> bool:
        known = PackedNames(kept["folders"], kept["folder_ends"])
        if known != PackedNames.of(folders):
            return False
        inside = PackedNames(kept["inside"], kept["inside_ends"])
        with ThreadPoolExecutor(_THREADS) as pool:
            times = list(pool.map(lambda place: _changed_at(os.path.join(directory, place)), inside))
        return times == kept["times"].tolist()

    return listing_cache.get(
        kind, place, lambda: _list(directory, folders), is_fresh, lambda arrays: arrays["times"].max() / 1e9
    )


def _list(directory: str, folders: list[str]) -> Arrays:
    bar = ProgressBar(len(folders), f"listing {directory}", log_every=max(len(folders) // 10, 1), delay=10)
    found = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for one in pool.map(lambda folder: _list_one(directory, folder), folders):
            found.append(one)
            bar.update(1)
    bar.close()
    images = PackedNames.join([one.images for one in found])
    strays = PackedNames.of([name for one in found for name in one.strays][:_SHOWN])
    inside = PackedNames.of(place for one in found for place in one.places)
    known = PackedNames.of(folders)
    return {
        "names": images.text,
        "name_ends": images.ends,
        "counts": np.array([len(one.images) for one in found], dtype=np.int64),
        "folders": known.text,
        "folder_ends": known.ends,
        "inside": inside.text,
        "inside_ends": inside.ends,
        "times": np.array([time for one in found for time in one.times], dtype=np.int64),
        "strays": strays.text,
        "stray_ends": strays.ends,
        "ignored": np.array(sum(one.ignored for one in found)),
    }


class _Found(NamedTuple):
    """What is in one folder: its images in order, and how many other files and some of their names; the folders in it
    and itself, and when each was last changed, in ns."""

    images: PackedNames
    ignored: int
    strays: list[str]
    places: list[str]
    times: list[int]


def _list_one(directory: str, folder: str) -> _Found:
    files, places, times, hidden = [], [], [], 0
    waiting: list[tuple[str, frozenset]] = [(folder, frozenset())]
    while waiting:
        place, above = waiting.pop()
        path = os.path.join(directory, place)
        try:
            # The time first: what is added while it is listed makes the listing stale, not wrong.
            status = os.stat(path)
            places.append(place)
            times.append(status.st_mtime_ns)
            this = (status.st_dev, status.st_ino)
            if this in above:
                raise ValueError(
                    f"{path} is, by a link, a folder that it lies in, so that listing it has no end; remove the link"
                )
            with os.scandir(path) as entries:
                for entry in entries:
                    name = f"{place}/{entry.name}" if place else entry.name
                    if entry.name.startswith("."):
                        hidden += has_image_suffix(entry.name)
                    elif not entry.is_dir():
                        files.append(name)  # dead links too, so that reading names them
                    else:
                        waiting.append((name, above | {this}))
        except OSError as error:
            raise ValueError(f"{path} cannot be listed: {error.strerror}") from error
    files.sort()
    others = [file for file in files if not has_image_suffix(file)]
    images = PackedNames.of(file for file in files if has_image_suffix(file))
    return _Found(images, len(others) + hidden, others[:_SHOWN], places, times)


def _changed_at(path: str) -> int:
    """Return when a folder was last changed, in ns; -1 where it is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _require_images(directory: str, images: int, ignored: int, strays: PackedNames) -> None:
    if not images:
        names = ", ".join(strays) + (f" and {ignored - len(strays)} more" if ignored > len(strays) else "")
        left_out = f"; {ignored} files with other suffixes, or hidden, were left out: {names}" if ignored else ""
        raise ValueError(f"{directory} has no image ({', '.join(SUFFIX_FORMATS)}){left_out}")


def _subfolders(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root, data.train_split and data.val_split")
    return [e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith(".")]


def _loose_files(directory: str, labels_option: str) -> int:
    """Return how many files beside the class folders are hidden images, or no images; ValueError for other images."""
    names = sorted(entry.name for entry in os.scandir(directory) if not entry.is_dir())
    hidden = sum(name.startswith(".") and has_image_suffix(name) for name in names)
    visible = [name for name in names if not name.startswith(".")]
    if images := [name for name in visible if has_image_suffix(name)]:
        raise ValueError(
            f"{len(images)} images of {directory} lie outside any class folder: {some(images)}. Move them into the "
            f"folder of their class, or give {labels_option}, a file of their labels"
        )
    return hidden + len(visible)
