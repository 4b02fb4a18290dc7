"""What validate.py does: evaluate one checkpoint on one or more datasets, and record what the numbers depend on."""

import hashlib
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from volo.build import build_model, make_eval_loader, require_classes, require_shared_memory
from volo.config import Config, ValidationOptions
from volo.data.pixels.transforms import Backend, EvalTransform
from volo.data.sources.folders import folder_layout, scan_class_folders
from volo.data.sources.formats import open_split
from volo.data.sources.listing_cache import ListingCache
from volo.data.sources.records import ImageRecords, class_names, imagenet_classes
from volo.engine.evaluate import Accuracy, Evaluation, ReaLLabels, evaluate
from volo.models.volo import VOLO
from volo.models.weights import LoadReport, load_content, read_checkpoint
from volo.published_results import PublishedTop1, published_top1
from volo.reporting import LINES, ProgressBar, setup_logging, text_table, write_results
from volo.runtime import distributed
from volo.runtime.compiling import compile_in_place, compile_problem, seconds_compiling
from volo.runtime.distributed import World
from volo.runtime.errors import Failure
from volo.runtime.memory_format import convolutions_to_channels_last, wants_channels_last
from volo.runtime.precision import Precision
from volo.runtime.program import DONE, checking_usage
from volo.runtime.rng import torch_seed
from volo.runtime.text import printable

_logger = logging.getLogger("volo")

V2_VARIANTS = ("matched-frequency", "threshold-0.7", "top-images")


@dataclass(frozen=True)
class Dataset:
    """A dataset to evaluate on.

    Args:
        name: Its name in the table.
        records: The images.
        published_as: Its name among the published results, if there are any for it.
        real: ImageNet-ReaL labels, if they are to be counted too.
    """

    name: str
    records: ImageRecords
    published_as: str | None
    real: ReaLLabels | None = None


def run_validation(config: Config, options: ValidationOptions) -> int:
    """Evaluate as asked, print the table, write results.json and results.csv; return the exit code."""
    with checking_usage():
        world = distributed.initialise(config.train.device, config.train.collective_timeout_minutes)
        setup_logging(None, world.is_main, world.rank)
        distributed.on_main(lambda: check_options(options))
        folder = distributed.on_main(lambda: output_folder(options))
        # fp32 by default on every device: the numbers are compared with published ones.
        choice = config.train.precision if config.train.precision != "auto" else "fp32"
        precision = Precision.resolve(choice, world.device)
        precision.set_up()
        torch.manual_seed(torch_seed(config.train.seed, "initialise"))  # random weights are the same on all ranks
        model = build_model(config.model)
        report, classes = load_weights(model, options)
        datasets = distributed.on_main(lambda: find_datasets(config, options, classes))
        for dataset in datasets:
            require_shared_memory(config, None, dataset.records)
        backend = Backend(config.augment.backend)
        kernel = model.to(world.device).set_kernel(config.train.kernel, precision.dtype)
    if wants_channels_last(config.train.channels_last, world.device):
        convolutions_to_channels_last(model)
    if config.train.compile:
        if problem := compile_problem(world.device.type):
            _logger.warning("train.compile is true, but nothing is compiled: %s", problem)
        else:
            compile_in_place(model)

    provenance = describe(config, options, report, precision, world) | {"outlook": kernel}
    shown = provenance | {"pixels": str(backend)}  # both backends give the same bytes: not part of a result
    _logger.info("%s", "\n".join(f"{name:<14} {printable(value)}" for name, value in shown.items()), extra=LINES)
    results: list[Result] = []
    for dataset in datasets:
        results += evaluate_dataset(model, dataset, config, precision, world)
    if seconds := seconds_compiling():
        _logger.info("compiling the network took %.0f s of it", seconds)
    if world.is_main:
        _logger.info("%s", results_table(results), extra=LINES)
        records = [result.record(provenance) for result in results]
        write_results(folder / "results.json", folder / "results.csv", records)
        _logger.info("results: %s and %s", folder / "results.json", folder / "results.csv")
    return DONE


def check_options(options: ValidationOptions) -> None:
    """Raise ValueError unless the options name weights to evaluate."""
    if options.checkpoint is None and not options.random_weights:
        raise ValueError("give --checkpoint FILE, or --random_weights true to evaluate an untrained network")
    if options.checkpoint is not None and options.random_weights:
        raise ValueError("--checkpoint and --random_weights exclude each other: give one of them")
    if options.checkpoint is not None and not Path(options.checkpoint).is_file():
        raise ValueError(f"--checkpoint {options.checkpoint} is not a file")


