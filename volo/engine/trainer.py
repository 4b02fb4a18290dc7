"""The training run: epochs, evaluation, records, checkpoints.

How a run resumes, in this order:

1. The newest valid checkpoint of the run folder is read.
2. The network is made and given its weights, and the processes share them.
3. Optimizer, scaler and weight average are made and given their state.
4. The train state says which (epoch, step) comes next.

Every draw from there on is a function of (seed, epoch, step), so the run ends with the very weights it would have had
without the stop.
"""

import logging
import math
import time

from torch import nn

from volo.cli import config_to_dict
from volo.config import Config
from volo.data.loader import EvalLoader, TrainLoader
from volo.data.sources.records import Splits
from volo.engine.checkpoint import BackgroundSaver, SaveError, TrainState
from volo.engine.evaluate import Evaluation, evaluate
from volo.engine.learner import Learner
from volo.engine.meters import BottleneckHint, TrainMeters
from volo.engine.optim import learning_rate
from volo.engine.preview import batch_picture
from volo.engine.run_folder import RunFolder, git_revision
from volo.reporting import MetricsWriter, ProgressBar
from volo.runtime import distributed
from volo.runtime.compiling import seconds_compiling
from volo.runtime.distributed import World, processes_here, usable_cores, worker_count
from volo.runtime.errors import DataError
from volo.runtime.signals import StopRequest

_logger = logging.getLogger("volo")
_STARTED = time.monotonic()  # the program imports this module as it starts


class NonFiniteLoss(ArithmeticError):
    """The loss became infinite or not a number."""


