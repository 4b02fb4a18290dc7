"""Images in folders: one folder a class, or all in one folder with a file of labels."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from volo.data.decode import SUFFIX_FORMATS
from volo.data.labels import is_number, read_labels, some
from volo.data.manifest import Arrays, Manifests
from volo.data.records import ImageRecords, Split, has_image_suffix, imagenet_classes, require_known
from volo.data.source import FolderSource, PackedNames
from volo.reporting import Progress

_THREADS = 16  # on a network file system listing is all waiting
_SHOWN = 10  # names in a message
_UNKEPT = Manifests(None)


class FolderSplit(Split):
    """A folder with one folder a class; with a labels file, one without such folders.

    Args:
        place: The folder.
        manifests: Where its listing is kept.
        devkit: Labels of the images where there are no class folders, and no labels file is given.
    """

    def __init__(self, place: str, manifests: Manifests = _UNKEPT, devkit: str | None = None):
        super().__init__(place)
        self.manifests = manifests
        self.devkit = devkit

    def class_folders(self) -> list[str]:
        return _subfolders(self.place)

    def records(self, classes: tuple[str, ...], labels_file: str | None = None) -> ImageRecords:
        if labels_file is None and self.devkit is not None and not self.class_folders():
            labels_file = self.devkit
        if labels_file is not None:
            return scan_flat(self.place, labels_file, classes, self.manifests)
        return scan_class_folders(self.place, classes, manifests=self.manifests)


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
    manifests: Manifests = _UNKEPT,
) -> ImageRecords:
    """List the images of a folder that has one folder a class; images may lie deeper inside it.

    Not every class needs a folder. Hidden files and folders are passed over.

    Args:
        directory: The folder of a split.
        classes: Class names in index order.
        layout: The folders are called by class "names", or by class "indices" (0, 1, ...) as in ImageNet-V2.
        manifests: Where the listing is kept.

    Raises:
        ValueError: No such folder, a folder that is no class, an image outside the class folders, or no image.
    """
    folders = sorted(_subfolders(directory), key=_before_its_files)
    loose = [name for name in _visible_files(directory) if has_image_suffix(name)]
    if loose:
        raise ValueError(
            f"{len(loose)} images of {directory} lie outside any class folder: {some(loose)}. Move them into the "
            "folder of their class; for a flat validation folder give data.val_labels"
        )
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

    listing = _listing(directory, folders, manifests)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"])
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    labels = np.repeat(np.array([index_of[name] for name in folders], dtype=np.int64), listing["counts"])
    return ImageRecords(FolderSource(directory, names), labels, classes, ignored)


def scan_flat(
    directory: str, labels_file: str, classes: tuple[str, ...], manifests: Manifests = _UNKEPT
) -> ImageRecords:
    """List the images of a folder without class folders, such as the 50,000 validation files of ILSVRC2012.

    For ``labels_file`` see :func:`volo.data.labels.read_labels`.

    Raises:
        ValueError: No such folder or file, no image, or lines that do not match the files or the classes.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root and data.val_split")
    if not os.path.exists(labels_file):
        raise ValueError(f"data.val_labels is {labels_file!r}, which is not a file")
    listing = _listing(directory, [""], manifests)
    names = PackedNames(listing["names"], listing["name_ends"])
    ignored = int(listing["ignored"])  # the labels file, it may be
    _require_images(directory, len(names), ignored, PackedNames(listing["strays"], listing["stray_ends"]))
    labels = read_labels(list(names), labels_file, directory, classes)
    return ImageRecords(FolderSource(directory, names), labels, classes, ignored)


# ------------------------------------------------------------------------------------------------- listing


def _before_its_files(folder: str) -> str:
    """Key that sorts folders as the paths of their files are sorted: "a-b/x" stands before "a/x"."""
    return folder + "/"


def _listing(directory: str, folders: list[str], manifests: Manifests) -> Arrays:
    """List ``folders``, or find them listed: names of the images, how many each folder has, what else was there.

    Folder "" stands for the files of ``directory`` itself, without those of folders in it.
    """
    place = os.path.abspath(directory)
    kind = "flat folder" if folders == [""] else "class folders"

    def is_fresh(kept: Arrays) -> bool:
        known = PackedNames(kept["folders"], kept["folder_ends"])
        if known != PackedNames.of(folders):
            return False
        inside = PackedNames(kept["inside"], kept["inside_ends"])
        with ThreadPoolExecutor(_THREADS) as pool:
            times = list(pool.map(lambda place: _changed_at(os.path.join(directory, place)), inside))
        return times == kept["times"].tolist()

    return manifests.get(
        kind, place, lambda: _list(directory, folders), is_fresh, lambda arrays: arrays["times"].max() / 1e9
    )


def _list(directory: str, folders: list[str]) -> Arrays:
    bar = Progress(len(folders), f"listing {directory}", log_every=max(len(folders) // 10, 1), delay=10)
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
    files, places, times = [], [], []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        path = os.path.join(directory, place)
        # The time first: what is added while it is listed makes the listing stale, not wrong.
        places.append(place)
        times.append(_changed_at(path))
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = f"{place}/{entry.name}" if place else entry.name
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        files.append(name)  # dead links too, so that reading names them
                    elif folder:
                        waiting.append(name)
        except OSError as error:
            raise ValueError(f"{path} cannot be listed: {error.strerror}") from error
    files.sort()
    others = [file for file in files if not has_image_suffix(file)]
    images = PackedNames.of(file for file in files if has_image_suffix(file))
    return _Found(images, len(others), others[:_SHOWN], places, times)


def _changed_at(path: str) -> int:
    """Return when a folder was last changed, in ns; -1 where it is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _require_images(directory: str, images: int, ignored: int, strays: PackedNames) -> None:
    if not images:
        names = ", ".join(strays) + (f" and {ignored - len(strays)} more" if ignored > len(strays) else "")
        left_out = f"; {ignored} files with other suffixes were left out: {names}" if ignored else ""
        raise ValueError(f"{directory} has no image ({', '.join(SUFFIX_FORMATS)}){left_out}")


def _subfolders(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root, data.train_split and data.val_split")
    return [e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith(".")]


def _visible_files(directory: str) -> list[str]:
    return sorted(e.name for e in os.scandir(directory) if not e.is_dir() and not e.name.startswith("."))
