"""WebDataset shards of smaller images, for slow storage, and what making them smaller changes.

OUTPUT/train/train-000000.tar, ...: KEY.jpg and KEY.cls, the key being class/name. Images are drawn into shards from a
fixed seed, so that a reader which takes shard after shard sees classes mixed. Those whose longer side is beyond
max_side are resized to it and encoded anew; all others, and those that cannot be read, stay as they are, byte for
byte. A shard gets its name when it is whole, so an interrupted run goes on with the next.
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
from volo.prepare_imagenet.official import ImageNetFiles, require_free
from volo.reporting import ProgressBar
from volo.runtime.files import sync_folder, write_atomic
from volo.runtime.program import DONE, checking_usage
from volo.runtime.rng import generator

_logger = logging.getLogger("volo")

ABOUT = "shards.json"
# Of the images of a shard that are encoded anew, so many are compared with what they were, and then one of so many.
_COMPARED = 20
_AS_SEEN = EvalTransform((224, 224), 0.96, "bicubic")


@dataclass(frozen=True)
class ShardOptions:
    """How images become smaller, and how many lie in a shard.

    Args:
        max_side: Longest side in pixels.
        quality: JPEG quality of what is encoded anew.
        images: Images of a shard.
        workers: Processes.
    """

    max_side: int = 512
    quality: int = 90
    images: int = 1000
    workers: int = 1

    def __post_init__(self):
        for name, least, most in (("max_side", 32, 1 << 16), ("quality", 1, 100), ("images", 1, 1 << 20)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it is in [{least}, {most}]")


@dataclass
class Changes:
    """What became of images: how many, encoded anew, unreadable; bytes before and after; and, for those compared, the
    sum over images of the mean absolute difference (of 255) of what the network sees at 224 px."""

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
        unread = f"; {len(self.unreadable)} cannot be read and stay as they are: " if self.unreadable else ""
        return (
            f"{self.images:,} images, {self.resized:,} ({100 * resized:.1f} %) made smaller; "
            f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after ({100 * share:.1f} %); mean difference at "
            f"224 px of those made smaller: {difference} ({self.compared:,} compared){unread}"
            + "; ".join(self.unreadable[:10])
        )


def run_shard(source: ImageNetFiles, output: str, options: ShardOptions) -> int:
    """Write the shards of every split, count, and say what has changed; return the exit code."""
    folder = Path(output)
    with checking_usage():
        splits = source.open()
        source.check({split: len(records) for split, records in splits.items()})
        about = identity(splits, options)
        require_free(folder, ABOUT)
        require_same(folder / ABOUT, about)
        for records in splits.values():
            require_own_keys(records)
    write_atomic(folder / ABOUT, json.dumps(about, indent=1))
    changes = {split: write_shards(records, folder / split, split, options) for split, records in splits.items()}
    told = source.check({split: change.images for split, change in changes.items()})
    for split, change in changes.items():
        _logger.info("%s: %s", split, change)
    about["changes"] = {split: str(change) for split, change in changes.items()}
    write_atomic(folder / ABOUT, json.dumps(about, indent=1))
    _logger.info("%s: %s; train on it as it is: --data.root %s", output, told, output)
    return DONE


def identity(splits: dict[str, ImageRecords], options: ShardOptions) -> dict:
    """Return all that the shards depend on."""
    about = {name: value for name, value in asdict(options).items() if name != "workers"}
    for split, records in splits.items():
        digest = sha256(records.names.text.tobytes() + records.labels.tobytes()).hexdigest()
        about[split] = f"{len(records)} images, sha256 {digest}"
    return about


def require_same(path: Path, about: dict) -> None:
    """Raise ValueError where the shards that are there were made of other images, or otherwise."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{path} is damaged; remove the folder, or name another --output") from error
    differs = [name for name, value in about.items() if before.get(name) != value]
    if differs:
        told = "; ".join(f"{name} was {before.get(name)}, is {about[name]}" for name in differs)
        raise ValueError(f"{path.parent} holds shards of another kind ({told}): name another --output")


