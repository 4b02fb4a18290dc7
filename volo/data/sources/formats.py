"""Opens a split of ``data.root`` in whatever format it is stored.

A split is a path below the root, to a folder of images or to one or more tar archives (with ``*`` and ``{000..146}``),
or the name of a split of Parquet files. For archives, the root or the split may be a URL.
"""

import glob
import os
import re
from typing import Literal

from volo.config import DataConfig
from volo.data.sources.archives import ArchiveSplit
from volo.data.sources.devkit import ARCHIVE as DEVKIT
from volo.data.sources.folders import FolderSplit
from volo.data.sources.label_files import LabelsOption, repeated, some
from volo.data.sources.listing_cache import ListingCache
from volo.data.sources.parquet import ParquetSplit, has_parquet
from volo.data.sources.ranges import file_system, is_url
from volo.data.sources.records import Split

OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


def open_split(data: DataConfig, which: Literal["train", "val"]) -> Split:
    """Open the training or validation images, in the format that ``data.format`` names or, if "auto", detected.

    Raises ValueError if there are none; the message lists what the root holds.
    """
    if which == "train":
        split, option, labels_file = data.train_split, "data.train_split", data.train_labels
    else:
        split, option, labels_file = data.val_split, 'data.val_split ("none" evaluates nothing)', data.val_labels
    root, split = data.root.removeprefix("file://"), split.removeprefix("file://")
    labels = LabelsOption(f"data.{which}_labels", labels_file)
    if labels_file is not None and not os.path.exists(labels_file):  # found now, not once the images are listed
        raise ValueError(f"{labels.name} is {labels_file!r}, which does not exist")
    if is_url(root) or is_url(split):
        if data.format not in ("auto", "tar"):
            url = split if is_url(split) else root
            raise ValueError(
                f"data.format is {data.format!r}, but only tar archives are read from a URL ({url}). Give auto or tar"
            )
        return _archives(data, root, split, option, labels)
    if not os.path.isdir(root):
        raise ValueError(f"data.root is {root!r}, which is not a folder. Give the folder that holds the images")
    target = os.path.join(root, split)
    labels = labels._replace(devkit=_devkit(root) or _devkit(os.path.dirname(target)))
    found = data.format if data.format != "auto" else _format_of(root, target, split)
    if found == "tar":
        return _archives(data, root, split, option, labels)
    if found == "parquet":
        return ParquetSplit(target if has_parquet(target) else root, split, option, labels)
    if not os.path.isdir(target):
        there = some(sorted(os.listdir(root))) if os.listdir(root) else "nothing"
        raise ValueError(f"{option} is {split!r}, but data.root ({root}) has no such folder; it holds {there}")
    return FolderSplit(target, labels, ListingCache.of(data.cache))


def is_pattern(path: str) -> bool:
    """Return whether ``path`` has ``*``, ``?``, ``[...]`` or ``{...}`` in it, outside the query of a web address."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    return re.search(r"[*?\[{]", path) is not None


def _format_of(root: str, target: str, split: str) -> str:
    """Detect the format of a split: "folder", "tar" or "parquet"."""
    if os.path.isdir(target):
        entries = [entry for entry in os.scandir(target) if not entry.name.startswith(".")]
        if any(entry.is_dir() for entry in entries):  # class folders, whatever else is in there
            return "folder"
        if any(entry.name.endswith(".tar") for entry in entries):
            return "tar"
        return "parquet" if has_parquet(target) else "folder"
    if target.endswith(".tar") or is_pattern(split) or _official(root, split):
        return "tar"
    return "parquet" if has_parquet(root) else "folder"


def _archives(data: DataConfig, root: str, split: str, option: str, labels: LabelsOption) -> ArchiveSplit:
    """Open the archives of a split, which is one archive, a folder of archives or a pattern."""
    if is_url(root) or is_url(split):
        location = split if is_url(split) else f"{root.rstrip('/')}/{split}"
        urls = _remote_archives(location)
    else:
        location = os.path.join(root, split)
        urls = _local_archives(root, split)
    if twice := repeated(urls):
        raise ValueError(f"{option} names {some(twice)} more than once. Name each archive once")
    if not urls:
        raise ValueError(
            f"{option}: there is no tar archive {location}. Give an archive, a folder of them or a pattern"
        )
    location = urls[0] if len(urls) == 1 else location
    return ArchiveSplit(urls, location, labels, ListingCache.of(data.cache))


def _local_archives(root: str, split: str) -> list[str]:
    """Return the archives of ``split``; an existing file or folder of that very name is not taken for a pattern."""
    path = os.path.join(root, split)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.exists(path):
        return [path]
    if official := _official(root, split):
        return [official]
    folder, rest = root, split
    while "/" in rest and os.path.isdir(os.path.join(folder, rest.partition("/")[0] or "/")):
        first, _, rest = rest.partition("/")
        folder = os.path.join(folder, first or "/")
    found = []
    for one in _braces(rest):
        path = os.path.join(folder, one)
        pattern = os.path.join(glob.escape(folder), one)  # only the part that does not exist is a pattern
        found += [path] if os.path.exists(path) or not is_pattern(one) else sorted(glob.glob(pattern))
    return found


def _remote_archives(url: str) -> list[str]:
    """Return the archives of a URL: braces are expanded, * and ? matched, folders listed."""
    found = []
    for one in _braces(url):
        if not is_pattern(one) and one.partition("?")[0].endswith(".tar"):
            found.append(one)
        else:
            system, path = file_system(one if is_pattern(one) else f"{one}/*.tar")
            found += sorted(system.unstrip_protocol(match) for match in system.glob(path))
    return found


def _braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern, as in x-{0..2}.tar and x-{a,b}.tar."""
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def _official(root: str, split: str) -> str | None:
    """Return the official archive of a split of ILSVRC2012, if it exists."""
    path = os.path.join(root, OFFICIAL.get(split, ""))
    return path if os.path.isfile(path) else None


def _devkit(folder: str) -> str | None:
    """Return the development kit of ILSVRC2012 in a folder, if it exists."""
    path = os.path.join(folder, DEVKIT)
    return path if os.path.isfile(path) else None
