"""What validate.py does: one checkpoint, one or more data sets, exact numbers with all that they depend on."""

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from volo.build import build_model, make_eval_loader, require_classes, require_shared_memory
from volo.config import Config
from volo.data.pixels.transforms import Backend, EvalTransform
from volo.data.sources.folders import folder_layout, scan_class_folders
from volo.data.sources.formats import open_split
from volo.data.sources.listing_cache import ListingCache
from volo.data.sources.records import ImageRecords, class_names, imagenet_classes
from volo.engine.evaluate import Accuracy, Evaluation, ReaLLabels, evaluate
from volo.models import load_checkpoint
from volo.models.weights import LoadReport, read_checkpoint
from volo.published_results import published_top1
from volo.reporting import ProgressBar, setup_logging, text_table, write_results
from volo.runtime import distributed
from volo.runtime.distributed import World
from volo.runtime.precision import Precision
from volo.runtime.program import DONE, UsageError, checking_usage
from volo.runtime.rng import torch_seed

_logger = logging.getLogger("volo")

V2_VARIANTS = ("matched-frequency", "threshold-0.7", "top-images")


@dataclass(frozen=True)
class ValidationOptions:
    """The options that validate.py has beside the recipe's.

    Args:
        checkpoint: Weights to evaluate.
        random_weights: Evaluate an untrained network instead (to try out the data).
        weights: "raw", "ema", or "auto": what chose the best checkpoint for our files, raw for others.
        real: Count ImageNet-ReaL labels in the same pass; the files need their official names.
        v2: Folders of ImageNet-V2 variants, evaluated as well.
        output: Folder for results.json and results.csv; by default that of the checkpoint.
    """

    checkpoint: str | None
    random_weights: bool
    weights: str
    real: bool
    v2: tuple[str, ...]
    output: str | None


@dataclass(frozen=True)
class Dataset:
    """One data set to evaluate on: its name in the table and, where one is published, the name it goes by there."""

    name: str
    records: ImageRecords
    published_as: str | None
    real: ReaLLabels | None = None


def run_validation(config: Config, options: ValidationOptions) -> int:
    """Evaluate as asked, print the table, write results.json and results.csv; return the exit code."""
    with checking_usage():
        world = distributed.initialise(config.train.device)
    setup_logging(None, world.is_main, world.rank)
    if (options.checkpoint is None) == (not options.random_weights):
        raise UsageError(
            "give --checkpoint FILE; an untrained network is evaluated only with --random_weights true"
            if options.checkpoint is None
            else "--checkpoint and --random_weights exclude each other"
        )
    with checking_usage():
        if options.checkpoint is not None and not Path(options.checkpoint).is_file():
            raise ValueError(f"--checkpoint {options.checkpoint} is not a file")
        folder = distributed.on_main(lambda: output_folder(options))
        precision = Precision.resolve(config.train.precision, world.device)
        torch.manual_seed(torch_seed(config.train.seed, "initialise"))  # random weights, if need be: equal on all ranks
        model = build_model(config.model)
        report, classes = load_weights(model, options)
        datasets = distributed.on_main(lambda: find_datasets(config, options, classes))
        for dataset in datasets:
            require_shared_memory(config, None, dataset.records)
        backend = Backend(config.augment.backend)
        kernel = model.to(world.device).set_kernel(config.train.kernel, precision.dtype)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.compile()

    provenance = describe(config, options, report, precision, world) | {"outlook": kernel}
    rows = provenance | {"pixels": str(backend)}  # the same bytes: not part of a result
    _logger.info("%s", "\n".join(f"{name:<14} {value}" for name, value in rows.items()))
    rows = []
    for dataset in datasets:
        rows += evaluate_dataset(model, dataset, config, precision, world, provenance)
    if world.is_main:
        print_table(rows)
        write_results(folder / "results.json", folder / "results.csv", rows)
        _logger.info("results: %s and results.csv beside it", folder / "results.json")
    return DONE


