"""Memory per image of an index, in the main process and in forked workers, and of huge images."""

import gc
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from volo.config import AugmentConfig
from volo.data.pixels import decode, render
from volo.data.pixels.crop import ResizedCrop
from volo.data.pixels.plan import Plan
from volo.data.pixels.rand_augment import Op
from volo.data.pixels.transforms import TrainTransform
from volo.data.sources.archives import ArchiveSource
from volo.data.sources.base import FolderSource, ImageSource, PackedNames
from volo.data.sources.ranges import RangeReader
from volo.data.sources.records import ImageRecords

IMAGES = 100_000


def names_like_imagenet() -> PackedNames:
    """Return names about as long as n01440764/n01440764_10026.JPEG."""
    return PackedNames.of(f"n{i % 1000:08d}/n{i % 1000:08d}_{i % 10000}.JPG" for i in range(IMAGES))


def sources() -> dict[str, ImageSource]:
    names = names_like_imagenet()
    number, offsets = np.zeros(IMAGES, dtype=np.int32), np.arange(IMAGES)
    return {
        "folder": FolderSource("/data/train", names),
        "archive": ArchiveSource(names, RangeReader(["/data/train.tar"], ["0 0"]), number, offsets, offsets),
    }


@pytest.mark.parametrize(("kind", "most"), [("folder", 48), ("archive", 68)])
def test_bytes_per_image(kind, most):
    """1.28 M images take 60 or 85 MB, which all workers share."""
    records = ImageRecords(sources()[kind], np.zeros(IMAGES, dtype=np.int64), ("a", "b"))
    assert len(pickle.dumps(records)) / IMAGES < most


def own_kilobytes() -> int:
    """Return the memory that this process shares with no other, in KB."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Private_Dirty:", "Private_Clean:")))


def growth_in_a_fork(touch) -> int:
    """Return by how many KB a forked process grows while it calls ``touch`` for every image, twice."""
    read, write = os.pipe()
    gc.collect()
    if os.fork() == 0:
        touch(0)
        before = own_kilobytes()
        for _ in range(2):
            for index in range(IMAGES):
                touch(index)
        os.write(write, str(own_kilobytes() - before).encode())
        os._exit(0)
    os.wait()
    grown = int(os.read(read, 100))
    os.close(read), os.close(write)
    return grown


def test_a_forked_worker_does_not_copy_the_index():
    source = sources()["archive"]
    records = ImageRecords(source, np.zeros(IMAGES, dtype=np.int64), ("a", "b"))
    whole = len(pickle.dumps(records)) // 1024
    assert growth_in_a_fork(lambda i: (records.location(i), int(records.labels[i]), int(source.offset[i]))) < whole / 10
    # It would copy a list of strings, because each has its reference count beside it.
    listed = list(records.names)
    assert growth_in_a_fork(lambda i: listed[i]) > whole / 2


@pytest.mark.skipif(render.unavailable_reason() is not None, reason="there is no compiler")
def test_memory_of_a_huge_image_is_not_kept():
    """It takes 100 MB for the pixels and as much for each operation; memory for common sizes is kept."""
    transform = TrainTransform(AugmentConfig(backend="native"), (32, 32))
    ops = (Op("Rotate", (20.0,), Image.Resampling.BILINEAR), Op("Sharpness", (1.5,)))

    def augment(side: int) -> None:
        plan = Plan("published", ResizedCrop(0, 0, side, side, Image.Resampling.BILINEAR), ops=ops)
        transform.apply(decode.reused(side, side), plan)

    augment(500)
    kept, before = decode._memory.array, own_kilobytes()
    augment(5000)
    assert own_kilobytes() - before < 20_000
    augment(500)
    assert decode._memory.array is kept