class Trainer:
    """One process's part in a training run."""

    def __init__(
        self,
        config: Config,
        world: World,
        run: RunFolder,
        splits: Splits,
        learner: Learner,
        loader: TrainLoader,
        val_loader: EvalLoader | None,
        checkpoint: dict | None,
        stop: StopRequest,
    ):
        """Set up the run of ``learner`` on the batches of ``loader``.

        Args:
            config, world, run: The options, this process and the run folder.
            splits: The images.
            learner: The network with everything that changes its weights.
            loader: This rank's training batches.
            val_loader: This rank's share of the evaluation; None if nothing is evaluated.
            checkpoint: The checkpoint to resume from, or None.
            stop: The request to stop.
        """
        self.config, self.world, self.run, self.splits = config, world, run, splits
        self.learner, self.loader, self.val_loader = learner, loader, val_loader
        self.layout = learner.layout
        self.steps_per_epoch = loader.steps_per_epoch
        self.state = TrainState()
        if checkpoint is not None:
            self.state.load_state_dict(checkpoint["progress"])
        # A run that was killed before its first checkpoint starts over, and so do its records. If the process died
        # between an evaluation and the save after it, that evaluation is repeated.
        resumed_from = self.state.global_step if checkpoint is not None else -1
        redone = "val/top1" if self._epoch_is_open else None
        self.writer = MetricsWriter(run.path, resumed_from, redone, enabled=world.is_main)
        bottleneck = BottleneckHint(worker_count(config.data.workers), processes_here(), usable_cores())
        self.meters = TrainMeters(world.device, bottleneck)
        if checkpoint is not None:
            self.meters.load_state(checkpoint.get("meters", []), world)
        self.saver = BackgroundSaver(run.checkpoints)
        self.best_saved = self.best_being_saved = (self.state.best_top1, self.state.best_epoch)
        self.seconds_compiling = 0.0
        self.failures: list[str] = []  # unreadable images that were replaced since the last log line
        self.stop = stop
        self.stop_vote = distributed.StopVote()

    def fit(self) -> bool:
        """Train to the end of the schedule; return False if a signal stopped it, with a checkpoint saved.

        Raises SaveError if the last checkpoint could not be written.
        """
        try:
            finished = self._run_epochs()
            self.stop.heed()
            if not finished:
                self._save()
            distributed.on_main(self._require_saved)
        finally:
            self.saver.join()
        if not finished:
            why = f"after {self.config.train.stop_after_minutes:g} minutes" if self._time_is_over else "by a signal"
            _logger.info("stopped %s at epoch %d, step %d; saved", why, self.state.epoch, self.state.step)
        self.writer.close()
        if replaced := self.state.replaced_images:
            _logger.warning("replaced unreadable training images %d times since the run began", replaced)
        if lost := int(distributed.sum_over_ranks([self.loader.lost_workers])[0]):
            _logger.warning("replaced dead data workers %d times since this process started", lost)
        return finished

    @property
    def _time_is_over(self) -> bool:
        minutes = self.config.train.stop_after_minutes
        return minutes is not None and time.monotonic() - _STARTED >= 60 * minutes

    @property
    def _wants_to_stop(self) -> bool:
        return self.stop.requested or self._time_is_over

    def _run_epochs(self) -> bool:
        """Train and evaluate from the present position to the end; return False if a signal stopped it."""
        state, config = self.state, self.config
        if config.eval.before_training and state.global_step == 0 and state.best_epoch < 0:
            if not self._evaluate():
                return False
            self._save(is_best=True)  # fine-tuning may never get better than what it started from
        if self._epoch_is_open and not self._close_epoch():
            return False
        while state.epoch < config.schedule.total_epochs:
            if not (self._train_epoch() and self._close_epoch()):
                return False
        return True

    @property
    def _epoch_is_open(self) -> bool:
        """Whether the epoch trained last has not been evaluated and saved yet."""
        return self.state.step == 0 and self.state.closed_epochs < self.state.epoch

    def _train_epoch(self) -> bool:
        """Train from the present step to the end of the epoch; return False if a signal stopped it."""
        state, log_every = self.state, self.config.train.log_every_steps
        title = f"epoch {state.epoch + 1}/{self.config.schedule.total_epochs}"
        bar = ProgressBar(self.steps_per_epoch, title, self.world.is_main, log_every, done=state.step)
        shown = {}
        distributed.note_doing(state)
        self.learner.wrapped.train()
        self.meters.restart_clock()
        batches = self.meters.timed(self.loader.epoch(state.epoch, start_step=state.step))
        stopping = False
        while state.step < self.steps_per_epoch and not stopping:
            lr = self._learning_rate(state.global_step)
            for micro in range(self.layout.micro_batches):
                batch = next(batches)
                self.failures += batch.failures
                terms = self.learner.forward_backward(batch, state.epoch, state.step, micro)
                self.meters.add_pass(terms, state.global_step)
            grad_norm = self.learner.optimizer_step(lr, state.global_step)
            self.meters.add_step(self.layout.global_size, grad_norm)
            state.step += 1
            state.global_step += 1

            if state.step % log_every == 0 or state.step == self.steps_per_epoch:
                shown = self._log(lr)
            bar.update(1, **shown)
            stopping = self.stop_vote(self._wants_to_stop)
        bar.close()
        stopping = self.stop_vote.finish(stopping or self._wants_to_stop)
        if state.step == self.steps_per_epoch:
            state.epoch, state.step = state.epoch + 1, 0
        return not stopping

    def _close_epoch(self) -> bool:
        """Evaluate and save as often as asked, and after the last epoch; return False if a signal stopped it."""
        state, config = self.state, self.config
        last = state.epoch == config.schedule.total_epochs
        self._end_save()
        best_before = state.best_epoch
        if (last or state.epoch % config.eval.every_epochs == 0) and not self._evaluate():
            return False
        state.closed_epochs = state.epoch
        is_best = state.best_epoch != best_before
        if last or state.epoch % config.train.checkpoint_every_epochs == 0 or is_best:
            self._save(is_best=is_best or self.splits.val is None)
        return True

    def _learning_rate(self, global_step: int) -> float:
        epoch, step = divmod(global_step, self.steps_per_epoch)
        schedule = self.config.schedule
        position = epoch + (step / self.steps_per_epoch if schedule.per_step else 0)
        return learning_rate(schedule, self.config.optim.lr, position)

    def _evaluate(self) -> bool:
        """Evaluate raw and averaged weights; return False if a signal stopped it."""
        state, learner = self.state, self.learner
        if self.val_loader is None:
            return True
        models = {"val": learner.model}
        if learner.ema is not None:
            models["val_ema"] = learner.ema.module
        results: dict[str, Evaluation] = {}
        for name, model in models.items():
            evaluation = self._evaluation(model, self.val_loader)
            if evaluation is None:
                return False
            if not math.isfinite(evaluation.labels.loss):
                raise self._non_finite(f"{name}/loss", state.global_step)
            results[name] = evaluation
        chosen = results["val_ema" if self.evaluated_weights == "ema" else "val"].labels
        if chosen.top1 > state.best_top1:
            state.best_top1, state.best_epoch = chosen.top1, state.epoch
        scalars = {f"{n}/{m}": getattr(e.labels, m) for n, e in results.items() for m in ("top1", "top5", "loss")}
        self.writer.scalars(state.global_step, float(state.epoch), **scalars)
        self._report(results)
        return True

    def _evaluation(self, model: nn.Module, val_loader: EvalLoader) -> Evaluation | None:
        config, world = self.config, self.world
        # Ranks update BatchNorm statistics on their own images; what is evaluated is what rank 0 saves.
        distributed.broadcast_buffers(model)
        distributed.note_doing(f"evaluation after epoch {self.state.epoch}")
        try:
            return evaluate(
                model,
                val_loader,
                world.device,
                config.augment.mean,
                config.augment.std,
                autocast=self.learner.precision.autocast,
                channels_last=self.learner.channels_last,
                should_stop=lambda: self._wants_to_stop,
            )
        except DataError as error:  # on every rank
            self._save()  # the epoch is complete; once the file is repaired, the run resumes from here
            distributed.on_main(self._require_saved)
            raise DataError(f"{error}. {self.run.checkpoints.last} has all that was trained") from error

    @property
    def evaluated_weights(self) -> str:
        """Which weights choose the best checkpoint: "raw" or "ema"."""
        choice = self.config.eval.weights
        return choice if choice != "auto" else "ema" if self.learner.ema is not None else "raw"

    def _report(self, results: dict[str, Evaluation]) -> None:
        state = self.state
        names = {"val": "raw weights", "val_ema": "EMA weights"}
        parts = [f"{names[name]} {evaluation.labels}" for name, evaluation in results.items()]
        _logger.info(
            "epoch %d: %s (%d images); best %.2f %% at epoch %d",
            *(state.epoch, "; ".join(parts), results["val"].labels.images, state.best_top1, state.best_epoch),
        )
        if skipped := results["val"].skipped:
            _logger.warning("skipped %d unreadable validation image(s):", len(skipped))
            for failure in skipped[:10]:
                _logger.warning("  %s", failure)

    def _log(self, lr: float) -> dict[str, float | str]:
        """Write the means since the last log line; return what the progress bar shows.

        Raises NonFiniteLoss if a loss was not finite.
        """
        self._check_finite()
        state = self.state
        means = {**self.meters.close(), "lr": lr}
        epoch = state.global_step / self.steps_per_epoch
        self.writer.scalars(state.global_step, epoch, **{f"train/{name}": value for name, value in means.items()})
        self._report_failures()
        self._report_unsaved()
        self._report_compilation()
        if self.meters.hint is not None:
            _logger.warning("%s", self.meters.hint)
        return {**means, "data_wait": f"{100 * means['data_wait']:.0f}%"}

    def _report_compilation(self) -> None:
        """Log how long the process has compiled for, if it has since the last time."""
        before, self.seconds_compiling = self.seconds_compiling, seconds_compiling()
        if (seconds := self.seconds_compiling - before) >= 1:
            _logger.info("compiling took %.0f s of the time since the last line", seconds)

    def _report_failures(self) -> None:
        """Log and count the images, of all ranks, that were replaced since the last time."""
        failures, self.failures = distributed.gather_lists(self.failures), []
        for failure in failures:
            _logger.warning("replaced unreadable training image: %s", failure)
        self.state.replaced_images += len(failures)

    def _check_finite(self) -> None:
        found = self.meters.first_non_finite()
        if found is not None:
            step, terms = found
            raise self._non_finite(" and ".join(terms), step + 1)

    def _non_finite(self, what: str, step: int) -> NonFiniteLoss:
        """Return the error for ``what`` at optimizer step ``step``, counted from 1 as in metrics.csv."""
        checkpoints = self.run.checkpoints
        kept = f"the last good checkpoint is {checkpoints.last}" if checkpoints.exists() else "no checkpoint was saved"
        return NonFiniteLoss(
            f"{what} not finite at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}), learning rate "
            f"{self._learning_rate(step - 1):.3g}; {kept}. A lower optim.lr, optim.clip_grad 1.0 or train.precision "
            "fp32 may help"
        )

    def show_batch(self) -> None:
        """Draw the first images of the next step, as the network gets them, into batch.png and TensorBoard."""
        if not self.world.is_main:
            return
        epoch = min(self.state.epoch, self.config.schedule.total_epochs - 1)
        try:
            png = batch_picture(self.learner, self.loader, self.splits.classes, epoch, self.state.step)
        except Exception as error:  # of the plotting library, for example; the step itself would fail with its reason
            _logger.warning("the first batch could not be drawn: %s: %s", type(error).__name__, error)
            return
        if png is not None:
            self.writer.picture("batch", self.state.global_step, png)

    def _save(self, is_best: bool = False) -> None:
        """Begin to save, on rank 0; if the weights would spoil a good checkpoint, every rank raises."""
        self._check_finite()
        self._report_failures()
        if not nn.utils.get_total_norm(list(self.learner.model.parameters())).isfinite():
            raise self._non_finite("norm of the weights", self.state.global_step)
        self._end_save()
        self.best_being_saved = (self.state.best_top1, self.state.best_epoch)
        meters = self.meters.state()
        distributed.on_main(lambda: self.saver.save({**self._checkpoint(), "meters": meters}, is_best))

    def _end_save(self) -> None:
        """Wait for the save under way.

        If it failed, earlier checkpoints are intact, and the next save tries again. But a best that is not on the disk
        is none: the next evaluation above the best there becomes the best.
        """
        if not distributed.on_main(self.saver.join, share=lambda error: error is not None):
            self.best_saved = self.best_being_saved
        elif self.best_being_saved != self.best_saved:
            self.state.best_top1, self.state.best_epoch = self.best_being_saved = self.best_saved

    def _require_saved(self) -> None:
        """Wait for the save under way, on rank 0; raise SaveError if it failed."""
        if error := self.saver.join():
            raise SaveError(f"{error}. Free some space and start again with the same command")

    def _report_unsaved(self) -> None:
        if self.saver.error is not None:
            _logger.warning("%s. Training goes on, and the next save tries again; free some space", self.saver.error)

    def _checkpoint(self) -> dict:
        state, config = self.state, self.config
        return {
            "format": "volo",
            "version": 1,
            "arch": config.model.name,
            "classes": list(self.splits.classes),
            "train_images": len(self.splits.train),
            "train_labels": self.splits.train.labels_digest(),
            **self.learner.state_dict(),
            "progress": state.state_dict(),
            "rng": {"seed": config.train.seed},
            "config": config_to_dict(config),
            "epoch": state.epoch,
            "metric": state.best_top1,
            "evaluated_weights": self.evaluated_weights,
            "revision": git_revision(),
        }
