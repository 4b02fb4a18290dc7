"""Which images there are and what class each of them has.

C is the number of classes, N the number of images. Classes are matched by name, never by position: a folder that
is not in the class list is an error, because a silent remap turns a good model into a bad number.
"""

import os
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from volo.data.decode import SUFFIX_FORMATS
from volo.data.source import FolderSource, PackedNames, Source


@dataclass(frozen=True)
class ImageRecords:
    """A list of labelled images, sorted by name.

    Args:
        source: Names and contents of the N files.
        labels: Class index of each image, int64 [N].
        classes: The C class names in index order.
        ignored: Files left out because their suffix is not that of an image.
    """

    source: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    ignored: int = 0

    def __post_init__(self):
        assert len(self.source) == len(self.labels)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def names(self) -> PackedNames:
        """Names of the images: "class/file.suffix", or "file.suffix" where there are no class folders."""
        return self.source.names

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.names[index]

    def read(self, index: int) -> bytes:
        """Return the content of an image's file; UnreadableImage where it is not there, or cannot be read."""
        return self.source.read(index)

    def location(self, index: int) -> str:
        """Return where a user finds the file, for messages."""
        return self.source.location(index)


def split_folder(root: str, split: str, option: str) -> str:
    """Return the folder of a split; ValueError, with what is there instead, where it does not exist.

    Args:
        root: The folder of ``data.root``.
        split: Name of the folder under it.
        option: The option that gave ``split``, for the message.
    """
    if not os.path.isdir(root):
        raise ValueError(f"data.root is {root!r}, which is not a folder; give the folder that holds the images")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        there = _some(sorted(os.listdir(root))) if os.listdir(root) else "nothing"
        raise ValueError(f"{option} is {split!r}, but data.root ({root}) has no such folder; it holds {there}")
    return folder


def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 ILSVRC2012 synsets in index order, from timm's package data."""
    return tuple(pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split())


def class_names(class_list: str, train_dir: str) -> tuple[str, ...]:
    """Return the class names in index order.

    Args:
        class_list: "folders": the folders of ``train_dir``, sorted as strings, as torchvision sorts them and as
            the published models index the synsets; where every name is a number, by its value, so that folder 10
            is class 10. "imagenet": the ILSVRC2012 synsets. Anything else: a text file, one name a line.
        train_dir: The training folder; only "folders" looks at it.

    Raises:
        ValueError: No such file or folder, a name given twice, or fewer than two classes.
    """
    if class_list == "imagenet":
        return imagenet_classes()
    if class_list == "folders":
        source, remedy = train_dir, "put one folder a class there, or name the classes with data.class_list"
        names = _subfolders(train_dir)
        key = (lambda name: (int(name), name)) if all(map(_is_number, names)) else None
        names = sorted(names, key=key)
    else:
        source, remedy = class_list, 'data.class_list takes "folders", "imagenet" or such a file'
        if not os.path.isfile(class_list):
            raise ValueError(f"data.class_list is {class_list!r}, which is not a file; {remedy}")
        names = [line.strip() for line in _lines(class_list) if line.strip()]
        if repeated := _repeated(names):
            raise ValueError(f"{class_list} names a class more than once: {_some(repeated)}")
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no class"
        raise ValueError(f"{source} holds {found}; a classifier needs at least two: {remedy}")
    return tuple(names)


def folder_layout(directory: str, classes: tuple[str, ...]) -> Literal["names", "indices"]:
    """Tell how the folders of ``directory`` are to be read.

    "indices" only for the layout of ImageNet-V2: the classes are the ILSVRC2012 synsets and every folder is called
    by a number below 1,000. Otherwise "names".
    """
    names = _subfolders(directory)
    numbered = bool(names) and all(_is_number(name) and int(name) < len(classes) for name in names)
    return "indices" if numbered and classes == imagenet_classes() else "names"


def scan_class_folders(
    directory: str, classes: tuple[str, ...], layout: Literal["names", "indices"] = "names"
) -> ImageRecords:
    """List the images of a folder that has one folder a class; images may lie deeper inside it.

    Not every class needs a folder. Hidden files and folders are passed over.

    Args:
        directory: The folder of a split.
        classes: Class names in index order.
        layout: The folders are called by class "names", or by class "indices" (0, 1, ...) as in ImageNet-V2.

    Raises:
        ValueError: No such folder, a folder that is no class, an image outside the class folders, or no image.
    """
    folders = sorted(_subfolders(directory))
    loose = [name for name in _visible_files(directory) if _has_image_suffix(name)]
    if loose:
        raise ValueError(
            f"{len(loose)} images of {directory} lie outside any class folder: {_some(loose)}. Move them into the "
            "folder of their class; for a flat validation folder give data.val_labels"
        )
    if layout == "names":
        index_of = {name: index for index, name in enumerate(classes)}
    else:
        index_of = {name: int(name) for name in folders if _is_number(name) and int(name) < len(classes)}
    unknown = [name for name in folders if name not in index_of]
    if unknown:
        expected = f"{classes[0]!r} ... {classes[-1]!r}" if layout == "names" else f"0 ... {len(classes) - 1}"
        raise ValueError(
            f"{len(unknown)} of {len(folders)} folders of {directory} are not among the {len(classes)} classes "
            f"({expected}): {_some(unknown)}. Folders are never mapped to other classes: point data.class_list at "
            "the list that the labels follow, or move these folders away"
        )

    files = [f"{name}/{file}" for name in folders for file in _files_below(os.path.join(directory, name))]
    ignored = [file for file in files if not _has_image_suffix(file)]
    paths = sorted(file for file in files if _has_image_suffix(file))
    _require_images(directory, paths, ignored, "class folders", bool(folders))
    labels = np.array([index_of[path.split("/", 1)[0]] for path in paths], dtype=np.int64)
    return ImageRecords(FolderSource(directory, PackedNames.of(paths)), labels, classes, ignored=len(ignored))


