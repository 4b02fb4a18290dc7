"""A training run from config to exit code: what happens around :class:`volo.engine.trainer.Trainer`."""

import logging
import sys
from pathlib import Path

import torch

from volo.build import (
    build_model,
    load_splits,
    make_eval_loader,
    make_network,
    make_train_loader,
    open_token_labels,
    require_shared_memory,
    require_start,
)
from volo.config import Config
from volo.data.pixels.transforms import Backend, TrainTransform
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.engine.optim import check_optimizer
from volo.engine.run_folder import RunFolder, check_same_images, git_revision
from volo.engine.trainer import Trainer
from volo.published_results import published_top1
from volo.reporting import LINES, plot_curves, setup_logging, text_table
from volo.runtime import distributed
from volo.runtime.distributed import World
from volo.runtime.precision import Precision
from volo.runtime.program import DONE, STOPPED, checking_usage
from volo.runtime.signals import StopRequest
from volo.runtime.text import printable
from volo.token_labels.source import LabelSource

_logger = logging.getLogger("volo")


def run_training(config: Config) -> int:
    """Train as ``config`` says; return the exit code (see :mod:`volo.runtime.program`)."""
    stop = StopRequest(config.train.stop_timeout_seconds, starting=True)
    with checking_usage():
        trainer = set_up(config, stop)
    trainer.show_batch()
    finished = trainer.fit()
    if trainer.world.is_main:
        draw_curves(trainer.run)
        if finished:
            _logger.info("%s", closing_words(trainer), extra=LINES)
    return DONE if finished else STOPPED


def draw_curves(run: RunFolder) -> None:
    """Draw the curves of a run; a picture that cannot be made is no failure of the run."""
    try:
        plot_curves(run.metrics, run.curves, title=run.path.name)
    except Exception as error:  # of the disk, or of the plotting library
        _logger.warning("%s could not be drawn: %s: %s", run.curves, type(error).__name__, error)


def set_up(config: Config, stop: StopRequest) -> Trainer:
    """Join the other processes and make everything that a run needs, from the newest checkpoint if there is one.

    Raises ValueError for what the user has to correct.
    """
    world = distributed.initialise(config.train.device, config.train.collective_timeout_minutes)
    check_options(config, world)
    setup_logging(None, world.is_main, world.rank)  # listing the images may take minutes
    splits = distributed.on_main(lambda: load_splits(config))

    run = RunFolder(config)
    distributed.on_main(run.create)
    setup_logging(run.path if world.is_main else None, world.is_main, world.rank)
    path, checkpoint = find_checkpoint(run, config)
    if checkpoint is not None:
        check_same_images(checkpoint, splits, config.train.batch_size)

    layout = BatchLayout.of(config, world.size)
    require_shared_memory(config, layout, splits.val)
    learner = Learner(config, world, layout, make_network(config, world, checkpoint), checkpoint)
    labels = open_token_labels(config, splits, learner.grid, world.is_main)
    loader = make_train_loader(config, splits.train, world, layout, labels)
    val_loader = make_eval_loader(config, splits.val, world) if splits.val is not None else None
    trainer = Trainer(config, world, run, splits, learner, loader, val_loader, checkpoint, stop)
    distributed.on_main(lambda: run.write_config(config))
    stop.begin()
    _logger.info("%s", describe(trainer, labels), extra=LINES)
    if path is not None:
        _logger.info("resuming from %s: epoch %d, step %d", path, trainer.state.epoch, trainer.state.step)
    return trainer


def check_options(config: Config, world: World) -> None:
    """Raise ValueError for options that cannot work, before images are listed and before anything is made."""
    BatchLayout.of(config, world.size)
    require_start(config)
    Precision.resolve(config.train.precision, world.device)
    if config.train.sync_bn and world.size > 1 and world.device.type == "cpu":
        raise ValueError("train.sync_bn needs CUDA devices: PyTorch has no SyncBatchNorm on the CPU")
    check_optimizer(config.optim)
    TrainTransform(config.augment, config.model.image_hw)
    with torch.device("meta"):  # shapes without numbers: enough to check the architecture and the image size
        build_model(config.model)
    files = {"model.checkpoint": config.model.checkpoint, "token_label.root": config.token_label.root}
    if config.train.resume not in ("auto", "never") and world.is_main:  # who alone reads it
        files["train.resume"] = config.train.resume
    for name, path in files.items():
        if path and not Path(path).exists():
            raise ValueError(f"{name}: {path} does not exist")