def output_folder(options: ValidationOptions) -> Path:
    """Make the folder for the results, before hours of work; ValueError where it cannot be written to."""
    folder = Path(options.output or (Path(options.checkpoint).parent if options.checkpoint else "."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the results cannot be written to {folder}; give another folder with --output")
    return folder


def load_weights(model: nn.Module, options: ValidationOptions) -> tuple[LoadReport | None, tuple[str, ...] | None]:
    """Load the checkpoint; return the report and the class names that the file carries, if it does."""
    if options.checkpoint is None:
        _logger.warning("random weights: the numbers below say nothing about any trained network")
        return None, None
    file = read_checkpoint(options.checkpoint)
    use_ema = options.weights == "ema"
    if options.weights == "auto":
        use_ema = file.get("evaluated_weights") == "ema"
    report = load_checkpoint(model, options.checkpoint, use_ema=use_ema)
    if report.dropped_heads:
        raise ValueError(
            f"{options.checkpoint} has {report.num_classes} classes and model.num_classes is {model.num_classes}: an "
            f"untrained head would be evaluated. Set --model.num_classes {report.num_classes}"
        )
    classes = file.get("classes")
    return report, tuple(classes) if classes else None


def find_datasets(config: Config, options: ValidationOptions, classes: tuple[str, ...] | None) -> list[Dataset]:
    """List the images of every data set asked for; ValueError names what is missing."""
    if classes is None:
        train = None
        if config.data.class_list == "folders":
            train = open_split(config.data, "train")
        classes = class_names(config.data.class_list, train)
    require_classes(classes, config)
    of_imagenet = classes == imagenet_classes()
    if options.real and not of_imagenet:
        raise ValueError(
            "--real counts with labels of the 1,000 ImageNet classes, and the network's classes are not these synsets"
        )
    listing_cache = ListingCache.of(config.data.cache)
    datasets = []
    if config.data.val_split != "none":
        records = open_split(config.data, "val").records(classes)
        real = ReaLLabels(records) if options.real else None
        name = "imagenet" if of_imagenet else Path(config.data.root).resolve().name
        datasets.append(Dataset(name, records, "imagenet" if of_imagenet else None, real))
    elif options.real:
        raise ValueError("--real counts on the validation images, and data.val_split is 'none'")
    for folder in options.v2:
        if not of_imagenet:
            raise ValueError("--v2 evaluates on ImageNet-V2, but the network's classes are not the ImageNet synsets")
        records = scan_class_folders(folder, classes, folder_layout(folder, classes), listing_cache)
        variant = v2_variant(folder)
        datasets.append(Dataset(f"imagenet-v2 {variant}", records, f"v2-{variant}"))
    if not datasets:
        raise ValueError("there is nothing to evaluate on: set data.val_split, or give --v2 FOLDER")
    return datasets


def v2_variant(folder: str) -> str:
    """Return which variant of ImageNet-V2 a folder is by its name, or that name; the archives write threshold0.7."""
    name = Path(folder).resolve().name
    letters = name.replace("-", "").replace("_", "")
    return next((variant for variant in V2_VARIANTS if variant.replace("-", "") in letters), name)


def describe(
    config: Config, options: ValidationOptions, report: LoadReport | None, precision: Precision, world: World
) -> dict[str, str]:
    """Return everything the numbers depend on, as it is stored with each of them."""
    height, width = config.model.image_hw
    cover_height, cover_width = EvalTransform((height, width), config.eval.crop_pct, config.eval.interpolation).cover_hw
    used = {"state_dict_ema": "ema"}.get(report.used, "raw") if report else "random"
    return {
        "model": config.model.name,
        "checkpoint": options.checkpoint or "none",
        "sha256": file_sha256(options.checkpoint) if options.checkpoint else "none",
        "weights": used,
        "resolution": f"{height}x{width}",
        "resize": f"to cover {cover_height}x{cover_width}",
        "crop ratio": f"{config.eval.crop_pct:g}",
        "interpolation": config.eval.interpolation,
        "precision": precision.name,
        "processes": f"{world.size} on {world.device.type}",
    }


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def evaluate_dataset(
    model: nn.Module, dataset: Dataset, config: Config, precision: Precision, world: World, provenance: dict[str, str]
) -> list[dict]:
    """Evaluate on one data set; return one result row, and a second one with ReaL labels where asked for."""
    loader = make_eval_loader(config, dataset.records, world)
    bar = ProgressBar(total=len(loader), title=dataset.name, enabled=world.is_main, log_every=50)
    begin = time.perf_counter()
    evaluation = evaluate(
        model,
        loader,
        world.device,
        config.augment.mean,
        config.augment.std,
        autocast=precision.autocast,
        channels_last=config.train.channels_last,
        real=dataset.real,
        on_batch=lambda images: bar.update(1),
    )
    bar.close()
    seconds = time.perf_counter() - begin
    report_oddities(evaluation, dataset)
    listed = len(dataset.records)
    seen = evaluation.labels.images + len(evaluation.labels.skipped)
    assert seen == listed, f"{seen} images were evaluated or skipped, {listed} were listed"

    def row(name: str, accuracy: Accuracy, published_as: str | None) -> dict:
        height, width = config.model.image_hw
        references = published_top1(config.model.name, height, published_as) if height == width and published_as else []
        values = {
            "dataset": name,
            "images": accuracy.images,
            "skipped": len(accuracy.skipped),
            "skipped_files": list(accuracy.skipped),
            "top1_correct": accuracy.top1_correct,
            "top5_correct": accuracy.top5_correct,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "loss": accuracy.loss,
            "images_per_s": listed / seconds,
            **{key.replace(" ", "_"): value for key, value in provenance.items()},
        }
        for reference in references:
            values[f"{reference.source}_top1"] = reference.value
            values[f"{reference.source}_crop_pct"] = reference.crop_pct
            values[f"difference_to_{reference.source}"] = accuracy.top1 - reference.value
        return values

    rows = [row(dataset.name, evaluation.labels, dataset.published_as)]
    if evaluation.real is not None:
        rows.append(row(f"{dataset.name}-real", evaluation.real, "real"))
    return rows


def report_oddities(evaluation: Evaluation, dataset: Dataset) -> None:
    """Say what was unusual about the files, and which could not be read."""
    if dataset.records.ignored:
        _logger.warning("%s: %d files are hidden, or no images by their suffix", dataset.name, dataset.records.ignored)
    for note, count in sorted(evaluation.notes.items()):
        _logger.info("%s: %d images: %s", dataset.name, count, note)
    skipped = evaluation.labels.skipped
    if skipped:
        _logger.warning("%s: %d unreadable images were skipped and are not in the counts:", dataset.name, len(skipped))
        for failure in skipped[:10]:
            _logger.warning("  %s", failure)


def print_table(rows: list[dict]) -> None:
    """Print one line a data set, with the published values beside what was measured."""
    cells = []
    for row in rows:
        references = [
            f"{source} {row[f'{source}_top1']:.2f} ({row[f'difference_to_{source}']:+.2f}, "
            f"crop {row[f'{source}_crop_pct']:g})"
            for source in ("paper", "timm")
            if f"{source}_top1" in row
        ]
        loss = "-" if row["loss"] != row["loss"] else f"{row['loss']:.4f}"
        figures = [f"{row['top1']:.3f}", f"{row['top5']:.3f}", loss, f"{row['images_per_s']:.1f}"]
        cells.append([row["dataset"], f"{row['images']:,}", *figures, "; ".join(references) or "-"])
    headers = ["data set", "images", "top-1 %", "top-5 %", "loss", "images/s", "published top-1"]
    _logger.info("%s", text_table(headers, cells, align="lrrrrrl"))
