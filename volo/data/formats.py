"""What ``data.root`` and a split point at, and who can read it.

A split is a path below the root: of a folder of images, of one or more tar archives (with ``*`` and ``{000..146}``),
or the name of a split of Parquet files. The root may be a URL, and so may a split, for archives.
"""

import glob
import os
import re

from volo.config import DataConfig
from volo.data.archives import ArchiveSplit
from volo.data.devkit import ARCHIVE as DEVKIT
from volo.data.folders import FolderSplit
from volo.data.labels import repeated, some
from volo.data.manifest import Manifests
from volo.data.parquet import ParquetSplit, has_parquet
from volo.data.ranges import file_system, is_url
from volo.data.records import Split

OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


def open_split(data: DataConfig, split: str, option: str) -> Split:
    """Open the images of a split; ValueError, with what is there instead, where there are none.

    Args:
        data: Where the data are, and in what format; with "auto", what is there decides.
        split: ``data.train_split`` or ``data.val_split``.
        option: The option that gave ``split``, for messages.
    """
    root, split = data.root.removeprefix("file://"), split.removeprefix("file://")
    if is_url(root) or is_url(split):
        target = split if is_url(split) else f"{root.rstrip('/')}/{split}"
        if data.format not in ("auto", "tar"):
            raise ValueError(f"data.format is {data.format!r}, but only tar archives are read from a URL ({target})")
        return _archives(data, target, option)
    if not os.path.isdir(root):
        raise ValueError(f"data.root is {root!r}, which is not a folder; give the folder that holds the images")
    target = os.path.join(root, split)
    found = data.format if data.format != "auto" else _format_of(root, target, split)
    if found == "tar":
        return _archives(data, target, option)
    if found == "parquet":
        return ParquetSplit(target if has_parquet(target) else root, split, option)
    if not os.path.isdir(target):
        there = some(sorted(os.listdir(root))) if os.listdir(root) else "nothing"
        raise ValueError(f"{option} is {split!r}, but data.root ({root}) has no such folder; it holds {there}")
    return FolderSplit(target, Manifests.of(data.cache, data.relist), _devkit(root))


def is_pattern(path: str) -> bool:
    """Tell whether ``path`` stands for several: with ``*``, ``?``, ``[...]`` or ``{...}`` in it."""
    return re.search(r"[*?\[{]", path) is not None


def _format_of(root: str, target: str, split: str) -> str:
    """Tell what a split is by what is there: "folder", "tar" or "parquet"."""
    if os.path.isdir(target):
        entries = [entry for entry in os.scandir(target) if not entry.name.startswith(".")]
        if any(entry.is_dir() for entry in entries):  # class folders, whatever lies beside them
            return "folder"
        if any(entry.name.endswith(".tar") for entry in entries):
            return "tar"
        return "parquet" if has_parquet(target) else "folder"
    if target.endswith(".tar") or is_pattern(split) or _official(root, split):
        return "tar"
    return "parquet" if has_parquet(root) else "folder"


def _archives(data: DataConfig, target: str, option: str) -> ArchiveSplit:
    """Open the archives that ``target`` stands for: itself, those of a folder, or those that fit a pattern."""
    official = None if is_url(target) or os.path.exists(target) else _official(*os.path.split(target))
    urls = [official] if official else _expand(target)
    if twice := repeated(urls):
        raise ValueError(f"{option} names {some(twice)} more than once, and each image is to be seen once an epoch")
    if not urls:
        raise ValueError(f"{option}: there is no tar archive {target}; give one, a folder of them, or a pattern")
    place = official or target
    devkit = None if is_url(target) else _devkit(data.root.removeprefix("file://")) or _devkit(os.path.dirname(place))
    return ArchiveSplit(urls, place, Manifests.of(data.cache, data.relist), devkit)


def _expand(target: str) -> list[str]:
    """Return the archives of a path or URL: braces written out, * and ? matched, folders listed."""
    if not is_url(target) and os.path.isdir(target):
        return sorted(glob.glob(os.path.join(glob.escape(target), "*.tar")))
    from braceexpand import braceexpand

    found = []
    for one in braceexpand(target) if "{" in target else [target]:
        if is_url(one) and not one.endswith(".tar"):
            one += "" if is_pattern(one) else "/*.tar"
        if not is_pattern(one):
            found.append(one)
        elif is_url(one):
            system, path = file_system(one)
            found += sorted(system.unstrip_protocol(match) for match in system.glob(path))
        else:
            found += sorted(glob.glob(one))
    return found


def _official(root: str, split: str) -> str | None:
    """Return the official archive of a split of ILSVRC2012, if it is there."""
    path = os.path.join(root, OFFICIAL.get(split, ""))
    return path if os.path.isfile(path) else None


def _devkit(folder: str) -> str | None:
    """Return the development kit of ILSVRC2012 in a folder, if it is there."""
    path = os.path.join(folder, DEVKIT)
    return path if os.path.isfile(path) else None
