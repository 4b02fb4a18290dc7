"""Checkpoints that are complete or absent, and the newest valid one to resume from.

What a checkpoint of ours holds (plain containers and tensors only, so it loads with ``weights_only``):
    format, version          "volo", 1
    arch, classes            registered model name; class names in index order
    state_dict               the network
    state_dict_ema           its average, if there is one
    optimizer, scaler        their state
    progress                 :class:`TrainState`: position in the schedule and the best result so far
    rng                      the seed; every draw of a run is a function of it and of the position
    config                   the resolved config
    epoch, metric            finished epochs and best top-1, under the names timm's tools look for
    evaluated_weights        "raw" or "ema": which weights the metric belongs to
    is_best                  whether best.pt is this state
"""

import contextlib
import logging
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from volo.models.weights import UnreadableCheckpoint, read_checkpoint
from volo.runtime.device import snapshot
from volo.runtime.errors import Failure
from volo.runtime.files import atomic_file, link_atomic
from volo.runtime.rendezvous import remember

SAVED = "saved a checkpoint"  # what a run remembers over restarts of its processes

_logger = logging.getLogger("volo")


@dataclass
class TrainState:
    """Where a run is: ``epoch`` finished epochs and ``step`` optimizer steps into the next one."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    closed_epochs: int = 0  # finished epochs whose evaluation, if one was due, is done too
    best_top1: float = -1.0
    best_epoch: int = -1
    replaced_images: int = 0  # how many times an unreadable image was replaced

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}"

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class SaveError(Failure):
    """A checkpoint could not be written; those written before are intact. What can be done stands outside."""


def save_atomically(state: dict, path: Path) -> None:
    """Write ``state`` to ``path`` so that at any moment ``path`` is either the old file or the new one, whole.

    Raises SaveError (a full disk, a lost mount); the half-written file is removed and the old one stays.
    """
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch may report a failed write as an internal error of its archive; the cause is in its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        free = (
            f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MB free on that disk)"
            if path.parent.exists()
            else ""
        )
        raise SaveError(
            f"checkpoint {path} could not be written: {reason}{free}. Earlier checkpoints are intact"
        ) from error


class CheckpointFolder:
    """The checkpoints of one run: ``last.pt``, ``best.pt`` and the ``keep`` newest ``step-*.pt``."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def save(self, state: dict, is_best: bool) -> None:
        """Write ``state`` once, link it as last and, if it is, as best; delete the oldest beyond ``keep``.

        Checkpoints with a higher step number than ``state`` are from before the run resumed at an earlier one. They are
        deleted, too, or the next start would resume from them.
        """
        with contextlib.suppress(OSError):  # the save says what is wrong
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        path = self.folder / f"step-{state['progress']['global_step']:08d}.pt"
        save_atomically({**state, "is_best": is_best}, path)
        self._name(path, self.last)
        if is_best:
            self._name(path, self.best)
        given_up = [other for other in self._numbered() if other > path]
        for old in given_up + self._numbered()[len(given_up) + self.keep :]:
            old.unlink(missing_ok=True)

    def complete_save(self, path: Path, state: dict) -> None:
        """Give the newest checkpoint the names that a save which was killed did not get to."""
        for name in [self.last, *([self.best] if state.get("is_best") else [])]:
            # A name that is newer is a copy, on a file system without links.
            if not name.exists() or name.stat().st_mtime_ns < path.stat().st_mtime_ns:
                self._name(path, name)

    def _name(self, path: Path, name: Path) -> None:
        """Give the file at ``path`` a second name, replacing its former holder atomically."""
        try:
            link_atomic(path, name)
        except OSError as error:
            raise SaveError(f"{name} could not be written: {error}. {path} holds the same state") from error

    def _numbered(self) -> list[Path]:
        """Return the numbered checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def exists(self) -> bool:
        return self.last.exists() or bool(self._numbered())

    def newest_valid(self) -> tuple[Path, dict] | None:
        """Return the newest checkpoint that can be read, reporting each that cannot; None in a fresh folder.

        Raises UnreadableCheckpoint if there are checkpoints but none can be read: a run never restarts by itself.
        """
        candidates = self._numbered()
        if self.last.exists():
            # A run killed between writing a checkpoint and naming it last has a newer one than last.pt, which is
            # a link to the one before or, on a file system without links, a copy of it.
            written = self.last.stat().st_mtime_ns
            old = [path.samefile(self.last) or path.stat().st_mtime_ns <= written for path in candidates]
            candidates.insert(old.index(True) if any(old) else len(old), self.last)
        tried: list[Path] = []
        for path in candidates:
            if any(path.samefile(other) for other in tried):
                continue
            try:
                return path, read_own_checkpoint(path)
            except ValueError as error:
                tried.append(path)
                _logger.warning("skipping %s: %s", path.name, error)
        if tried:
            raise UnreadableCheckpoint(
                f"none of the checkpoints in {self.folder} can be read ({len(tried)} tried, see the reasons above); "
                "nothing was changed. To start from scratch, use another train.name"
            )
        return None


class BackgroundSaver:
    """Saves from a snapshot, in a thread, while training goes on; one save at a time.

    ``error`` says why the last save that ended failed; None if it did not.
    """

    def __init__(self, checkpoints: CheckpointFolder):
        self.error: SaveError | None = None
        self._checkpoints = checkpoints
        self._thread: threading.Thread | None = None
        self._unexpected: Exception | None = None

    def save(self, state: dict, is_best: bool) -> None:
        """Wait for the save under way, if there is one; take a snapshot of ``state`` and begin to save it."""
        self.join()
        taken, wait_for_copies = snapshot(state)

        def write() -> None:
            try:
                wait_for_copies()
                self._checkpoints.save(taken, is_best)
                remember(SAVED)
                self.error = None
            except SaveError as error:
                self.error = error
            except Exception as error:
                self._unexpected = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def join(self) -> SaveError | None:
        """Wait for the save under way, if there is one; return ``error``."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._unexpected is not None:
            raise self._unexpected
        return self.error


def read_own_checkpoint(path: Path) -> dict:
    """Return a checkpoint that this program wrote.

    Raises UnreadableCheckpoint if it is damaged, ValueError if it is missing or from another program.
    """
    state = read_checkpoint(path)
    missing = {"state_dict", "optimizer", "progress", "config"} - set(state)
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint to resume from: it lacks {', '.join(sorted(missing))}. To start from its "
            "weights, use model.checkpoint"
        )
    return state
