"""The folder of a run, and what a resumed run must have in common with the run before."""

import logging
import subprocess
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from volo.cli import config_to_dict, save_config, upgraded
from volo.config import Config, ModelConfig
from volo.data.sources.records import Splits
from volo.engine.checkpoint import SAVED, CheckpointFolder, read_own_checkpoint
from volo.runtime.files import FolderInUse, lock_folder, remove_temporary_files
from volo.runtime.rendezvous import remembers

_logger = logging.getLogger("volo")


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
        """Make the folder and keep other runs out of it; raise ValueError if it is not writable or in use."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)
        except FolderInUse as holder:
            raise ValueError(
                f"run folder {self.path} is in use by {holder}; nothing was changed. Choose another train.name, or "
                "wait for that run to end"
            ) from None
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be written to ({error}). Set train.output") from error
        remove_temporary_files(self.path)  # half-written by a run that was killed

    def find_checkpoint(self, config: Config) -> tuple[Path, dict] | None:
        """Return the checkpoint to resume from, by ``train.resume``; None for a fresh start.

        If torchrun has started this run again after it had saved, that is the run to go on with, whatever
        ``train.resume`` says; and if only the end of it was left, there is nothing to refuse.

        Raises ValueError if the folder holds a finished run, or one that must not be touched.
        """
        restarted = remembers(SAVED)
        resume = "auto" if restarted else config.train.resume
        if resume not in ("auto", "never"):
            path = Path(resume)
            found = path, read_own_checkpoint(path)
            if path.resolve().parent != self.path.resolve():
                # best.pt is the best of this folder's own evaluations.
                found[1]["progress"].update(best_top1=-1.0, best_epoch=-1)
        elif resume == "never":
            if self.checkpoints.exists():
                raise ValueError(
                    f"run folder {self.path} already holds checkpoints, and train.resume is 'never'. Choose another "
                    "train.name, or set train.resume auto to resume"
                )
            return None
        else:
            found = self.checkpoints.newest_valid()
            if found is None:
                return None
            self.checkpoints.complete_save(*found)
        path, state = found
        done, total = state["progress"]["epoch"], config.schedule.total_epochs
        finished = done >= total and state["progress"]["closed_epochs"] >= done
        if finished and not restarted and self._has_curves_of(path):
            if path.resolve().parent != self.path.resolve():
                raise ValueError(f"train.resume {path} is from a finished run ({done} of {total} epochs)")
            raise ValueError(
                f"run folder {self.path} already holds a finished run ({done} of {total} epochs, best top-1 "
                f"{state['progress']['best_top1']:.2f} %); nothing was changed. Choose another train.name for a new "
                "run, or evaluate it: validate.py --checkpoint " + str(self.checkpoints.best)
            )
        check_same_run(state["config"], config)
        return found

    def _has_curves_of(self, path: Path) -> bool:
        """Whether the curves, which a run draws at its very end, are newer than the checkpoint at ``path``."""
        return self.curves.exists() and self.curves.stat().st_mtime_ns >= path.stat().st_mtime_ns

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
# These say where things are kept, and change nothing in the run.
_NOT_OF_THE_RUN = (
    *(("train", name) for name in ("resume", "output", "name", "stop_after_minutes")),
    ("data", "cache"),
)


def check_same_run(saved: dict, config: Config) -> None:
    """Report every option that differs from the checkpoint's; raise ValueError if it must not differ."""
    forbidden, allowed = [], []
    saved = upgraded(saved)
    for section, options in config_to_dict(config).items():
        for name, value in options.items():
            old = saved.get(section, {}).get(name)
            if old == value or (section, name) in _NOT_OF_THE_RUN:
                continue
            changes = forbidden if (section, name) in _FIXED_IN_A_RUN else allowed
            changes.append(f"{section}.{name} was {old} and is now {value}")
    if forbidden:
        raise ValueError(
            "the checkpoint is from a run with other options: " + "; ".join(forbidden) + ". Set them back, or choose "
            "another train.name for a new run"
        )
    for change in allowed:
        _logger.warning("resuming with a change: %s", change)


def check_same_images(state: dict, splits: Splits, batch_size: int) -> None:
    """Raise ValueError if a run cannot resume on the present images.

    Other classes would change the meaning of the labels; another number of steps per epoch, that of the position.
    A few images more or fewer are only reported.
    """
    if "classes" in state and tuple(state["classes"]) != splits.classes:
        raise ValueError(
            f"the checkpoint is from a run on other classes ({_ends(state['classes'])}; now {_ends(splits.classes)}). "
            "Check data.root and data.class_list, or choose another train.name for a new run"
        )
    before, now = state.get("train_images"), len(splits.train)
    if before not in (None, now):
        message = f"the checkpoint is from a run on {before:,} training images; now there are {now:,}"
        if before // batch_size != now // batch_size:
            raise ValueError(
                f"{message}, so that an epoch has another number of steps. Restore them, or start a new run "
                "(another train.name) from these weights (model.checkpoint)"
            )
        _logger.warning("%s: the run resumes, but takes the images in another order", message)
    elif state.get("train_labels") not in (None, splits.train.labels_digest()):
        _logger.warning("resuming with a change: some of the training images have other labels than before")


def _ends(classes: Sequence[str]) -> str:
    return f"{len(classes)} from {classes[0]!r} to {classes[-1]!r}"


def git_revision() -> str:
    """Return the revision of this code, with "+changes" if the working tree differs; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()
