"""What a run prints: log lines, the progress of a loop, tables of plain text."""

import logging
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("volo")

_NUMBER = re.compile(r"[+-]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?%?|nan|[+-]?inf|-", re.IGNORECASE)


def setup_logging(run_dir: str | Path | None, main_process: bool = True, rank: int = 0) -> None:
    """Send the messages of the logger "volo" where they belong; a second call replaces the first.

    The main process prints its messages plainly to stdout and appends them, with the time, to ``log.txt`` in
    ``run_dir`` (None: no file). What is logged is about the run as a whole, so the others would repeat it: they
    print errors alone, with their rank in front.
    """
    assert main_process == (rank == 0), f"rank {rank}, main_process={main_process}"
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = _BarSafeHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s" if main_process else f"[rank {rank}] %(message)s"))
    logger.addHandler(console)
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
    if main_process and run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        # Opened by the first message: a run that is refused leaves the folder of another as it was.
        file = _LogFile(Path(run_dir) / "log.txt", encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


class _LogFile(logging.FileHandler):
    """A log file that leaves out what a full disk does not take: the console has it, and the next save ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print no traceback a message, as logging does by itself."""


class _BarSafeHandler(logging.StreamHandler):
    """Takes a progress bar off the terminal while a line is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class ProgressBar:
    """ProgressBar of one loop: a bar where stderr is a terminal, else a log line now and then.

    Args:
        total: Steps of the loop.
        title: What stands in front: "epoch 3/310", "eval".
        enabled: False makes every method do nothing, for the ranks that do not report.
        log_every: Steps between two lines; the last step always has one.
        done: Steps that were made before, where a run resumes inside the loop.
        delay: Seconds before anything is shown: a loop that is over by then needs no words.
    """

    def __init__(
        self, total: int, title: str, enabled: bool = True, log_every: int = 50, done: int = 0, delay: float = 0
    ):
        self._total, self._title, self._log_every = total, title, log_every
        self._enabled = enabled
        self._first = self._done = done
        self._start = time.perf_counter()
        self._delay = delay
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, desc=title, initial=done, file=sys.stderr, dynamic_ncols=True, leave=False, delay=delay
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
            seconds_a_step = (time.perf_counter() - self._start) / max(self._done - self._first, 1)
            eta = human_duration(seconds_a_step * (self._total - self._done))
            values = "".join(f"  {name} {text}" for name, text in texts.items())
            logger.info("%s  step %d/%d%s  ETA %s", self._title, self._done, self._total, values, eta)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def text_table(headers: Sequence[str], rows: Sequence[Sequence], align: str = "", width: int = 100) -> str:
    """Return a table for a terminal; one that would be wider than ``width`` becomes one block of lines a row.

    Args:
        headers: Column titles.
        rows: Cells: text, numbers (floats with up to six digits) or None, shown as "-".
        align: One letter a column: "l" left, "r" right, "." decimal points under each other. By default columns of
            numbers are "." and the others "l".
        width: Most characters of a line.
    """
    assert all(len(row) == len(headers) for row in rows), "a row has as many cells as there are headers"
    assert not align or len(align) == len(headers), f"align {align!r} has one letter for each of {headers}"
    texts = [["-" if c is None else f"{c:g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    columns = [[row[i] for row in texts] for i in range(len(headers))]
    align = align or "".join("." if all(map(_NUMBER.fullmatch, column)) else "l" for column in columns)
    padded = [_pad([title], cells, how) for title, cells, how in zip(headers, columns, align, strict=True)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    if max(map(len, lines)) <= width:
        return "\n".join(lines)
    name_width = max(map(len, headers))
    blocks = ["\n".join(f"{h:{name_width}}  {c}" for h, c in zip(headers, row, strict=True)) for row in texts]
    return "\n\n".join(blocks)


def _pad(title: list[str], cells: list[str], how: str) -> list[str]:
    """Return title, rule and cells of one column, all of one width."""
    if how == ".":
        # What stands behind the whole part: ".25" of "4.25", "%" of "98%", nothing of "nan" and "-".
        tails = [len(c) - len(re.match(r"[+-]?[\d,]*", c).group()) if c.strip("-naif+") else 0 for c in cells]
        cells = [cell + " " * (max(tails) - tail) for cell, tail in zip(cells, tails, strict=True)]
    width = max(map(len, title + cells))
    side = "<" if how == "l" else ">"
    return [f"{text:{side}{width}}" for text in [*title, "-" * width, *cells]]


def human_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 42s, 3m 20s, 2h 05m, 3d 04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    if hours:
        return f"{hours}h {m:02}m"
    return f"{m}m {s:02}s" if minutes else f"{s}s"


def _short(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
