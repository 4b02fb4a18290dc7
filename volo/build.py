"""From a config to what a run is made of: network, images, label maps, loaders.

Errors raised here are the user's to correct; they end the program with exit code 2, before any work.
"""

import logging

import torch
from torch import nn

from volo.config import Config, ModelConfig
from volo.data.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.shared_memory import ReadAhead, lacking_room
from volo.data.sources.formats import open_split
from volo.data.sources.records import ImageRecords, Splits, class_names
from volo.engine.batch_layout import BatchLayout
from volo.models import create_model, load_checkpoint
from volo.models.volo import VOLO
from volo.runtime import distributed
from volo.runtime.distributed import World, processes_here, worker_count
from volo.runtime.memory_format import convolutions_to_channels_last, wants_channels_last
from volo.runtime.rng import torch_seed
from volo.token_labels.source import LabelSource

_logger = logging.getLogger("volo")


def require_start(config: Config) -> None:
    """Raise ValueError if a fine-tuning recipe has no weights to start from."""
    if config.eval.before_training and config.model.checkpoint is None:
        raise ValueError(
            "eval.before_training is set, as in the fine-tuning recipes, but there are no weights to evaluate. Give "
            "--model.checkpoint FILE, the weights to start from, or --eval.before_training false"
        )


def build_model(config: ModelConfig) -> VOLO:
    """Return the network of ``config`` with fresh weights; ValueError names an option that does not fit."""
    return create_model(
        config.name,
        img_size=config.image_hw,
        num_classes=config.num_classes,
        drop_path_rate=config.drop_path_rate,
        **config.architecture,
    )


def make_network(config: Config, world: World, state: dict | None = None) -> VOLO:
    """Return the network of a run on its device: fresh weights, those of the checkpoint to start from, or ``state``'s.

    Raises ValueError if weights do not fit.
    """
    torch.manual_seed(torch_seed(config.train.seed, "initialise"))
    model = build_model(config.model)
    if state is not None:
        model.load_state_dict(state["state_dict"])
    trained_heads = state is not None
    if state is None and config.model.checkpoint:
        report = load_checkpoint(model, config.model.checkpoint, use_ema=config.model.checkpoint_ema)
        trained_heads = not report.dropped_heads
    if config.loss.dense_weight == 0 and model.aux_head is not None:
        # No loss reaches it, and DistributedDataParallel waits for every parameter that requires a gradient.
        model.aux_head.requires_grad_(False)
        if not trained_heads:
            for parameter in model.aux_head.parameters():
                nn.init.zeros_(parameter)  # random ones would add noise to the logits of an evaluation
        _logger.warning(
            "loss.dense_weight is 0: the token head is not trained. It keeps the weights of the checkpoint, or is zero "
            "if it is new; model.return_dense false (with mix.mix_token false) makes a network without it"
        )
    model.to(world.device)
    if wants_channels_last(config.train.channels_last, world.device):
        convolutions_to_channels_last(model)
    return model


def load_splits(config: Config) -> Splits:
    """List the images of both splits; ValueError names what is missing and what to do."""
    data = config.data
    split = open_split(data, "train")
    classes = class_names(data.class_list, split)
    require_classes(classes, config)
    train = split.records(classes)
    val = None if data.val_split == "none" else open_split(data, "val").records(classes)
    return Splits(train, val, classes)


def require_classes(classes: tuple[str, ...], config: Config) -> None:
    """Raise ValueError if the images have another number of classes than the network."""
    if len(classes) != config.model.num_classes:
        raise ValueError(
            f"data.class_list '{config.data.class_list}' gives {len(classes)} classes, but model.num_classes is "
            f"{config.model.num_classes}. Set --model.num_classes {len(classes)}"
        )


def open_token_labels(
    config: Config, splits: Splits, grid: tuple[int, int], is_main: bool = True
) -> LabelSource | None:
    """Open the label maps of the training images for the network's ``grid``; return None if none are given.

    Raises ValueError if they do not belong to the images and classes, or if damage is found in a first look.
    """
    options = config.token_label
    if options.root is None:
        return None
    source = LabelSource(
        options.root,
        splits.train.names,
        splits.classes,
        grid,
        options.geometry,
        config.data.exif,
        verify_checksums=options.verify_checksums and is_main,  # once, not on every rank
    )
    distributed.on_main(lambda: source.try_files(config.data.on_error))
    return source


def make_train_loader(
    config: Config, records: ImageRecords, world: World, layout: BatchLayout, token_labels: LabelSource | None = None
) -> TrainLoader:
    """Return this rank's training batches, with label maps if they are given."""
    return train_loader(
        records,
        TrainTransform(config.augment, config.model.image_hw),
        seed=config.train.seed,
        global_batch=layout.global_size,
        world_size=world.size,
        rank=world.rank,
        micro_batches=layout.micro_batches,
        workers=worker_count(config.data.workers),
        on_error=config.data.on_error,
        exif=config.data.exif,
        pin_memory=world.device.type == "cuda",
        timeout_seconds=config.data.timeout_seconds,
        epochs=config.schedule.total_epochs,
        sidecar=token_labels,
    )


def make_eval_loader(config: Config, records: ImageRecords, world: World) -> EvalLoader:
    """Return this rank's share of an evaluation."""
    return eval_loader(
        records,
        EvalTransform(config.model.image_hw, config.eval.crop_pct, config.eval.interpolation, config.augment.backend),
        batch_size=config.eval.batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=worker_count(config.data.workers),
        on_error=config.data.on_error,
        exif=config.data.exif,
        pin_memory=world.device.type == "cuda",
        timeout_seconds=config.data.timeout_seconds,
    )


def require_shared_memory(config: Config, layout: BatchLayout | None, val: ImageRecords | None) -> None:
    """Raise ValueError, on every rank, if a machine's /dev/shm is too small for the batches that are read ahead.

    Args:
        config: The options. Label maps are assumed to need as much as the pixels, which is more than they do.
        layout: The training batches; None if nothing is trained.
        val: The images to evaluate on, if any.
    """
    height, width = config.model.image_hw
    image_bytes = 3 * height * width + 64
    workers = worker_count(config.data.workers)
    loaders = []
    if layout is not None:
        labelled = 2 if config.token_label.root is not None else 1
        loaders.append(ReadAhead(workers, layout.micro_size * image_bytes * labelled))
    if val is not None:
        size = min(config.eval.batch_size, len(val))
        loaders.append(ReadAhead(min(workers, -(-len(val) // size)), size * image_bytes))
    problem = lacking_room(loaders, processes_here()) if loaders else None
    if problems := distributed.gather_lists([problem] if problem else []):
        raise ValueError(problems[0])
