"""The options of scripts/prepare_imagenet.py; nothing heavy is imported here, so that --help answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare the archives with their published MD5 checksums.

    Args:
        source: Folder of the official archives.
    """

    source: str


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Index the archives for training, which then reads them in place (--data.root SOURCE).

    Args:
        source: Folder of the official archives, or anything else that data.root of train.py takes.
        split: Which images to take: one split, or "both".
        expect_train: Number of training images that there should be; for a subset, give its own.
        expect_val: Number of validation images that there should be.
        devkit: Development kit, or a file of labels, for the validation images; by default the kit in the source.
        cache: Folder that keeps listings and indices, as data.cache of the training.
    """

    source: str
    split: Literal["both", "train", "val"] = "both"
    expect_train: int = 1_281_167
    expect_val: int = 50_000
    devkit: str | None = None
    cache: str = "auto"

    @property
    def expected(self) -> dict[Literal["train", "val"], int]:
        """Number of images that each of the chosen splits should have."""
        counts: dict[Literal["train", "val"], int] = {"train": self.expect_train, "val": self.expect_val}
        return counts if self.split == "both" else {self.split: counts[self.split]}


@dataclass(frozen=True, kw_only=True)
class UnpackOptions(IndexOptions):
    """Unpack the archives into one folder per class, OUTPUT/train/<synset> and OUTPUT/val/<synset>.

    Args:
        output: Folder to write; another one than the source.
    """

    output: str

    def __post_init__(self):
        if Path(self.output).resolve() == Path(self.source).resolve():
            # A second run would take a part of what the first one wrote for the images themselves.
            raise ValueError(f"--output {self.output} is --source; name another folder")


@dataclass(frozen=True, kw_only=True)
class ShardOptions(UnpackOptions):
    """Write WebDataset shards of smaller images, and report what that changes.

    Args:
        max_side: Longest side in pixels; larger images are resized.
        quality: JPEG quality of resized images.
        images_per_shard: Number of images in each shard.
        workers: Number of processes; by default one per core, up to 16.
    """

    max_side: int = 512
    quality: int = 90
    images_per_shard: int = 1000
    workers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, least, most in (("max_side", 32, 1 << 16), ("quality", 1, 100), ("images_per_shard", 1, 1 << 20)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"--{name} is {value}; it should be {least} ... {most:,}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; it should be 0 or more")


COMMANDS = {"verify": VerifyOptions, "index": IndexOptions, "unpack": UnpackOptions, "shard": ShardOptions}
