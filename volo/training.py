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
from volo.engine.checkpoint import read_own_checkpoint
from volo.engine.learner import Learner
from volo.engine.optim import check_optimizer
from volo.engine.run_folder import RunFolder, check_same_images, git_revision
from volo.engine.trainer import Trainer
from volo.published_results import published_top1
from volo.reporting import plot_curves, setup_logging, text_table
from volo.runtime import distributed
from volo.runtime.distributed import World
from volo.runtime.precision import Precision
from volo.runtime.program import DONE, STOPPED, checking_usage
from volo.token_labels.source import LabelSource

_logger = logging.getLogger("volo")


def run_training(config: Config) -> int:
    """Train as ``config`` says; return the exit code (see :mod:`volo.runtime.program`)."""
    with checking_usage():
        world = distributed.initialise(config.train.device)
        run = RunFolder(config)
        check_options(config, world)
        setup_logging(None, world.is_main, world.rank)  # listing the images may take minutes
        splits = distributed.on_main(lambda: load_splits(config))
        distributed.on_main(run.create)
        setup_logging(run.path if world.is_main else None, world.is_main, world.rank)
        path, state = find_checkpoint(run, config, world)
        if state is not None:
            check_same_images(state, splits, config.train.batch_size)
        layout = BatchLayout.of(config, world.size)
        require_shared_memory(config, layout, splits.val)
        learner = Learner(config, world, layout, make_network(config, world, state), state)
        labels = open_token_labels(config, splits, learner.grid, world.is_main)
        loader = make_train_loader(config, splits.train, world, layout, labels)
        val_loader = make_eval_loader(config, splits.val, world) if splits.val is not None else None
        trainer = Trainer(config, world, run, splits, learner, loader, val_loader, state)
        distributed.on_main(lambda: run.write_config(config))
    _logger.info("%s", describe(trainer, labels))
    if path is not None:
        done = trainer.progress
        _logger.info("going on from %s: epoch %d, step %d", path, done.epoch, done.step)

    trainer.show_batch()
    finished = trainer.fit()
    trainer.writer.close()
    if replaced := trainer.progress.replaced_images:
        _logger.warning("since the run began, other images took the place of such as cannot be used %d times", replaced)
    if lost := trainer.lost_workers():
        _logger.warning("reading processes that died were replaced %d times", lost)
    if world.is_main:
        plot_curves(run.metrics, run.curves, title=run.path.name)
        if finished:
            _logger.info("%s", closing_words(trainer))
    return DONE if finished else STOPPED


def check_options(config: Config, world: World) -> None:
    """Find what is wrong with the options themselves: before images are listed, and before anything is made.

    Raises ValueError.
    """
    BatchLayout.of(config, world.size)
    require_start(config)
    Precision.resolve(config.train.precision, world.device)
    check_optimizer(config.optim)
    TrainTransform(config.augment, config.model.image_hw)
    with torch.device("meta"):  # shapes without numbers: whether there is such a network for such images
        build_model(config.model)
    files = {"model.checkpoint": config.model.checkpoint, "token_label.root": config.token_label.root}
    if config.train.resume not in ("auto", "never"):
        files["train.resume"] = config.train.resume
    for name, path in files.items():
        if path and not Path(path).exists():
            raise ValueError(f"{name}: {path} does not exist")


def find_checkpoint(run: RunFolder, config: Config, world: World):
    """Let rank 0 choose the checkpoint; every rank reads that one. Returns (path, state), or (None, None)."""
    found = distributed.on_main(lambda: run.find_checkpoint(config), share=lambda f: f and f[0])
    if found is None:
        return None, None
    return found if world.is_main else (found, read_own_checkpoint(found))


def describe(trainer: Trainer, labels: LabelSource | None) -> str:
    """Return what the run does, in effective values, for the head of the log."""
    config, layout, world = trainer.config, trainer.layout, trainer.world
    loader, splits = trainer.loader, trainer.splits
    steps, total = trainer.steps_per_epoch, config.schedule.total_epochs
    parameters = sum(p.numel() for p in trainer.learner.model.parameters())
    height, width = config.model.image_hw
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    passes = f", {layout.micro_batches} passes of {layout.micro_size} a step" if layout.micro_batches > 1 else ""
    rows = [
        ("model", f"{config.model.name}, {parameters:,} parameters, {height}x{width}, {len(splits.classes)} classes"),
        ("images", f"{len(splits.train):,} to train on, {len(splits.val) if splits.val else 0:,} to evaluate on"),
        ("processes", f"{world.size} on {device}, precision {trainer.learner.precision.name}"),
        ("outlook", trainer.learner.kernel),
        ("pixels", str(Backend(config.augment.backend))),
        ("batch", f"{layout.global_size} images a step, {layout.global_size // world.size} a process{passes}"),
        ("schedule", f"{steps} steps an epoch, {total} epochs; learning rate to {config.optim.lr:g}, not scaled"),
    ]
    if labels is not None:
        rows.append(("labels", str(labels)))
    if loader.left_out:
        rows.append(("left out", f"{loader.left_out} images an epoch, others each time (an incomplete last batch)"))
    if ignored := splits.train.ignored:
        rows.append(("ignored", f"{ignored} training files that are hidden, or no images by their suffix"))
    if config.ema.enabled:
        horizon = 1 / (1 - config.ema.decay)
        rows.append(
            ("EMA", f"decay {config.ema.decay:g}: averages about {horizon:,.0f} steps, {horizon / steps:.1f} epochs")
        )
    rows += [("seed", str(config.train.seed)), ("revision", git_revision()), ("folder", str(trainer.run.path))]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def closing_words(trainer: Trainer) -> str:
    """Return the last lines of a finished run: result, pictures, next command."""
    run, config, progress = trainer.run, trainer.config, trainer.progress
    lines = [f"finished: {progress.epoch} epochs, {progress.global_step:,} steps"]
    if trainer.splits.val is not None:
        row = ["best top-1 %", f"{progress.best_top1:.2f}", f"epoch {progress.best_epoch}, {trainer.evaluated_weights}"]
        rows = [row]
        height, width = config.model.image_hw
        if height == width and config.data.class_list == "imagenet":
            for source, value, crop_pct in published_top1(config.model.name, height, "imagenet"):
                rows.append([f"{source}'s top-1 %", f"{value:.2f}", f"crop ratio {crop_pct:g}"])
        lines.append(text_table(["", "value", "of"], rows, align="lrl"))
    lines.append(f"curves: {run.curves}")
    lines.append(
        f"next:   {sys.executable} validate.py --config {run.path / 'config.yaml'} --checkpoint {run.checkpoints.best}"
    )
    return "\n".join(lines)
