"""What ``data.root`` and a split point at, and who can read it."""

import os

from volo.config import DataConfig
from volo.data.folders import FolderSplit
from volo.data.labels import some
from volo.data.manifest import Manifests
from volo.data.records import Split


def open_split(data: DataConfig, split: str, option: str) -> Split:
    """Open the images of a split; ValueError, with what is there instead, where there are none.

    Args:
        data: Where the data are.
        split: ``data.train_split`` or ``data.val_split``.
        option: The option that gave ``split``, for messages.
    """
    manifests = Manifests.of(data.cache, data.relist)
    root = data.root
    if not os.path.isdir(root):
        raise ValueError(f"data.root is {root!r}, which is not a folder; give the folder that holds the images")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        there = some(sorted(os.listdir(root))) if os.listdir(root) else "nothing"
        raise ValueError(f"{option} is {split!r}, but data.root ({root}) has no such folder; it holds {there}")
    return FolderSplit(folder, manifests)
