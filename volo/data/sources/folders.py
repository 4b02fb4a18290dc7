"""Images in folders: one folder per class, or any folder with a labels file."""

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

_THREADS = 16  # listing a network file system is mostly waiting
_SHOWN = 10  # names in a message
_UNKEPT = ListingCache(None)
_NO_LABELS = LabelsOption()


class FolderSplit(Split):
    """A folder with one folder per class, or with any layout if a labels file or the development kit labels it.

    Args:
        location: The folder.
        labels: Labels of the images if they are not in class folders.
        listing_cache: Keeps the listing.
    """

    def __init__(self, location: str, labels: LabelsOption = _NO_LABELS, listing_cache: ListingCache = _UNKEPT):
        super().__init__(location, labels)
        self.listing_cache = listing_cache
        self._found: LabelledFolder | None = None

    def found_classes(self) -> list[str]:
        folders = _subfolders(self.location)
        labels_file = self.labels.file_for(bool(folders))
        if labels_file is None:
            _loose_files(self.location, self.labels.name)
        return sorted(set(self._labelled(labels_file).texts)) if labels_file else folders

    def has_class_folders(self) -> bool:
        return bool(_subfolders(self.location))

    def records(self, classes: tuple[str, ...]) -> ImageRecords:
        labels_file = self.labels.file_for(self.has_class_folders())
        if labels_file is None:
            return scan_class_folders(
                self.location, classes, listing_cache=self.listing_cache, labels_option=self.labels.name
            )
        found, self._found = self._labelled(labels_file), None
        labels = label_indices(found.texts, classes, labels_file)
        return ImageRecords(FolderSource(self.location, found.names), labels, classes, found.ignored)

    def _labelled(self, labels_file: str) -> "LabelledFolder":
        self._found = self._found or scan_labelled(self.location, labels_file, self.listing_cache)
        return self._found


def folder_layout(directory: str, classes: tuple[str, ...]) -> Literal["names", "indices"]:
    """Return whether the folders of ``directory`` are named by class name or by class index.

    "indices" is the layout of ImageNet-V2: the classes are the ILSVRC2012 synsets and the name of every folder is a
    number below 1,000. Anything else is "names".
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
    """List the images of a folder that has one folder per class; class folders may have subfolders.

    A class without a folder has no images. Hidden files and folders are skipped; hidden images are counted as ignored.

    Args:
        directory: The folder of a split.
        classes: Class names in index order.
        layout: Folders are named by class "names", or by class "indices" (0, 1, ...) as in ImageNet-V2.
        listing_cache: Keeps the listing.
        labels_option: The option that takes a labels file, for messages.

    Raises:
        ValueError: There is no such folder or no image, a folder is not a class, or an image is outside the class
            folders.
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
        raise ValueError(f"{directory} has no class folders. Put one folder of images per class there")

    listing = _listing(directory, folders, listing_cache)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"]) + loose
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    labels = np.repeat(np.array([index_of[name] for name in folders], dtype=np.int64), listing["counts"])
    return ImageRecords(FolderSource(directory, names), labels, classes, ignored)


class LabelledFolder(NamedTuple):
    """The images of a folder with a labels file.

    Args:
        names: Names of the N images.
        texts: Label of each image, as in the labels file.
        ignored: Number of hidden images and of other files.
    """

    names: PackedNames
    texts: list[str]
    ignored: int