def output_folder(options: ValidationOptions) -> Path:
    """Make the folder for the results, before hours of work; ValueError if it cannot be written to."""
    folder = Path(options.output or (Path(options.checkpoint).parent if options.checkpoint else "."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be created: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the results cannot be written to {folder}; give another folder with --output")
    return folder


def load_weights(model: VOLO, options: ValidationOptions) -> tuple[LoadReport | None, tuple[str, ...] | None]:
    """Load the checkpoint; return the report and the class names in the file, each None if there is none.

    Rank 0 reads the file, which may be of gigabytes, and sends it to the others.

    Raises ValueError if the checkpoint has another number of classes.
    """
    if options.checkpoint is None:
        _logger.warning("random weights: the numbers below say nothing about any trained network")
        return None, None
    path = options.checkpoint
    file = distributed.broadcast_state(distributed.on_main(lambda: read_checkpoint(path), share=lambda _: None))
    assert file is not None
    best = file.get("evaluated_weights", "raw")  # what chose the best checkpoint of a run of ours
    use_ema = (best if options.weights == "auto" else options.weights) == "ema"
    report = load_content(model, file, path, use_ema=use_ema)
    if report.dropped_heads:
        raise ValueError(
            f"{path} has {report.num_classes} classes and model.num_classes is {model.num_classes}: an "
            f"untrained head would be evaluated. Set --model.num_classes {report.num_classes}"
        )
    classes = file.get("classes")
    if classes and not (isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{path}: its entry classes is no list of names. Save its state_dict alone")
    return report, tuple(classes) if classes else None


def find_datasets(config: Config, options: ValidationOptions, classes: tuple[str, ...] | None) -> list[Dataset]:
    """List the images of every dataset asked for; ValueError says what is missing."""
    if classes is None:
        train = open_split(config.data, "train") if config.data.class_list == "folders" else None
        classes = class_names(config.data.class_list, train)
    require_classes(classes, config)
    of_imagenet = classes == imagenet_classes()
    if options.real and not of_imagenet:
        raise ValueError("--real counts by labels of the 1,000 ImageNet classes; the network has other classes")
    listing_cache = ListingCache.of(config.data.cache)
    datasets = []
    if config.data.val_split != "none":
        records = open_split(config.data, "val").records(classes)
        real = ReaLLabels(records) if options.real else None
        name = "imagenet" if of_imagenet else Path(config.data.root).resolve().name
        datasets.append(Dataset(name, records, "imagenet" if of_imagenet else None, real))
    elif options.real:
        raise ValueError("--real counts on the validation images, but data.val_split is 'none'")
    for folder in options.v2:
        if not of_imagenet:
            raise ValueError("--v2 evaluates on ImageNet-V2, but the network has other classes than ImageNet's")
        records = scan_class_folders(folder, classes, folder_layout(folder, classes), listing_cache)
        variant = v2_variant(folder)
        datasets.append(Dataset(f"imagenet-v2 {variant}", records, f"v2-{variant}"))
    if not datasets:
        raise ValueError("nothing to evaluate on: set data.val_split, or give --v2 FOLDER")
    return datasets


def v2_variant(folder: str) -> str:
    """Return the variant of ImageNet-V2 that a folder's name tells, else that name; the archives write threshold0.7."""
    name = Path(folder).resolve().name
    letters = name.replace("-", "").replace("_", "")
    return next((variant for variant in V2_VARIANTS if variant.replace("-", "") in letters), name)


def describe(
    config: Config, options: ValidationOptions, report: LoadReport | None, precision: Precision, world: World
) -> dict[str, str]:
    """Return everything that the numbers depend on, as it is stored with each of them."""
    path = options.checkpoint
    height, width = config.model.image_hw
    cover_height, cover_width = EvalTransform((height, width), config.eval.crop_pct, config.eval.interpolation).cover_hw
    used = {"state_dict_ema": "ema"}.get(report.used, "raw") if report else "random"
    return {
        "model": config.model.name,
        "checkpoint": path or "none",
        "sha256": distributed.on_main(lambda: file_sha256(path)) if path else "none",
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


@dataclass(frozen=True)
class Result:
    """One row of the results: an accuracy on a dataset, beside the published ones.

    Args:
        dataset: Name of the dataset and of its labels.
        accuracy: The exact counts.
        skipped: Why each unreadable image could not be read; these images are in no count.
        images_per_s: Throughput of the pass.
        published: What the paper and timm report for this network, resolution and dataset.
    """

    dataset: str
    accuracy: Accuracy
    skipped: tuple[str, ...]
    images_per_s: float
    published: list[PublishedTop1]

    def record(self, provenance: dict[str, str]) -> dict:
        """Return the fields of results.json and results.csv, with all that the numbers depend on."""
        accuracy = self.accuracy
        fields = {
            "dataset": self.dataset,
            "images": accuracy.images,
            "skipped": len(self.skipped),
            "skipped_files": list(self.skipped),
            "top1_correct": accuracy.top1_correct,
            "top5_correct": accuracy.top5_correct,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "loss": accuracy.loss,
            "images_per_s": self.images_per_s,
            **{name.replace(" ", "_"): value for name, value in provenance.items()},
        }
        for source, value, crop_pct in self.published:
            fields[f"{source}_top1"] = value
            fields[f"{source}_crop_pct"] = crop_pct
            fields[f"difference_to_{source}"] = accuracy.top1 - value
        return fields

    def cells(self) -> list[str]:
        """Return the cells of :func:`results_table`."""
        accuracy = self.accuracy
        published = [
            f"{source} {value:.2f} ({accuracy.top1 - value:+.2f}, crop {crop_pct:g})"
            for source, value, crop_pct in self.published
        ]
        loss = "-" if math.isnan(accuracy.loss) else f"{accuracy.loss:.4f}"
        numbers = [f"{accuracy.images:,}", f"{accuracy.top1:.3f}", f"{accuracy.top5:.3f}", loss]
        return [self.dataset, *numbers, f"{self.images_per_s:.1f}", "; ".join(published) or "-"]


def results_table(results: list[Result]) -> str:
    """Return a table with one line per result."""
    headers = ["dataset", "images", "top-1 %", "top-5 %", "loss", "images/s", "published top-1"]
    return text_table(headers, [result.cells() for result in results], align="lrrrrrl")


def evaluate_dataset(model: VOLO, dataset: Dataset, config: Config, precision: Precision, world: World) -> list[Result]:
    """Evaluate on one dataset; return one result, and a second one by ReaL labels if they were asked for."""
    listed = len(dataset.records)
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
        channels_last=wants_channels_last(config.train.channels_last, world.device),
        real=dataset.real,
        on_batch=bar.update,
    )
    bar.close()
    images_per_s = listed / (time.perf_counter() - begin)
    assert evaluation is not None, "nothing asks it to stop"
    seen = evaluation.labels.images + len(evaluation.skipped)
    assert seen == listed, f"{seen} images were evaluated or skipped, {listed} were listed"
    report_oddities(evaluation, dataset)
    require_finite(evaluation, dataset)

    def result(name: str, accuracy: Accuracy, published_as: str | None) -> Result:
        height, width = config.model.image_hw
        published = published_top1(config.model.name, height, published_as) if height == width and published_as else []
        return Result(name, accuracy, evaluation.skipped, images_per_s, published)

    results = [result(dataset.name, evaluation.labels, dataset.published_as)]
    if evaluation.real is not None:
        results.append(result(f"{dataset.name}-real", evaluation.real, "real"))
    return results


def require_finite(evaluation: Evaluation, dataset: Dataset) -> None:
    """Raise Failure if nothing was evaluated or the logits were not finite: the counts would say nothing."""
    if evaluation.labels.images == 0:
        raise Failure(f"{dataset.name}: none of its {len(dataset.records):,} images could be read; no results")
    if not math.isfinite(evaluation.labels.loss):
        raise Failure(
            f"{dataset.name}: the mean loss is {evaluation.labels.loss}, so the network's outputs are NaN or infinite "
            "and its accuracy says nothing; no results were written. Try train.precision fp32, or other weights"
        )


def report_oddities(evaluation: Evaluation, dataset: Dataset) -> None:
    """Log what was unusual about the files, and which could not be read."""
    name, skipped = dataset.name, evaluation.skipped
    if ignored := dataset.records.ignored:
        _logger.warning("%s: ignored %d files that are hidden or without an image suffix", name, ignored)
    for note, count in sorted(evaluation.notes.items()):
        _logger.info("%s: %d images: %s", name, count, note)
    if skipped:
        _logger.warning("%s: skipped %d unreadable image(s), which are not in the counts:", name, len(skipped))
        for failure in skipped[:10]:
            _logger.warning("  %s", failure)