def require_own_keys(records: ImageRecords) -> None:
    """Raise ValueError where two images would have one key, and one of them be lost."""
    first: dict[str, int] = {}
    for index in range(len(records)):
        if (other := first.setdefault(_key(records, index), index)) != index:
            raise ValueError(
                f"{records.location(other)} and {records.location(index)} would share the key "
                f"{_key(records, index)!r} in a shard, where a name ends at its first dot: rename one of them"
            )


def write_shards(records: ImageRecords, folder: Path, split: str, options: ShardOptions) -> Changes:
    """Write what is missing of a split's shards; return what has changed in all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    order = generator(0, "shards", 0, 0).permutation(len(records))
    cut = [order[start : start + options.images] for start in range(0, len(order), options.images)]
    jobs = [(folder / f"{split}-{number:06d}.tar", indices) for number, indices in enumerate(cut)]
    waiting = [job for job in jobs if not _is_whole(*job)]
    if len(waiting) < len(jobs):
        _logger.info("%s: %d of %d shards are there already", folder, len(jobs) - len(waiting), len(jobs))
    bar = ProgressBar(len(jobs), f"shards of {split}", log_every=max(len(jobs) // 20, 1), done=len(jobs) - len(waiting))
    for _ in _in_processes(records, waiting, options):
        bar.update(1)
    bar.close()
    changes = Changes()
    for path, _ in jobs:
        changes.add(Changes(**json.loads(_changes_file(path).read_text())))
    return changes


def _changes_file(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.json")


def _is_whole(shard: Path, indices: np.ndarray) -> bool:
    """Tell whether a shard is there, with as many images as it is to have."""
    if not (shard.exists() and _changes_file(shard).exists()):
        return False
    try:
        with tarfile.open(shard) as archive:
            images = sum(member.name.endswith(".cls") for member in archive)
    except tarfile.TarError:
        images = 0
    if images != len(indices):
        _logger.warning("%s has %d images and not %d: it is written again", shard, images, len(indices))
    return images == len(indices)


def _key(records: ImageRecords, index: int) -> str:
    """Return class/name of an image without the suffix; a key ends at its first dot."""
    folder, _, base = records.name(index).rpartition("/")
    return f"{folder or records.classes[int(records.labels[index])]}/{os.path.splitext(base)[0].replace('.', '_')}"


_work: tuple[ImageRecords, ShardOptions] | None = None  # of a forked process


def _in_processes(records: ImageRecords, jobs: list, options: ShardOptions) -> Iterator[None]:
    global _work
    _work = records, options
    if options.workers <= 1:
        yield from map(_write_shard, jobs)
        return
    # Forked, the processes share the index of the images.
    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork"), initializer=_ignore_interrupt)
    try:
        yield from pool.map(_write_shard, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the shards under way are finished, and the first process ends it


def _write_shard(job: tuple[Path, np.ndarray]) -> None:
    path, indices = job
    records, options = _work
    changes = Changes()
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for index in indices.tolist():
                data, suffix = smaller(records, index, options, changes)
                label = str(int(records.labels[index])).encode()
                for ending, content in ((suffix, data), ("cls", label)):
                    member = tarfile.TarInfo(f"{_key(records, index)}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    write_atomic(_changes_file(path), json.dumps(asdict(changes)))
    os.replace(partial, path)
    sync_folder(path.parent)


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
    size = tuple(max(1, round(side * scale)) for side in image.size)
    content = io.BytesIO()
    # The orientation tag stays, so that data.exif can still apply it.
    exif = {"exif": image.info["exif"]} if image.info.get("exif") else {}
    image.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=options.quality, **exif)
    return content.getvalue()


def _difference(before: Image.Image, after: Image.Image) -> float:
    one, other = (_AS_SEEN(image).astype(np.float64) for image in (before, after))
    return float(np.abs(one - other).mean())