def scan_labelled(directory: str, labels_file: str, listing_cache: ListingCache = _UNKEPT) -> LabelledFolder:
    """List the images of a folder and its subfolders, with their labels from a labels file.

    For ``labels_file`` see :func:`volo.data.sources.label_files.label_texts`; names in it are relative to
    ``directory``.

    Raises:
        ValueError: There is no such folder or no image, or the labels file does not match the images.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder. Check data.root, data.train_split and data.val_split")
    listing = _listing(directory, [""], listing_cache)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"])
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    return LabelledFolder(names, label_texts(list(names), labels_file, directory), ignored)


# ------------------------------------------------------------------------------------------------- listing


def _before_its_files(folder: str) -> str:
    """Return the key that sorts folders as the paths of their files are sorted: "a-b/x" is before "a/x"."""
    return folder + "/"


def _listing(directory: str, folders: list[str], listing_cache: ListingCache) -> Arrays:
    """Return the listing of ``folders``, cached or new, with the arrays of :func:`_list`.

    Folder "" is ``directory`` itself.
    """
    location = os.path.abspath(directory)
    kind = "folder" if folders == [""] else "class folders"

    def is_fresh(kept: Arrays) -> bool:
        known = PackedNames(kept["folders"], kept["folder_ends"])
        if known != PackedNames.of(folders) or not _as_listed(PackedNames(kept["names"], kept["name_ends"])):
            return False
        inside = PackedNames(kept["inside"], kept["inside_ends"])
        with ThreadPoolExecutor(_THREADS) as pool:
            times = list(pool.map(lambda folder: _changed_at(os.path.join(directory, folder)), inside))
        return times == kept["times"].tolist()

    return listing_cache.get(
        kind, location, lambda: _list(directory, folders), is_fresh, lambda arrays: arrays["times"].max() / 1e9
    )


def _as_listed(names: PackedNames) -> bool:
    """Return whether ``names`` are such as a listing gives: anybody may have written into a shared cache folder."""
    text = names.text.tobytes()
    first = names.text[np.concatenate([[0], names.ends[:-1]])] if len(names) else names.text
    return b"\0" not in text and b"/." not in text and not np.isin(first, list(b"/.")).any()


def _list(directory: str, folders: list[str]) -> Arrays:
    """List the images in ``folders`` of ``directory`` and in their subfolders.

    Returns:
        ``names`` of the images and ``counts``, the number of them in each of ``folders``; the folders ``inside``,
        themselves included, and the ``times`` in ns at which these last changed; ``ignored``, the number of hidden
        images and of other files, and ``strays``, some of their names.
    """
    bar = ProgressBar(len(folders), f"listing {directory}", log_every=max(len(folders) // 10, 1), delay=10)
    found = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for one in pool.map(lambda folder: _list_one(directory, folder), folders):
            found.append(one)
            bar.update(1)
    bar.close()
    images = PackedNames.join([one.images for one in found])
    strays = PackedNames.of([name for one in found for name in one.strays][:_SHOWN])
    inside = PackedNames.of(folder for one in found for folder in one.folders)
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
    """The content of one folder.

    Args:
        images: Sorted paths of its images, from the folder that is listed.
        ignored: Number of hidden images and of other files.
        strays: Some paths of other files.
        folders: The folder itself and its subfolders.
        times: When each of these last changed, in ns.
    """

    images: PackedNames
    ignored: int
    strays: list[str]
    folders: list[str]
    times: list[int]


def _list_one(directory: str, folder: str) -> _Found:
    files, folders, times, hidden = [], [], [], 0
    waiting: list[tuple[str, frozenset]] = [(folder, frozenset())]
    while waiting:
        current, above = waiting.pop()
        path = os.path.join(directory, current)
        try:
            # The time first: a file that is added during the listing then makes it stale, not wrong.
            status = os.stat(path)
            folders.append(current)
            times.append(status.st_mtime_ns)
            this = (status.st_dev, status.st_ino)
            if this in above:
                raise ValueError(f"{path} links to a folder that contains it, so its listing never ends. Remove it")
            with os.scandir(path) as entries:
                for entry in entries:
                    name = f"{current}/{entry.name}" if current else entry.name
                    if entry.name.startswith("."):
                        hidden += has_image_suffix(entry.name)
                    elif not entry.is_dir():
                        _require_regular(entry)
                        files.append(name)  # dead links too: reading them gives an error with their name
                    else:
                        waiting.append((name, above | {this}))
        except OSError as error:
            raise ValueError(f"{path} cannot be listed: {error.strerror}") from error
    files.sort()
    others = [file for file in files if not has_image_suffix(file)]
    images = PackedNames.of(file for file in files if has_image_suffix(file))
    return _Found(images, len(others) + hidden, others[:_SHOWN], folders, times)


def _require_regular(entry: os.DirEntry) -> None:
    """Raise ValueError if ``entry`` has the suffix of an image and is a pipe, a socket or a device, or links to one."""
    if not entry.is_file() and has_image_suffix(entry.name) and os.path.exists(entry.path):
        raise ValueError(f"{entry.path} is a pipe, a socket or a device, not a regular file. Remove it")


def _changed_at(path: str) -> int:
    """Return when a folder last changed, in ns; -1 if it is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _require_images(directory: str, images: int, ignored: int, strays: PackedNames) -> None:
    if not images:
        names = ", ".join(strays) + (f" and {ignored - len(strays)} more" if ignored > len(strays) else "")
        left_out = f"; {ignored} files that are hidden or have other suffixes were ignored: {names}" if ignored else ""
        raise ValueError(f"{directory} has no image ({', '.join(SUFFIX_FORMATS)}){left_out}")


def _subfolders(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder. Check data.root, data.train_split and data.val_split")
    return [e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith(".")]


def _loose_files(directory: str, labels_option: str) -> int:
    """Count hidden images and visible other files beside the class folders; ValueError if a visible image is there."""
    names = sorted(entry.name for entry in os.scandir(directory) if not entry.is_dir())
    hidden = sum(name.startswith(".") and has_image_suffix(name) for name in names)
    visible = [name for name in names if not name.startswith(".")]
    if images := [name for name in visible if has_image_suffix(name)]:
        raise ValueError(
            f"{len(images)} images of {directory} are outside the class folders: {some(images)}. Move them into the "
            f"folder of their class, or give their labels with {labels_option}"
        )
    return hidden + len(visible)
