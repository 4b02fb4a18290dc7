"""What a run prints: log lines and the progress of a loop."""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from volo.runtime.text import printable

logger = logging.getLogger("volo")

LINES = {"lines": True}
"""Given as ``extra``, keeps the line feeds of a message, such as a table; those in names must be escaped before."""


def setup_logging(run_dir: str | Path | None, main_process: bool = True, rank: int = 0) -> None:
    """Set up the handlers of the logger "volo"; a second call replaces the first.

    The main process prints its messages plainly to stdout and appends them, with the time, to ``log.txt`` in
    ``run_dir`` (None: no file). Messages are about the run as a whole, so the other ranks would repeat them: they
    only print errors, with their rank in front. Both show names that others wrote by :func:`printable`.
    """
    assert main_process == (rank == 0), f"rank {rank}, main_process={main_process}"
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = _BarSafeHandler(sys.stdout)
    console.setFormatter(_Printable("%(message)s" if main_process else f"[rank {rank}] %(message)s"))
    logger.addHandler(console)
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
    if main_process and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        # Opened by the first message: a refused run leaves an existing folder unchanged.
        file = _LogFile(Path(run_dir) / "log.txt", encoding="utf-8", delay=True)
        file.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


class _Printable(logging.Formatter):
    """Escapes control characters in messages, and line feeds unless the message is of several lines (LINES)."""

    def format(self, record: logging.LogRecord) -> str:
        keep = "\n" if getattr(record, "lines", False) or record.exc_info else ""
        return printable(super().format(record), keep)


class _LogFile(logging.FileHandler):
    """A log file that may miss lines of a time when the disk was full: the console has them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do not print a traceback per message, as logging does by default."""


class _BarSafeHandler(logging.StreamHandler):
    """Takes a progress bar off the terminal while a line is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without a stream that cannot be written: its reader has gone, or the disk behind it is full."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        with contextlib.suppress(OSError, ValueError):  # also what is still in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            print(f"warning: nothing more is printed to standard output ({error})", file=sys.stderr, flush=True)
        logger.warning("nothing more is printed to standard output (%s)", error)


class ProgressBar:
    """Progress of one loop: a bar if stderr is a terminal, else a log line now and then.

    Args:
        total: Steps of the loop.
        title: The prefix: "epoch 3/310", "eval".
        enabled: False makes every method do nothing, for the ranks that do not report.
        log_every: Steps between two lines; the last step always has one.
        done: Steps already done, if a run resumes inside the loop.
        delay: Seconds before anything is shown: a loop that ends sooner prints nothing.
    """

    def __init__(
        self, total: int, title: str, enabled: bool = True, log_every: int = 50, done: int = 0, delay: float = 0
    ):
        self._total, self._title, self._log_every = total, printable(title), log_every
        self._enabled = enabled
        self._first = self._done = done
        self._start = time.perf_counter()
        self._delay = delay
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                desc=self._title,
                initial=done,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
                delay=delay,
            )

    def update(self, n: int = 1, **shown: float | str) -> None:
        """Count ``n`` more steps and show the named values, as in ``update(1, loss=6.9, images_per_s=800)``."""
        if not self._enabled:
            return
        before, self._done = self._done, self._done + n
        if self._bar is None and time.perf_counter() - self._start < self._delay:
            return
        texts = {name.replace("_per_", "/"): _short(value) for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(texts, refresh=False)
            self._bar.update(n)
        elif self._done // self._log_every > before // self._log_every or self._done == self._total:
            seconds_per_step = (time.perf_counter() - self._start) / max(self._done - self._first, 1)
            eta = tqdm.format_interval(seconds_per_step * (self._total - self._done))
            values = "".join(f"  {name} {text}" for name, text in texts.items())
            logger.info("%s  step %d/%d%s  ETA %s", self._title, self._done, self._total, values, eta)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return printable(str(value))
