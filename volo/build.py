"""What is settled before the first step: the batch over the processes, the images, the run folder.

Everything here that is wrong is the user's to mend and ends with exit code 2, before any work.
"""

import logging
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from volo.cli import config_to_dict, save_config
from volo.config import Config, ModelConfig
from volo.data.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.shared_memory import ReadAhead, lacking_room
from volo.data.sources.formats import open_split
from volo.data.sources.records import ImageRecords, class_names
from volo.engine.checkpoint import CheckpointFolder, read_own_checkpoint
from volo.runtime import distributed
from volo.runtime.distributed import World, processes_here, worker_count
from volo.token_labels.source import LabelSource

_logger = logging.getLogger("volo")


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch is spread: every process takes ``micro_batches`` passes of ``micro_size`` images."""

    global_size: int
    world_size: int
    micro_batches: int
    micro_size: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> "BatchLayout":
        """Plan ``train.batch_size`` over ``world_size`` processes; ValueError where it does not divide."""
        total, most = config.train.batch_size, config.train.device_batch_size
        if total < world_size:
            raise ValueError(
                f"train.batch_size is {total}, over {world_size} processes: less than one image each. Start at most "
                f"{total} processes or raise train.batch_size to {world_size} or more"
            )
        # MixUp and CutMix pair the images of a pass.
        pairs = 2 if config.mix.mixes_images else 1
        unit = pairs * world_size
        if total % unit:
            near = [str(n) for n in (total // unit * unit, (total // unit + 1) * unit) if n]
            what = "into pairs for MixUp and CutMix, " if pairs == 2 else ""
            raise ValueError(
                f"train.batch_size {total} does not divide {what}over {world_size} processes; the nearest that do: "
                f"{' and '.join(near)}"
            )
        if most < pairs:
            raise ValueError(
                f"train.device_batch_size is {most}, but MixUp and CutMix pair the images of a pass; at least 2"
            )
        share = total // world_size
        passes = next(n for n in range(1, share + 1) if share % (n * pairs) == 0 and share // n <= most)
        return cls(total, world_size, passes, share // passes)


@dataclass(frozen=True)
class Splits:
    """The training images, the validation images (None where there is nothing to evaluate), the classes."""

    train: ImageRecords
    val: ImageRecords | None
    classes: tuple[str, ...]


def require_start(config: Config) -> None:
    """Raise ValueError where a fine-tuning recipe is to start from fresh weights."""
    if config.eval.before_training and config.model.checkpoint is None:
        raise ValueError(
            "eval.before_training is set, as in the fine-tuning recipes, but there are no weights to evaluate: give "
            "--model.checkpoint FILE, the weights to start from (or --eval.before_training false)"
        )


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
    """Raise ValueError where the number of classes is not the network's."""
    if len(classes) != config.model.num_classes:
        raise ValueError(
            f"data.class_list '{config.data.class_list}' gives {len(classes)} classes, and model.num_classes is "
            f"{config.model.num_classes}: set --model.num_classes {len(classes)}"
        )


