"""Numbers in files: metrics.csv with its TensorBoard twin, results.json and results.csv.

A file is rewritten through a temporary file, which is renamed at the end, so a stop at any moment leaves the old or
the new file, never half of one.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from volo.runtime.files import write_atomic
from volo.runtime.text import printable

logger = logging.getLogger("volo")

_KEYS = ("step", "epoch")
# Every column of metrics.csv; cells stay empty if a run has no such value. Units: volo/reporting/__init__.py.
COLUMNS = (
    *_KEYS,
    *("train/loss", "train/loss_cls", "train/loss_dense", "train/grad_norm"),
    *("train/images_per_s", "train/data_wait", "train/lr"),
    *("val/top1", "val/top5", "val/loss", "val_ema/top1", "val_ema/top5", "val_ema/loss"),
)


class MetricsWriter:
    """Writes the same scalars to ``metrics.csv`` and to TensorBoard events in the run folder.

    A run folder that already has a metrics.csv is continued after ``last_step``: later rows are dropped, in TensorBoard
    too. The file is rewritten once, with every one of COLUMNS; columns that only an earlier version knew stay.

    Args:
        run_dir: The run folder; made if it does not exist.
        last_step: The step that the run resumes from; -1 for a fresh start.
        redone: Name of a value that is about to be measured again at ``last_step``; rows of that step that hold it
            are dropped as well.
        enabled: False makes every method do nothing, for the ranks that do not report.

    Raises:
        ValueError: The folder's metrics.csv was written by something else, or a line in it is damaged.
    """

    def __init__(self, run_dir: str | Path, last_step: int = -1, redone: str | None = None, enabled: bool = True):
        self.path = Path(run_dir) / "metrics.csv"
        self._first_step = last_step + 1
        self._enabled = enabled
        self._columns = list(COLUMNS)
        self._unwritten: list[str] = []
        if not enabled:
            return
        rows = []
        if self.path.exists():
            columns, rows, torn = _parse(self.path)
            self._columns += [name for name in columns if name not in COLUMNS]
            if torn:
                logger.warning("%s: dropped its unfinished last line: %r", self.path, torn)
        kept = [r for r in rows if (step := int(r["step"])) < last_step or (step == last_step and redone not in r)]
        if len(kept) < len(rows):
            logger.info("%s: dropped %d rows after step %d", self.path.name, len(rows) - len(kept), last_step)
        text = _csv_lines(self._columns, kept, header=True).encode()
        write_atomic(self.path, text)
        self._end = len(text)  # of the rows that are written whole

    def scalars(self, step: int, epoch: float, **values: float) -> None:
        """Write ``values``, named as in COLUMNS (``**{"train/loss": 6.9}``), as of ``step`` and ``epoch``.

        Numbers keep their full precision in the CSV file and become float32 in TensorBoard. What cannot be written (a
        full disk) is reported, and written to the CSV file as soon as that works again.
        """
        if not self._enabled:
            return
        row = {"step": str(int(step)), "epoch": repr(float(epoch))}
        row |= {name: repr(float(value)) for name, value in values.items()}
        self._unwritten.append(_csv_lines(self._columns, [row]))
        self._write_rows()
        try:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), int(step))
            self._board.flush()
        except OSError as error:
            self._give_up_board(step, error)

    def _write_rows(self) -> None:
        """Write the rows that are not written yet, in one piece: a kill tears at most the last line, which shows."""
        try:
            if not self.path.exists():  # somebody deleted it
                header = _csv_lines(self._columns, [], header=True).encode()
                write_atomic(self.path, header)
                self._end = len(header)
            with open(self.path, "r+b") as file:
                file.truncate(self._end)  # behind it may be a part of a row, from when the disk was full
                file.seek(self._end)
                file.write("".join(self._unwritten).encode())
                file.flush()
                self._end = file.tell()
            self._unwritten.clear()
        except OSError as error:
            logger.warning("%s: %d rows could not be written so far (%s)", self.path, len(self._unwritten), error)

    def _give_up_board(self, step: int, error: OSError) -> None:
        """Close the file of TensorBoard events, whose thread has ended; the next value starts another."""
        logger.warning("TensorBoard events of step %d could not be written (%s); %s has them", step, error, self.path)
        del self.__dict__["_board"]
        self._first_step = step + 1

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write a picture to ``name``.png in the run folder and to TensorBoard."""
        if not self._enabled:
            return
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        try:
            write_atomic(self.path.parent / f"{name}.png", png)
            self._board.add_image(name, pixels, step, dataformats="HWC")
        except OSError as error:
            logger.warning("picture %s.png could not be written: %s", name, error)

    def close(self) -> None:
        """Write what could not be written so far, and close the files."""
        if self._unwritten:
            self._write_rows()
        if "_board" in self.__dict__:
            try:
                self._board.close()
            except OSError as error:
                logger.warning("TensorBoard events could not be written to their end: %s", error)

    @cached_property
    def _board(self):
        from torch.utils.tensorboard import SummaryWriter

        # Because of purge_step, readers hide what earlier event files hold from that step on.
        return SummaryWriter(str(self.path.parent), purge_step=self._first_step)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.csv: ``step`` an int, the rest floats; a row has only what was written in it.

    An unfinished last line, which a run that is being written or was killed may have, is left out.

    Raises:
        ValueError: The file is not a metrics.csv, or a line in it is damaged.
    """
    _, rows, _ = _parse(Path(path))
    return [{name: int(text) if name == "step" else float(text) for name, text in row.items()} for row in rows]


def write_results(path_json: str | Path, path_csv: str | Path, rows: list[dict]) -> None:
    """Write one record per row as JSON (a list of objects) and as CSV (columns in order of first appearance).

    JSON has no NaN or infinity, so they become null there; the CSV file keeps them. Lists and dictionaries become
    JSON in the CSV file, and its texts have their control characters escaped; JSON escapes them itself.
    """
    write_atomic(Path(path_json), json.dumps(_without_non_finite(rows), indent=2, allow_nan=False) + "\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: _cell(value) for name, value in row.items()} for row in rows]
    write_atomic(Path(path_csv), _csv_lines(columns, flat, header=True))


def _cell(value):
    if isinstance(value, list | dict):
        return json.dumps(value)
    return printable(value) if isinstance(value, str) else value


def _parse(path: Path) -> tuple[list[str], list[dict[str, str]], str]:
    """Return columns, rows (empty cells left out) and the text of an unfinished last line."""
    text = path.read_text(encoding="utf-8")
    end = text.rfind("\n") + 1
    reader = csv.reader(io.StringIO(text[:end]))
    columns = next(reader, [])
    if columns and tuple(columns[: len(_KEYS)]) != _KEYS:
        raise ValueError(f"{path} is not a metrics.csv: its columns start {columns[:3]}, not step, epoch")
    rows = []
    for cells in reader:
        row = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
        if len(cells) != len(columns) or not row.keys() >= set(_KEYS) or not all(map(_is_number, row.values())):
            raise ValueError(f"{path}, line {reader.line_num} is damaged: {cells}; repair or remove that line")
        rows.append(row)
    return columns, rows, text[end:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_lines(columns: list[str], rows: Iterable[dict], header: bool = False) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _without_non_finite(value):
    if isinstance(value, dict):
        return {name: _without_non_finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