def scan_flat(directory: str, labels_file: str, classes: tuple[str, ...]) -> ImageRecords:
    """List the images of a folder without class folders, such as the 50,000 validation files of ILSVRC2012.

    ``labels_file`` has one line an image: "file-name label", or only "label", for the files in sorted order. Labels
    are class names throughout or 0-based class indices throughout. The ids of the development kit's
    ILSVRC2012_validation_ground_truth.txt (1-based, in an order of their own) are neither, and are refused.

    Raises:
        ValueError: No such folder or file, no image, or lines that do not match the files or the classes.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root and data.val_split")
    if not os.path.isfile(labels_file):
        raise ValueError(f"data.val_labels is {labels_file!r}, which is not a file")
    files = _visible_files(directory)
    ignored = [name for name in files if not _has_image_suffix(name)]  # the labels file, it may be
    names = [name for name in files if _has_image_suffix(name)]
    _require_images(directory, names, ignored, "images", True)

    lines = [line.strip() for line in _lines(labels_file) if line.strip()]
    texts = _labels_by_file(names, lines, directory, labels_file)
    labels = _parse_labels(texts, classes, labels_file)
    return ImageRecords(FolderSource(directory, PackedNames.of(names)), labels, classes, ignored=len(ignored))


def _labels_by_file(names: list[str], lines: list[str], directory: str, labels_file: str) -> list[str]:
    """Return the label text of each of ``names`` from lines of either form."""
    known = set(names)
    pairs = [line.split(maxsplit=1) for line in lines]
    if not any(pair[0] in known for pair in pairs):
        if len(lines) != len(names):
            raise ValueError(
                f"{labels_file} has {len(lines)} labels, but {directory} has {len(names)} images; give one label an "
                'image in the order of the sorted file names, or lines of the form "file-name label"'
            )
        return lines

    stray = [pair[0] for pair in pairs if pair[0] not in known or len(pair) == 1]
    by_name = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    missing = [name for name in names if name not in by_name]
    if stray or missing or len(by_name) != len(pairs):
        problems = {
            "lines without a label or file": stray,
            "images without a line": missing,
            "files with several lines": [] if stray or missing else _repeated([pair[0] for pair in pairs]),
        }
        told = "; ".join(f"{what}: {_some(which)}" for what, which in problems.items() if which)
        raise ValueError(f"{labels_file} does not match {directory}: {told}")
    return [by_name[name] for name in names]


def _parse_labels(texts: list[str], classes: tuple[str, ...], labels_file: str) -> np.ndarray:
    """Turn label texts into class indices: all of them names, or all of them 0-based indices."""
    index_of = {name: index for index, name in enumerate(classes)}
    if all(text in index_of for text in texts):
        return np.array([index_of[text] for text in texts], dtype=np.int64)
    if all(_is_number(text) and int(text) < len(classes) for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    by_number = all(map(_is_number, texts))
    wrong = [t for t in texts if t not in index_of and not (by_number and int(t) < len(classes))]
    hint = ""
    if by_number:
        hint = (
            " Indices start at 0; the ids of ILSVRC2012_validation_ground_truth.txt start at 1 and follow an order "
            "of their own, so they cannot be used: write synset names instead"
        )
    raise ValueError(
        f"{labels_file}: labels that are neither class names (such as {classes[0]!r}) nor indices below "
        f"{len(classes)}: {_some(sorted(set(wrong)))}.{hint}"
    )


def _require_images(directory: str, paths: list[str], ignored: list[str], wanted: str, has_any: bool) -> None:
    if paths:
        return
    if not has_any:
        raise ValueError(f"{directory} has no {wanted}; put one folder of images a class there")
    left_out = f"; {len(ignored)} files with other suffixes were left out: {_some(ignored)}" if ignored else ""
    raise ValueError(f"{directory} has no image ({', '.join(SUFFIX_FORMATS)}){left_out}")


def _subfolders(directory: str) -> list[str]:
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a folder; see data.root, data.train_split and data.val_split")
    return [e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith(".")]


def _visible_files(directory: str) -> list[str]:
    return sorted(e.name for e in os.scandir(directory) if not e.is_dir() and not e.name.startswith("."))


def _files_below(folder: str) -> list[str]:
    """All visible files under ``folder``, relative to it; dead links too, so that reading names them."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(place).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found += [prefix + name for name in files if not name.startswith(".")]
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error


def _has_image_suffix(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIX_FORMATS


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _repeated(names: list[str]) -> list[str]:
    ordered = sorted(names)
    return sorted({a for a, b in zip(ordered, ordered[1:], strict=False) if a == b})


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