def find_checkpoint(run: RunFolder, config: Config) -> tuple[Path | None, dict | None]:
    """Return the path and content of the checkpoint to resume from, or (None, None).

    Rank 0 chooses it, reads it and sends it to the others: on other machines the run folder need not exist.
    """
    found = distributed.on_main(lambda: run.find_checkpoint(config), share=lambda f: f and (f[0], None))
    if found is None:
        return None, None
    path, state = found
    return path, distributed.broadcast_state(state)


def describe(trainer: Trainer, labels: LabelSource | None) -> str:
    """Return the effective values of the run, for the head of the log."""
    config, layout, world = trainer.config, trainer.layout, trainer.world
    loader, splits = trainer.loader, trainer.splits
    steps, total = trainer.steps_per_epoch, config.schedule.total_epochs
    parameters = sum(p.numel() for p in trainer.learner.model.parameters())
    height, width = config.model.image_hw
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    passes = f" in {layout.micro_batches} passes of {layout.micro_size}" if layout.micro_batches > 1 else ""
    rows = [
        ("model", f"{config.model.name}, {parameters:,} parameters, {height}x{width}, {len(splits.classes)} classes"),
        ("images", f"{len(splits.train):,} to train on, {len(splits.val) if splits.val else 0:,} to evaluate on"),
        ("processes", f"{world.size} on {device}, precision {trainer.learner.precision.name}"),
        ("outlook", trainer.learner.kernel),
        ("recompute", trainer.learner.recompute),
        ("pixels", str(Backend(config.augment.backend))),
        ("batch", f"{layout.global_size} images per step, {layout.global_size // world.size} per process{passes}"),
        ("schedule", f"{total} epochs of {steps} steps; learning rate up to {config.optim.lr:g}, not scaled"),
    ]
    if labels is not None:
        rows.append(("labels", str(labels)))
    if loader.left_out:
        rows.append(("left out", f"{loader.left_out} images per epoch, others each time (an incomplete last batch)"))
    if ignored := splits.train.ignored:
        rows.append(("ignored", f"{ignored} training files that are hidden or without an image suffix"))
    if config.ema.enabled:
        horizon = 1 / (1 - config.ema.decay)
        span = f"about {horizon:,.0f} steps, {horizon / steps:.1f} epochs"
        rows.append(("EMA", f"decay {config.ema.decay:g}: averages over {span}"))
    rows += [("seed", str(config.train.seed)), ("revision", git_revision()), ("folder", str(trainer.run.path))]
    return "\n".join(f"{name:<10} {printable(value)}" for name, value in rows)


def closing_words(trainer: Trainer) -> str:
    """Return the last lines of a finished run: result, curves, next command."""
    run, config, state = trainer.run, trainer.config, trainer.state
    lines = [f"finished: {state.epoch} epochs, {state.global_step:,} steps"]
    if trainer.splits.val is not None:
        weights = {"raw": "raw weights", "ema": "EMA weights"}[trainer.evaluated_weights]
        rows = [["this run", f"{state.best_top1:.2f}", f"epoch {state.best_epoch}, {weights}"]]
        height, width = config.model.image_hw
        if height == width and config.data.class_list == "imagenet":
            for source, value, crop_pct in published_top1(config.model.name, height, "imagenet"):
                rows.append([source, f"{value:.2f}", f"crop ratio {crop_pct:g}"])
        lines.append(text_table(["", "best top-1 %", "measured with"], rows, align="lrl"))
    lines.append(f"curves: {run.curves}")
    lines.append(
        f"next:   {sys.executable} validate.py --config {run.path / 'config.yaml'} --checkpoint {run.checkpoints.best}"
    )
    return "\n".join(lines)
