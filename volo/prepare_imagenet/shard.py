"""WebDataset shards of smaller images, for slow storage, and a report of what resizing changes.

OUTPUT/train/train-000000.tar, ...: KEY.jpg and KEY.cls, the key being class/name. Images are distributed over the
shards at random, from a fixed seed, so that a reader of one shard after another sees mixed classes. Images whose longer
side exceeds max_side are resized to it and encoded again; all others, and unreadable ones, stay as they are, byte for
byte. A shard gets its name when it is complete, so an interrupted run resumes with the next one.
"""

import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from volo.data.pixels.decode import UnreadableImage, read_image
from volo.data.pixels.transforms import EvalTransform
from volo.data.sources.records import ImageRecords
from volo.prepare_imagenet.official import check_counts, open_splits, require_free
from volo.prepare_imagenet.options import ShardOptions
from volo.reporting import ProgressBar
from volo.runtime.distributed import worker_count
from volo.runtime.files import atomic_file, remove_temporary_files, require_below, write_atomic
from volo.runtime.program import DONE, checking_usage
from volo.runtime.rng import generator

_logger = logging.getLogger("volo")

ABOUT = "shards.json"
# In each shard the first 20 resized images are compared with their originals, and every 20th after them.
_COMPARED = 20
_EVAL = EvalTransform((224, 224), 0.96, "bicubic")


@dataclass
class Changes:
    """What happened to a set of images.

    Args:
        images: Number of images.
        resized: How many of them were resized and encoded again.
        bytes_before, bytes_after: Size of all images.
        compared: How many resized images were compared with their originals.
        difference: Sum over the compared images of the mean absolute difference, of 255, at 224 px.
        unreadable: One message per unreadable image.
    """

    images: int = 0
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    compared: int = 0
    difference: float = 0.0
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: "Changes") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        share, resized = self.bytes_after / max(self.bytes_before, 1), self.resized / max(self.images, 1)
        difference = f"{self.difference / self.compared:.2f} of 255" if self.compared else "nothing to compare"
        unreadable = f"; {len(self.unreadable)} unreadable, kept as they are: " if self.unreadable else ""
        return (
            f"{self.images:,} images, {self.resized:,} ({100 * resized:.1f} %) resized; "
            f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after ({100 * share:.1f} %); mean difference of "
            f"resized images at 224 px: {difference} ({self.compared:,} compared){unreadable}"
            + "; ".join(self.unreadable[:10])
        )


def run_shard(options: ShardOptions) -> int:
    """Write the shards of every split, check the counts and report the changes; return the exit code."""
    folder = Path(options.output)
    with checking_usage():
        splits = open_splits(options)
        check_counts(options, {split: len(records) for split, records in splits.items()})
        about = identity(splits, options)
        require_free(folder, ABOUT)
        require_same(folder / ABOUT, about)
        for records in splits.values():
            require_unique_keys(records)
    write_atomic(folder / ABOUT, json.dumps(about, indent=1))
    changes = {split: write_shards(records, folder / split, split, options) for split, records in splits.items()}
    counts = check_counts(options, {split: change.images for split, change in changes.items()})
    for split, change in changes.items():
        _logger.info("%s: %s", split, change)
    about["changes"] = {split: str(change) for split, change in changes.items()}
    write_atomic(folder / ABOUT, json.dumps(about, indent=1))
    _logger.info("%s: %s; train on it directly: --data.root %s", folder, counts, folder)
    return DONE


def identity(splits: dict[str, ImageRecords], options: ShardOptions) -> dict:
    """Return everything that the shards depend on."""
    about: dict = {name: getattr(options, name) for name in ("max_side", "quality", "images_per_shard")}
    for split, records in splits.items():
        digest = sha256(records.names.text.tobytes() + records.labels.tobytes()).hexdigest()
        about[split] = f"{len(records)} images, sha256 {digest}"
    return about