def open_token_labels(
    config: Config, splits: Splits, grid: tuple[int, int], is_main: bool = True
) -> LabelSource | None:
    """Open the label maps of the training images for the network's ``grid``; None where none are given.

    Raises ValueError where they do not belong to the images and classes, or are damaged as far as can be seen now.
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
    config: Config, records: ImageRecords, world: World, plan: BatchLayout, token_labels: LabelSource | None = None
) -> TrainLoader:
    """Return this rank's training batches, with label maps where they are given."""
    return train_loader(
        records,
        TrainTransform(config.augment, config.model.image_hw),
        seed=config.train.seed,
        global_batch=plan.global_size,
        world_size=world.size,
        rank=world.rank,
        micro_batches=plan.micro_batches,
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


def require_shared_memory(config: Config, plan: BatchLayout | None, val: ImageRecords | None) -> None:
    """Raise ValueError, on every rank, where a machine's /dev/shm has no room for the batches that are read ahead.

    Args:
        config: The options. Label maps are taken to need as much as the pixels; it is less.
        plan: The training batches, None where nothing is trained.
        val: The images to evaluate on, if any.
    """
    height, width = config.model.image_hw
    image_bytes = 3 * height * width + 64
    workers = worker_count(config.data.workers)
    loaders = []
    if plan is not None:
        labelled = 2 if config.token_label.root is not None else 1
        loaders.append(ReadAhead(workers, plan.micro_size * image_bytes * labelled))
    if val is not None:
        size = min(config.eval.batch_size, len(val))
        loaders.append(ReadAhead(min(workers, -(-len(val) // size)), size * image_bytes))
    problem = lacking_room(loaders, processes_here()) if loaders else None
    if problems := distributed.gather_lists([problem] if problem else []):
        raise ValueError(problems[0])


def default_name(config: Config) -> str:
    height, width = config.model.image_hw
    return f"{config.model.name}_{height}" + ("" if height == width else f"x{width}")


class RunFolder:
    """The folder of one run: config.yaml, log.txt, metrics.csv, TensorBoard events, checkpoints, curves.png."""

    def __init__(self, config: Config):
        self.path = Path(config.train.output) / (config.train.name or default_name(config))
        self.checkpoints = CheckpointFolder(self.path, config.train.keep_checkpoints)
        self.curves = self.path / "curves.png"
        self.metrics = self.path / "metrics.csv"

    def create(self) -> None:
        """Make the folder; ValueError where it cannot be written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be written to ({error}); set train.output") from error

    def find_checkpoint(self, config: Config) -> tuple[Path, dict] | None:
        """Return the checkpoint to go on from, by ``train.resume``; None for a fresh start.

        Raises ValueError where the folder holds a finished run, or one that must not be touched.
        """
        if config.train.resume not in ("auto", "never"):
            path = Path(config.train.resume)
            found = path, read_own_checkpoint(path)
            if path.resolve().parent != self.path.resolve():
                # The best of another folder is not here: best.pt is the best of what this one sees.
                found[1]["progress"].update(best_top1=-1.0, best_epoch=-1)
        elif config.train.resume == "never":
            if self.checkpoints.exists():
                raise ValueError(
                    f"run folder {self.path} already holds checkpoints, and train.resume is 'never': choose another "
                    "train.name, or train.resume auto to go on"
                )
            return None
        else:
            found = self.checkpoints.newest_valid()
            if found is None:
                return None
        path, state = found
        done, total = state["progress"]["epoch"], config.schedule.total_epochs
        if done >= total and state["progress"]["closed_epochs"] >= done:
            if path.resolve().parent != self.path.resolve():
                raise ValueError(f"train.resume {path} is of a finished run ({done} of {total} epochs)")
            raise ValueError(
                f"run folder {self.path} already holds a finished run ({done} of {total} epochs, best top-1 "
                f"{state['progress']['best_top1']:.2f} %); nothing was changed. Choose another train.name for a new "
                "run, or evaluate it: validate.py --checkpoint " + str(self.checkpoints.best)
            )
        check_same_run(state["config"], config)
        return found

    def write_config(self, config: Config) -> None:
        save_config(config, self.path / "config.yaml")


# Changing these in the middle of a run would make it neither the old run nor a new one.
_MODEL_MAY_CHANGE = ("checkpoint", "checkpoint_ema", "drop_path_rate", "drop_rate", "attn_drop_rate")
_FIXED_IN_A_RUN = (
    *(("model", f.name) for f in fields(ModelConfig) if f.name not in _MODEL_MAY_CHANGE),
    *(("train", name) for name in ("batch_size", "seed")),
    ("optim", "name"),
    ("ema", "enabled"),
)
# Where things are kept, and whether they are looked up anew: what a run sees stays the same.
_NOT_OF_THE_RUN = (
    *(("train", name) for name in ("resume", "output", "name")),
    *(("data", name) for name in ("cache", "relist")),
)


def check_same_run(saved: dict, config: Config) -> None:
    """Report every option that differs from the checkpoint's; ValueError where it may not differ."""
    forbidden, allowed = [], []
    for section, options in config_to_dict(config).items():
        for name, value in options.items():
            old = saved.get(section, {}).get(name)
            if old == value or (section, name) in _NOT_OF_THE_RUN:
                continue
            changes = forbidden if (section, name) in _FIXED_IN_A_RUN else allowed
            changes.append(f"{section}.{name} was {old} and is now {value}")
    if forbidden:
        raise ValueError(
            "the checkpoint is of a run with other options: " + "; ".join(forbidden) + ". Set them back, or choose "
            "another train.name for a new run"
        )
    for change in allowed:
        _logger.warning("resuming with a change: %s", change)


def check_same_images(state: dict, splits: Splits, batch_size: int) -> None:
    """Raise ValueError where a run cannot go on with the images that are there now.

    With other classes the labels would mean something else; with another number of steps an epoch, the position.
    A few images more or fewer are reported.
    """
    if "classes" in state and tuple(state["classes"]) != splits.classes:
        raise ValueError(
            f"the checkpoint is of a run on other classes ({_ends(state['classes'])}; now {_ends(splits.classes)}): "
            "check data.root and data.class_list, or choose another train.name for a new run"
        )
    before, now = state.get("train_images"), len(splits.train)
    if before not in (None, now):
        told = f"the checkpoint is of a run on {before:,} training images, and {now:,} are there now"
        if before // batch_size != now // batch_size:
            raise ValueError(
                f"{told}: an epoch would have another number of steps. Put them back as they were, or start a new run "
                "(another train.name) from these weights (model.checkpoint)"
            )
        _logger.warning("%s: the run goes on, in another order than it would have taken", told)
    elif state.get("train_labels") not in (None, splits.train.labels_digest()):
        _logger.warning("resuming with a change: some of the training images have other labels than before")


def _ends(classes: Sequence[str]) -> str:
    return f"{len(classes)} from {classes[0]!r} to {classes[-1]!r}"


def git_revision() -> str:
    """Return the revision of this code, with "+changes" where the working tree differs; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()
