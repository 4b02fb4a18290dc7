"""Running scripts/generate_token_labels.py: a teacher labels a folder of images.

The sorted list of images is cut into blocks; each process labels every R-th of the remaining blocks and saves it. When
all blocks are done, the first process writes the output. Which images share a forward pass depends only on the block,
so the labels are the same for any number of processes and any number of interruptions.

C classes, R processes; for other letters see :mod:`volo.token_labels.generation.labeller`.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from volo.data.sources.records import ImageRecords
from volo.data.workers import WorkerFailed
from volo.models import read_checkpoint
from volo.reporting import LINES, ProgressBar, setup_logging
from volo.runtime import distributed
from volo.runtime.distributed import World, worker_count
from volo.runtime.files import write_atomic
from volo.runtime.memory_format import convolutions_to_channels_last
from volo.runtime.precision import Precision
from volo.runtime.program import DONE, STOPPED, UsageError, with_options_of
from volo.runtime.signals import StopRequest
from volo.runtime.text import printable
from volo.token_labels.generation.label_blocks import BlockFolder
from volo.token_labels.generation.labeller import Labeller
from volo.token_labels.generation.options import GenerateOptions
from volo.token_labels.generation.output import Stopped, Totals, require_storable, write_output
from volo.token_labels.generation.teacher import Teacher
from volo.token_labels.generation.teacher_factory import WeightsNotFetched, make_teacher
from volo.token_labels.generation.teacher_input import Chunk, read_chunks
from volo.token_labels.images import OPTIONS_HERE, open_images

_logger = logging.getLogger("volo")

# Functions shared with train.py name its options in their messages.
_OPTIONS_HERE = OPTIONS_HERE | {
    "model.img_size": "--img_size",
    "train.precision": "--precision",
    "train.device": "--device",
    "data.workers": "--workers",
    "data.timeout_seconds": "--timeout_seconds",
}


def run_generation(options: GenerateOptions) -> int:
    """Label the images; return the exit code (see :mod:`volo.runtime.program`)."""
    stop = StopRequest()
    try:
        return _run(options, stop)
    finally:
        stop.restore()


def _run(options: GenerateOptions, stop: StopRequest) -> int:
    with _checking_options():
        world = distributed.initialise(options.device)
        setup_logging(None, world.is_main, world.rank)
        precision = Precision.resolve(options.precision, world.device)
        precision.set_up()
        records = distributed.on_main(lambda: find_images(options))
    file = read_checkpoint(options.teacher_checkpoint) if options.teacher_checkpoint else None
    with _checking_options():
        teacher, grid = prepare_teacher(options, records.classes, file, world.device)
        del file
        folder = BlockFolder(_parts(options), len(records), options.block_size, options.top_k)
        distributed.on_main(lambda: folder.open(identity(options, records, teacher, precision)), lambda _: None)
    remaining = distributed.on_main(folder.remaining)
    _logger.info("%s", describe(options, records, teacher, grid, precision, world), extra=LINES)
    if done := len(folder) - len(remaining):
        _logger.info("resuming in %s: %d of %d blocks are done", folder.path, done, len(folder))

    try:
        label_blocks(options, records, teacher, precision, world, folder, remaining, stop)
    except WorkerFailed as error:
        raise ValueError(with_options_of(_OPTIONS_HERE, str(error))) from error
    if distributed.max_over_ranks([float(stop.requested)])[0]:
        return _stopped(folder)
    if not world.is_main:
        return DONE  # writing the output may take longer than the timeout of a collective
    totals = write_output(options, records, teacher.full_name(), folder, stop)
    if totals is None:
        return _stopped(folder)
    folder.remove()
    _logger.info("%s", closing_words(options, totals), extra=LINES)
    return DONE


def find_images(options: GenerateOptions) -> ImageRecords:
    """List the images; ValueError if they or the output are unusable."""
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already and is left as it is; name another, or move it away")
    if options.teacher_checkpoint and not os.path.isfile(options.teacher_checkpoint):
        raise ValueError(f"--teacher_checkpoint is {options.teacher_checkpoint!r}, which is not a file")
    records = open_images(options.images, options.class_list, options.labels, options.cache)
    require_storable(options.format, records)
    return records


def prepare_teacher(
    options: GenerateOptions, classes: tuple[str, ...], file: dict | None, device: torch.device
) -> tuple[Teacher, tuple[int, int]]:
    """Return the teacher on ``device``, and the (rows, columns) of its label map for an input of its nominal size."""
    if options.top_k > len(classes):
        raise ValueError(
            f"--top_k is {options.top_k}, but there are {len(classes)} classes; give --top_k {len(classes)} or less"
        )
    auto_ema = options.weights == "auto" and (file or {}).get("evaluated_weights") == "ema"
    teacher = make_teacher(
        options.teacher,
        classes,
        file=file,
        path=options.teacher_checkpoint,
        use_ema=options.weights == "ema" or auto_ema,
        random_weights=options.random_weights,
        image_hw=options.image_hw,
    )
    teacher.model.to(device)
    if device.type == "cuda":
        convolutions_to_channels_last(teacher.model)
    if options.random_weights:
        _logger.warning("random weights: the labels are meaningless")
    return teacher, teacher.check(device)


def identity(
    options: GenerateOptions, records: ImageRecords, teacher: Teacher, precision: Precision
) -> dict[str, str | int]:
    """Return everything that the labels depend on, which must not change when a run resumes."""
    images = hashlib.sha256("\n".join(records.names).encode("utf-8", "surrogateescape"))
    images.update(records.labels.tobytes())
    classes = hashlib.sha256("\n".join(records.classes).encode("utf-8", "surrogateescape"))
    return {
        "teacher": options.teacher,
        "weights": teacher.fingerprint(),
        "covers": options.covers,
        "img_size": "x".join(map(str, teacher.input.image_hw)),
        "top_k": options.top_k,
        "precision": precision.name,
        "exif": options.exif,
        "block_size": options.block_size,
        "list of images": f"{len(records)}, sha256 {images.hexdigest()}",
        "list of classes": f"{len(records.classes)}, sha256 {classes.hexdigest()}",
    }


def label_blocks(
    options: GenerateOptions,
    records: ImageRecords,
    teacher: Teacher,
    precision: Precision,
    world: World,
    folder: BlockFolder,
    remaining: list[int],
    stop: StopRequest,
) -> None:
    """Label this process's share of the ``remaining`` blocks and save each, until ``stop`` is requested."""
    mine = remaining[world.rank :: world.size]
    if not mine:
        return
    blocks = [folder.images(number) for number in mine]
    chunks, num_chunks = read_chunks(
        records,
        blocks,
        teacher.input,
        covers=options.covers,
        exif=options.exif,
        workers=worker_count(options.workers),
        timeout_seconds=options.timeout_seconds,
        replace_workers=options.on_error == "skip",
    )
    labeller = Labeller(
        teacher, records, world.device, precision.autocast, options.top_k, options.batch_size, options.on_error
    )
    total = sum(map(len, blocks))
    title = "labels" if world.size == 1 else f"labels, process 1 of {world.size}"
    progress = ProgressBar(total, title, enabled=world.is_main, log_every=max(total // 100, 500))
    begin, seen = time.perf_counter(), 0

    def count(images: int) -> None:
        nonlocal seen
        seen += images
        progress.update(images, images_per_s=world.size * seen / (time.perf_counter() - begin))
        if stop.requested:
            raise Stopped

    def until_stopped(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            if stop.requested:
                raise Stopped
            yield chunk

    with contextlib.closing(progress), contextlib.closing(chunks), contextlib.suppress(Stopped):
        for number, length in zip(mine, num_chunks, strict=True):
            block = labeller.block(until_stopped(itertools.islice(chunks, length)), count)
            folder.write(number, block)


def describe(
    options: GenerateOptions,
    records: ImageRecords,
    teacher: Teacher,
    grid: tuple[int, int],
    precision: Precision,
    world: World,
) -> str:
    """Return the effective settings of the run, for the head of the log."""
    height, width = teacher.input.image_hw
    size = f"{height}x{width} pixels, {grid[0]}x{grid[1]} cells"
    if options.covers == "center_crop":
        shown = f"shorter side resized, centre crop: {size}"
    elif teacher.input.keeps_aspect:
        shown = f"whole image in its own aspect ratio, about as many pixels and cells as {size}"
    else:
        shown = f"whole image squeezed to {size}"
    weights = options.teacher_checkpoint or ("random" if options.random_weights else "pretrained by timm")
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    rows = [
        ("teacher", f"{teacher.name}, weights {weights}, {teacher.num_classes:,} classes"),
        ("images", f"{len(records):,} in {options.images}"),
        ("input", shown),
        ("labels", f"top {options.top_k} of each cell to {options.output} ({options.format})"),
        ("processes", f"{world.size} on {device}, precision {precision.name}"),
    ]
    if records.ignored:
        rows.append(("ignored", f"{records.ignored} files that are hidden, or whose suffix is not that of an image"))
    return "\n".join(f"{name:<10} {printable(value)}" for name, value in rows)


def closing_words(options: GenerateOptions, totals: Totals) -> str:
    """Return the summary: where the labels are, which images have none, and the teacher's accuracy on these images.

    Also writes the list of skipped images beside the output.
    """
    lines = [f"labels of {totals.images:,} images: {options.output}"]
    if totals.skipped:
        listed = Path(f"{options.output}.skipped.txt")
        write_atomic(listed, "".join(f"{printable(reason)}\n" for reason in totals.skipped))
        lines.append(f"{len(totals.skipped):,} images are unreadable and have no label (full list: {listed}):")
        lines += [f"  {printable(reason)}" for reason in totals.skipped[:10]]
    shares = [
        f"{name} {100 * count / totals.images:.3f} % ({count:,} of {totals.images:,})"
        for name, count in (("top-1", totals.top1_correct), ("top-5", totals.top5_correct))
    ]
    if options.format == "published" and (options.covers, options.exif) != ("center_crop", "ignore"):
        # Otherwise training would take them for maps of the centre crop with EXIF ignored, as in the published archive.
        lines.append(
            "the published layout does not say what its maps cover: before training, pack them with "
            f"scripts/pack_token_labels.py --source {options.output} --covers {options.covers} "
            f"--exif {options.exif}"
        )
    return "\n".join([*lines, f"teacher's accuracy on these images: {', '.join(shares)}"])


def _stopped(folder: BlockFolder) -> int:
    left = len(folder.remaining())
    _logger.info(
        "stopped by a signal: %d of %d blocks are kept in %s; the same command resumes from there",
        len(folder) - left,
        len(folder),
        folder.path,
    )
    return STOPPED


def _parts(options: GenerateOptions) -> Path:
    output = Path(options.output)
    return output.with_name(f"{output.name}.parts")


@contextlib.contextmanager
def _checking_options() -> Iterator[None]:
    """Turn a ValueError of the block, raised before any work, into a UsageError that names this program's options."""
    try:
        yield
    except WeightsNotFetched:
        raise
    except ValueError as error:
        raise UsageError(with_options_of(_OPTIONS_HERE, str(error))) from error
