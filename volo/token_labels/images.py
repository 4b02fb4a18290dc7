"""The images that labels are generated or packed for, given by one path, where train.py has data.root and a split."""

import os

from volo.config import DataConfig
from volo.data.sources.folders import FolderSplit, folder_layout, scan_class_folders
from volo.data.sources.formats import is_pattern, open_split
from volo.data.sources.ranges import is_url
from volo.data.sources.records import ImageRecords, class_names

OPTIONS_HERE = {
    "data.class_list": "--class_list",
    "data.train_split": "--images",
    "data.train_labels": "--labels",
    "data.root": "--images",
}
"""The names in these programs of the options that messages mention."""


def open_images(path: str, class_list: str, labels_file: str | None = None, cache: str = "auto") -> ImageRecords:
    """List the images of a folder, a tar archive or shards.

    Args:
        path: A folder of images, a tar archive, "train-{000..146}.tar", a folder of shards, or a URL.
        class_list: As ``data.class_list``.
        labels_file: As ``data.train_labels``.
        cache: As ``data.cache``.

    Raises:
        ValueError: No such images, or images of other classes.
    """
    path = path.removeprefix("file://")
    if not (is_url(path) or is_pattern(path) or os.path.exists(path)):
        raise ValueError(f"--images is {path!r}, which does not exist; give a folder, a tar archive, shards or a URL")
    root, name = os.path.split(path.rstrip("/"))
    if is_url(path) or not os.path.isdir(root or "."):
        root, name = "", path
    split = open_split(DataConfig(root or ".", train_split=name, train_labels=labels_file, cache=cache), "train")
    classes = class_names(class_list, split)
    if isinstance(split, FolderSplit) and labels_file is None and split.has_class_folders():
        return scan_class_folders(path, classes, folder_layout(path, classes), split.listing_cache, "--labels")
    return split.records(classes)
