"""The official files of ILSVRC2012, and opening what lies in a folder of them."""

from dataclasses import dataclass
from pathlib import Path

from volo.config import DataConfig
from volo.data.sources.formats import open_split
from volo.data.sources.records import ImageRecords, class_names
from volo.runtime.program import with_options_of

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
_OPTIONS_HERE = {
    "data.root": "--source",
    "data.val_labels": "--devkit",
    'data.val_split ("none" evaluates nothing)': "split val",
    "data.train_split": "split train",
}
IMAGES = {"train": 1_281_167, "val": 50_000}


@dataclass(frozen=True)
class ImageNetFiles:
    """Where the images are, which of them, and how many there are to be.

    Args:
        folder: Holds the official archives, or anything else that data.root takes.
        splits: "train", "val" or both.
        expect: Images that each split is to have.
        cache: As data.cache.
        devkit: The development kit; None takes the one in ``folder``.
    """

    folder: str
    splits: tuple[str, ...] = ("train", "val")
    expect: tuple[int, ...] = (IMAGES["train"], IMAGES["val"])
    cache: str = "auto"
    devkit: str | None = None

    def open(self) -> dict[str, ImageRecords]:
        """Return the images of each split, sorted into classes; ValueError where they cannot be found or sorted."""
        data = DataConfig(self.folder, cache=self.cache, val_labels=self.devkit)
        try:
            opened = {split: open_split(data, split) for split in self.splits}
            classes = class_names("folders", opened["train"]) if "train" in opened else class_names("imagenet")
            return {split: records.records(classes) for split, records in opened.items()}
        except ValueError as error:
            raise ValueError(with_options_of(_OPTIONS_HERE, str(error))) from error

    def check(self, counts: dict[str, int]) -> str:
        """Return the counts in words; ValueError where one is not as expected."""
        wanted = dict(zip(self.splits, self.expect, strict=True))
        wrong = [split for split, count in counts.items() if count != wanted[split]]
        if wrong:
            told = "; ".join(f"{split} has {counts[split]:,} images, not {wanted[split]:,}" for split in wrong)
            raise ValueError(
                f"{told}. See with 'verify' that the archives are whole; of a subset, give the counts with --expect"
            )
        return ", ".join(f"{split} {n:,} images" for split, n in counts.items()) + ", as many as there are to be"


def require_free(folder: Path, mine: str) -> None:
    """Raise ValueError where something stands in ``folder`` that was not written by the same command before.

    Args:
        folder: The output.
        mine: Name of the file in it that says so.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / mine).is_file():
        raise ValueError(f"--output {folder} exists already; it is not touched: name another, or move it away")
