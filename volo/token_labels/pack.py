"""Running scripts/pack_token_labels.py: packing a folder of label files, ``<root>/<class>/<stem>.pt``, into a store.

A million small files would be opened and unpickled in every epoch; the store is read in place. h x w is the size of
a label map in cells.
"""

import logging
from collections import Counter
from pathlib import Path

from volo.data.sources.base import PackedNames
from volo.data.sources.records import class_names, has_image_suffix, imagenet_classes
from volo.reporting import LINES, ProgressBar, setup_logging
from volo.runtime.program import DONE, checking_usage, with_options_of
from volo.token_labels.images import OPTIONS_HERE, open_images
from volo.token_labels.opening import match_images
from volo.token_labels.pack_options import PackOptions
from volo.token_labels.pt_folder import PublishedLabels, files_below
from volo.token_labels.store import label_key
from volo.token_labels.writer import StoreWriter

_logger = logging.getLogger("volo")


def run_packing(options: PackOptions) -> int:
    """Pack, and print a summary; return the exit code."""
    setup_logging(None)
    with checking_usage():
        classes, num_classes = teacher_classes(options.class_list, options.num_classes)
        _logger.info("listing %s", options.source)
        labels = PublishedLabels(options.source, num_classes)
    top_k = labels.header.top_k  # reads the first file, which may be damaged
    with checking_usage():
        names = image_names(options) if options.images else None
        keys = entry_keys(labels, names, num_classes)
        writer = StoreWriter(
            options.output,
            teacher=options.teacher,
            covers=options.covers,
            top_k=top_k,
            num_classes=num_classes,
            classes=classes,
            exif=options.exif,
            overwrite=options.overwrite,
        )
    sizes: Counter[tuple[int, int]] = Counter()
    progress = ProgressBar(len(labels), "packing", log_every=max(len(labels) // 100, 1))
    try:
        with writer:
            for entry, key in enumerate(keys):
                label = labels.read(entry)
                writer.add(key, label)
                sizes[label.scores.shape[1:]] += 1
                progress.update(1)
    except OSError as error:
        raise ValueError(f"{options.output} could not be written ({error.strerror}) and was removed") from error
    finally:
        progress.close()
    _logger.info("%s", summary(writer.path, len(labels), sizes, labels.ignored), extra=LINES)
    return DONE


def teacher_classes(class_list: str | None, num_classes: int | None) -> tuple[tuple[str, ...] | None, int]:
    """Return the teacher's class names, None if unknown, and their number."""
    if class_list is None and num_classes is not None:
        return None, num_classes
    if class_list in (None, "imagenet"):
        classes = imagenet_classes()
    elif not Path(class_list).is_file():
        raise ValueError(
            f'--class_list is {class_list!r}; it takes "imagenet" or a text file with one class name per line'
        )
    else:
        classes = class_names(class_list)
    if num_classes not in (None, len(classes)):
        raise ValueError(
            f"--num_classes is {num_classes:,}, but --class_list {class_list} names {len(classes):,} classes; give "
            "only the list of the teacher's classes"
        )
    return classes, len(classes)


def image_names(options: PackOptions) -> PackedNames:
    """Return the names of the images; ValueError if there are none.

    Images in a folder may be of any class. Archives may need the class list to know the names.
    """
    assert options.images is not None
    folder = Path(options.images)
    if folder.is_dir() and (names := sorted(name for name in files_below(folder) if has_image_suffix(name))):
        return PackedNames.of(names)
    class_list = options.class_list or ("imagenet" if options.num_classes is None else "folders")
    try:
        return open_images(options.images, class_list, options.labels, options.cache).names
    except ValueError as error:
        raise ValueError(with_options_of(OPTIONS_HERE, str(error))) from error


def entry_keys(labels: PublishedLabels, names: PackedNames | None, num_classes: int) -> list[str]:
    """Return the key of each label file in the store: that of its image, if the images are given."""
    keys = [labels.key(entry) for entry in range(len(labels))]
    if names is None:
        return keys
    image_keys = [label_key(name) for name in names]
    for key, entry in zip(image_keys, match_images(labels, image_keys, num_classes, None), strict=True):
        keys[entry] = key  # the label file's name may have been cut at the first dot
    _logger.info("%d images have a label; %d labels belong to no image", len(names), len(keys) - len(names))
    return keys


def summary(path: Path, entries: int, sizes: Counter[tuple[int, int]], ignored: int) -> str:
    """Return a line or two about what was packed."""
    common = ", ".join(f"{h}x{w} ({count:,})" for (h, w), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5:,} other sizes" if len(sizes) > 5 else ""
    files = [file.stat().st_size for file in path.iterdir()]
    left_out = f"\n{ignored:,} files of other kinds were ignored" if ignored else ""
    return f"{path}: {entries:,} entries, maps {common}{more}, {sum(files):,} bytes in {len(files)} files{left_out}"