def require_same(path: Path, about: dict) -> None:
    """Raise ValueError if, according to ``path``, the shards beside it have other images or other options."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{path} is damaged; remove the folder, or name another --output") from error
    before.setdefault("images_per_shard", before.get("images"))  # its name in earlier versions
    changed = [f"{name} was {before.get(name)}, is {new}" for name, new in about.items() if before.get(name) != new]
    if changed:
        raise ValueError(f"{path.parent} holds other shards ({'; '.join(changed)}): name another --output")


def require_unique_keys(records: ImageRecords) -> None:
    """Raise ValueError if two images would share a key, so that one would be lost, or if a key leads elsewhere."""
    first: dict[str, int] = {}
    for index in range(len(records)):
        require_below(_key(records, index), records.location(index))
        if (other := first.setdefault(_key(records, index), index)) != index:
            raise ValueError(
                f"{records.location(other)} and {records.location(index)} would share the key "
                f"{_key(records, index)!r} in a shard, where a name ends at its first dot: rename one of them"
            )


def write_shards(records: ImageRecords, folder: Path, split: str, options: ShardOptions) -> Changes:
    """Write the missing shards of a split; return the changes of all its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder)
    order = generator(0, "shards", 0, 0).permutation(len(records))
    size = options.images_per_shard
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    jobs = [(folder / f"{split}-{number:06d}.tar", indices) for number, indices in enumerate(groups)]
    remaining = [job for job in jobs if not _is_complete(*job)]
    done = len(jobs) - len(remaining)
    if done:
        _logger.info("%s: %d of %d shards exist already", folder, done, len(jobs))
    bar = ProgressBar(len(jobs), f"shards of {split}", log_every=max(len(jobs) // 20, 1), done=done)
    for _ in _in_processes(records, remaining, options):
        bar.update(1)
    bar.close()
    changes = Changes()
    for path, _ in jobs:
        changes.add(Changes(**json.loads(_changes_file(path).read_text())))
    return changes


def _changes_file(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.json")


def _is_complete(shard: Path, indices: np.ndarray) -> bool:
    """Tell whether a shard exists with as many images as it should have."""
    if not (shard.exists() and _changes_file(shard).exists()):
        return False
    try:
        with tarfile.open(shard) as archive:
            images = sum(member.name.endswith(".cls") for member in archive)
    except tarfile.TarError:
        images = 0
    if images != len(indices):
        _logger.warning("%s has %d images instead of %d; it is written again", shard, images, len(indices))
    return images == len(indices)


def _key(records: ImageRecords, index: int) -> str:
    """Return class/name of an image without the suffix; a key ends at its first dot."""
    folder, _, base = records.name(index).rpartition("/")
    return f"{folder or records.classes[int(records.labels[index])]}/{os.path.splitext(base)[0].replace('.', '_')}"


_work: tuple[ImageRecords, ShardOptions] | None = None  # of a forked process


def _in_processes(records: ImageRecords, jobs: list, options: ShardOptions) -> Iterator[None]:
    global _work
    _work = records, options
    workers = worker_count(options.workers)
    if workers <= 1:
        yield from map(_write_shard, jobs)
        return
    # Forked, the processes share the index of the images.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_ignore_interrupt)
    try:
        yield from pool.map(_write_shard, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the run, after the shards in progress


def _write_shard(job: tuple[Path, np.ndarray]) -> None:
    assert _work is not None
    path, indices = job
    records, options = _work
    changes = Changes()
    with atomic_file(path) as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for index in indices.tolist():
                data, suffix = smaller(records, index, options, changes)
                label = str(int(records.labels[index])).encode()
                for ending, content in ((suffix, data), ("cls", label)):
                    member = tarfile.TarInfo(f"{_key(records, index)}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        # Before the shard gets its name: a shard without this file counts as missing.
        write_atomic(_changes_file(path), json.dumps(asdict(changes)))


def smaller(records: ImageRecords, index: int, options: ShardOptions, changes: Changes) -> tuple[bytes, str]:
    """Return the content to store for an image and its suffix, and count in ``changes``."""
    data = records.read(index)
    suffix = os.path.splitext(records.name(index))[1].lower().lstrip(".")
    suffix = "jpg" if suffix == "jpeg" else suffix
    changes.images += 1
    changes.bytes_before += len(data)
    stored = data
    try:
        image, _ = read_image(data, records.location(index))
    except UnreadableImage as error:
        changes.unreadable.append(str(error))
    else:
        if max(image.size) > options.max_side:
            stored, suffix = _encoded(image, options), "jpg"
            if changes.resized < _COMPARED or changes.resized % _COMPARED == 0:
                changes.compared += 1
                changes.difference += _difference(image, read_image(stored, "")[0])
            changes.resized += 1
    changes.bytes_after += len(stored)
    return stored, suffix


def _encoded(image: Image.Image, options: ShardOptions) -> bytes:
    scale = options.max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    content = io.BytesIO()
    # The orientation tag stays, so that data.exif can still apply it.
    exif = {"exif": image.info["exif"]} if image.info.get("exif") else {}
    image.resize((width, height), Image.Resampling.LANCZOS).save(content, "JPEG", quality=options.quality, **exif)
    return content.getvalue()


def _difference(before: Image.Image, after: Image.Image) -> float:
    one, other = (_EVAL(image).astype(np.float64) for image in (before, after))
    return float(np.abs(one - other).mean())
