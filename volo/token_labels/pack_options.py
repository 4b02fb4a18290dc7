"""The options of scripts/pack_token_labels.py; nothing heavy is imported here, so that --help answers at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PackOptions:
    """What to pack, and what the label files do not say about their teacher.

    Args:
        source: Folder of the label files.
        output: Store to write (a folder).
        teacher: Name of the network that gave the labels.
        covers: What a map covers: "center_crop", as in the published labels, or "whole_image".
        exif: Whether the teacher saw images turned by their EXIF orientation tags; as data.exif of the training.
        num_classes: Classes of the teacher; by default those of the class list.
        class_list: "imagenet" (the default without num_classes), or a text file with one class name per line.
        images: Folder, archive or shards of the images that the labels are for; each must have a label. By default this
            is not checked.
        labels: Labels of images that are not sorted into classes, as data.train_labels of the training.
        cache: Folder that keeps listings and indices, as data.cache of the training.
        overwrite: Replace an existing store.
    """

    source: str
    output: str
    teacher: str = "published"
    covers: Literal["center_crop", "whole_image"] = "center_crop"
    exif: Literal["ignore", "apply"] = "ignore"
    num_classes: int | None = None
    class_list: str | None = None
    images: str | None = None
    labels: str | None = None
    cache: str = "auto"
    overwrite: bool = False
