"""The training run: epochs, evaluation, records, checkpoints.

Resuming, in this order: the newest valid checkpoint of the run folder is read; the network is made and given its
weights, and the processes share them; optimizer, scaler and average are made and given their state; the position
says which (epoch, step) comes next. Every draw from there on is a function of (seed, epoch, step), so the run goes
on to the very weights it would have had.
"""

import logging
import math

from torch import nn

from volo.cli import config_to_dict
from volo.config import Config
from volo.data.loader import EvalLoader, TrainLoader
from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.records import Splits
from volo.engine.bottleneck import LoaderVerdict
from volo.engine.checkpoint import TrainState
from volo.engine.evaluate import Evaluation, evaluate
from volo.engine.learner import Learner
from volo.engine.meters import Window
from volo.engine.optim import learning_rate
from volo.engine.preview import batch_picture
from volo.engine.run_folder import RunFolder, git_revision
from volo.reporting import MetricsWriter, ProgressBar
from volo.runtime import distributed
from volo.runtime.distributed import World, processes_here, usable_cores, worker_count
from volo.runtime.signals import StopRequest

_logger = logging.getLogger("volo")


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
        state: dict | None,
    ):
        """Set up the run of ``learner`` on the batches of ``loader``.

        ``val_loader`` gives this rank's share of the evaluation, None if nothing is evaluated; ``state`` is the
        checkpoint to resume from, or None.
        """
        self.config, self.world, self.run, self.splits = config, world, run, splits
        self.learner, self.loader, self.val_loader = learner, loader, val_loader
        self.layout = learner.layout
        self.progress = TrainState()
        if state is not None:
            self.progress.load_state_dict(state["progress"])
        self.failures: list[str] = []
        self.steps_per_epoch = self.loader.steps_per_epoch
        # A run that was killed before its first checkpoint starts over, and so do its records. If the process died
        # between an evaluation and the save after it, that evaluation is repeated.
        resumed_from = self.progress.global_step if state is not None else -1
        redone = "val/top1" if self._epoch_is_open else None
        self.writer = MetricsWriter(run.path, resumed_from, redone, enabled=world.is_main)
        self.window = Window(world.device)
        self.verdict = LoaderVerdict(worker_count(config.data.workers), processes_here(), usable_cores())
        self.stop = StopRequest()
        self.stop_vote = distributed.StopVote()

    # -------------------------------------------------------------------------------------------- the run

    def fit(self) -> bool:
        """Train to the end of the schedule; return False where a signal stopped it, with a checkpoint saved."""
        if self._run_epochs():
            return True
        self._save()
        progress = self.progress
        _logger.info("stopped by a signal at epoch %d, step %d; saved", progress.epoch, progress.step)
        return False

    def _run_epochs(self) -> bool:
        """Train and evaluate from the present position to the end; return False where a signal came."""
        progress, config = self.progress, self.config
        if config.eval.before_training and progress.global_step == 0 and progress.best_epoch < 0:
            if not self._evaluate():
                return False
            self._save(is_best=True)  # fine-tuning may never get better than what it started from
        if self._epoch_is_open and not self._close_epoch():
            return False
        while progress.epoch < config.schedule.total_epochs:
            if not (self._train_epoch() and self._close_epoch()):
                return False
        return True

    @property
    def _epoch_is_open(self) -> bool:
        """Whether the epoch that was trained last still has its evaluation before it."""
        return self.progress.step == 0 and self.progress.closed_epochs < self.progress.epoch

    def _train_epoch(self) -> bool:
        """Train from the present step to the end of the epoch; return False where a signal stopped it."""
        progress, total = self.progress, self.config.schedule.total_epochs
        log_every = self.config.train.log_every_steps
        title = f"epoch {progress.epoch + 1}/{total}"
        bar = ProgressBar(self.steps_per_epoch, title, self.world.is_main, log_every, done=progress.step)
        shown = {}
        self.learner.wrapped.train()
        self.window.restart_clock()
        batches = self.loader.epoch(progress.epoch, start_step=progress.step)
        stopping = False
        while progress.step < self.steps_per_epoch and not stopping:
            lr = self._learning_rate(progress.global_step)
            for micro in range(self.layout.micro_batches):
                with self.window.waiting():
                    batch = next(batches)
                self.failures += batch.failures
                terms = self.learner.forward_backward(batch, progress.epoch, progress.step, micro)
                self.window.add_losses(terms, progress.global_step)
            self.window.grad_norm = self.learner.update(lr, progress.global_step)
            self.window.count_images(self.layout.global_size)

            progress.step += 1
            progress.global_step += 1
            if progress.step % log_every == 0 or progress.step == self.steps_per_epoch:
                shown = self._log(lr)
                shown["data_wait"] = f"{100 * shown['data_wait']:.0f}%"
            bar.update(1, **shown)
            stopping = self.stop_vote(self.stop.requested)
        bar.close()
        stopping = self.stop_vote.finish(stopping or self.stop.requested)
        if progress.step == self.steps_per_epoch:
            progress.epoch, progress.step = progress.epoch + 1, 0
        return not stopping

    def _close_epoch(self) -> bool:
        """Evaluate and save as often as asked, and after the last epoch; return False where a signal came."""
        progress, config = self.progress, self.config
        last = progress.epoch == config.schedule.total_epochs
        best_before = progress.best_epoch
        if (last or progress.epoch % config.eval.every_epochs == 0) and not self._evaluate():
            return False
        progress.closed_epochs = progress.epoch
        if last or progress.epoch % config.train.checkpoint_every_epochs == 0 or progress.best_epoch != best_before:
            self._save(is_best=progress.best_epoch != best_before or self.splits.val is None)
        return True

    def _learning_rate(self, global_step: int) -> float:
        epoch, step = divmod(global_step, self.steps_per_epoch)
        schedule = self.config.schedule
        return learning_rate(
            schedule, self.config.optim.lr, epoch + (step / self.steps_per_epoch if schedule.per_step else 0)
        )

    # -------------------------------------------------------------------------------- evaluation, records

    def _evaluate(self) -> bool:
        """Evaluate raw and average weights; return False where a signal stopped it on the way."""
        progress, learner = self.progress, self.learner
        if self.val_loader is None:
            return True
        models = {"val": learner.model}
        if learner.ema is not None:
            models["val_ema"] = learner.ema.module
        results = {}
        for name, model in models.items():
            try:
                results[name] = self._evaluation(model)
            except UnreadableImage as error:  # on every rank
                self._save()  # the epoch is whole; with the file mended, the run goes on from here
                raise UnreadableImage(f"{error}. {self.run.checkpoints.last} has all that was trained") from error
            if results[name] is None:
                return False
            if not math.isfinite(results[name].labels.loss):
                raise self._non_finite(f"{name}/loss", progress.global_step)
        chosen = results["val_ema" if self.evaluated_weights == "ema" else "val"].labels
        if chosen.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = chosen.top1, progress.epoch
        scalars = {f"{name}/{m}": getattr(e.labels, m) for name, e in results.items() for m in ("top1", "top5", "loss")}
        self.writer.scalars(progress.global_step, float(progress.epoch), **scalars)
        self._report(results)
        return True

    def _evaluation(self, model: nn.Module) -> Evaluation | None:
        config, world = self.config, self.world
        # Ranks update BatchNorm statistics on their own images; what is evaluated is what rank 0 saves.
        distributed.broadcast_buffers(model)
        return evaluate(
            model,
            self.val_loader,
            world.device,
            config.augment.mean,
            config.augment.std,
            autocast=self.learner.precision.autocast,
            channels_last=config.train.channels_last,
            should_stop=lambda: self.stop.requested,
        )

    @property
    def evaluated_weights(self) -> str:
        """Which weights choose the best checkpoint: "raw" or "ema"."""
        choice = self.config.eval.weights
        return choice if choice != "auto" else "ema" if self.learner.ema is not None else "raw"

    def _report(self, results: dict[str, Evaluation]) -> None:
        progress = self.progress
        names = {"val": "raw weights", "val_ema": "EMA weights"}
        parts = []
        for name, evaluation in results.items():
            accuracy = evaluation.labels
            top1, top5 = f"top-1 {accuracy.top1:.2f} %", f"top-5 {accuracy.top5:.2f} %"
            parts.append(f"{names[name]} {top1} {top5} loss {accuracy.loss:.4f}")
        _logger.info(
            "epoch %d: %s (%d images); best %.2f %% at epoch %d",
            *(progress.epoch, "; ".join(parts), results["val"].labels.images),
            *(progress.best_top1, progress.best_epoch),
        )
        if skipped := results["val"].skipped:
            _logger.warning("skipped %d unreadable validation image(s):", len(skipped))
            for failure in skipped[:10]:
                _logger.warning("  %s", failure)

    def _log(self, lr: float) -> dict[str, float]:
        """Write and return the means since the last log line; NonFiniteLoss where a loss was not finite."""
        self._check_finite()
        progress = self.progress
        means = {**self.window.close(), "lr": lr}
        epoch = progress.global_step / self.steps_per_epoch
        self.writer.scalars(progress.global_step, epoch, **{f"train/{name}": value for name, value in means.items()})
        self._report_failures()
        if verdict := self.verdict(self.window.pace):
            _logger.warning("%s", verdict)
        return means

    def _report_failures(self) -> None:
        """Name and count the images, of all ranks, that others took the place of since the last time."""
        failures, self.failures = distributed.gather_lists(self.failures), []
        for failure in failures:
            _logger.warning("another image took the place of one that cannot be used: %s", failure)
        self.progress.replaced_images += len(failures)

    def _check_finite(self) -> None:
        found = self.window.first_non_finite()
        if found is not None:
            step, terms = found
            raise self._non_finite(" and ".join(terms), step + 1)

    def _non_finite(self, what: str, step: int) -> NonFiniteLoss:
        """Return the error for ``what`` of optimizer step ``step``, counted from 1 as in metrics.csv."""
        kept = f"the last good checkpoint is {self.run.checkpoints.last}" if self.run.checkpoints.exists() else ""
        return NonFiniteLoss(
            f"{what} not finite at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}), learning rate "
            f"{self._learning_rate(step - 1):.3g}; {kept or 'no checkpoint was saved yet'}. A lower optim.lr, "
            "optim.clip_grad 1.0 or train.precision fp32 may help"
        )

    def lost_workers(self) -> int:
        """Return how many reading processes, of all ranks, were replaced since this process started."""
        return int(distributed.sum_over_ranks([self.loader.lost_workers])[0])

    def show_batch(self) -> None:
        """Draw the first images that are due, as the network gets them, into batch.png and TensorBoard."""
        if not self.world.is_main:
            return
        progress = self.progress
        epoch = min(progress.epoch, self.config.schedule.total_epochs - 1)
        png = batch_picture(self.learner, self.loader, self.splits.classes, epoch, progress.step)
        if png is not None:
            self.writer.picture("batch", progress.global_step, png)

    # ---------------------------------------------------------------------------------------- checkpoints

    def _save(self, is_best: bool = False) -> None:
        """Save on rank 0; where that fails, or the weights would spoil a good checkpoint, every rank raises."""
        self._check_finite()
        self._report_failures()
        if not nn.utils.get_total_norm(list(self.learner.model.parameters())).isfinite():
            raise self._non_finite("norm of the weights", self.progress.global_step)
        distributed.on_main(lambda: self.run.checkpoints.save(self._state(), is_best))

    def _state(self) -> dict:
        progress, config = self.progress, self.config
        return {
            "format": "volo",
            "version": 1,
            "arch": config.model.name,
            "classes": list(self.splits.classes),
            "train_images": len(self.splits.train),
            "train_labels": self.splits.train.labels_digest(),
            **self.learner.state_dict(),
            "progress": progress.state_dict(),
            "rng": {"seed": config.train.seed},
            "config": config_to_dict(config),
            "epoch": progress.epoch,
            "metric": progress.best_top1,
            "evaluated_weights": self.evaluated_weights,
            "revision": git_revision(),
        }
