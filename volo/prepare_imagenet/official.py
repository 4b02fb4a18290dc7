"""Opening the images of ILSVRC2012 and checking that they are complete."""

from pathlib import Path

from volo.config import DataConfig
from volo.data.sources.formats import open_split
from volo.data.sources.records import ImageRecords, class_names
from volo.prepare_imagenet.options import IndexOptions
from volo.runtime.program import with_options_of

_OPTIONS_HERE = {
    "data.root": "--source",
    "data.val_labels": "--devkit",
    'data.val_split ("none" evaluates nothing)': "split val",
    "data.train_split": "split train",
}


def open_splits(options: IndexOptions) -> dict[str, ImageRecords]:
    """Return the images of each split, sorted into classes; ValueError if they cannot be found or sorted."""
    data = DataConfig(options.source, cache=options.cache, val_labels=options.devkit)
    try:
        opened = {split: open_split(data, split) for split in options.expected}
        classes = class_names("folders", opened["train"]) if "train" in opened else class_names("imagenet")
        return {split: records.records(classes) for split, records in opened.items()}
    except ValueError as error:
        raise ValueError(with_options_of(_OPTIONS_HERE, str(error))) from error


def check_counts(options: IndexOptions, counts: dict[str, int]) -> str:
    """Return the number of images of each split in words; ValueError if one is not as expected."""
    wrong = [
        f"{split} has {counts[split]:,} images, not {expected:,}"
        for split, expected in options.expected.items()
        if counts[split] != expected
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. Check the archives with 'verify'; for a subset, give its counts with --expect_train "
            "and --expect_val"
        )
    return ", ".join(f"{split} {n:,} images" for split, n in counts.items()) + ", as expected"


def require_free(folder: Path, mine: str) -> None:
    """Raise ValueError if ``folder`` holds something that the same command did not write.

    Args:
        folder: The output.
        mine: Name of the file by which the command recognises its own output.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / mine).is_file():
        raise ValueError(f"--output {folder} exists already and is left as it is; name another folder, or move it away")
