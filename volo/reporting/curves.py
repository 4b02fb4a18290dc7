"""curves.png: a run at a glance, drawn from its metrics.csv."""

import io
from pathlib import Path

import numpy as np

from volo.reporting.metrics import read_metrics
from volo.runtime.files import write_atomic

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6fb4", "#e07b1a", "#2b9a66", "#8a8f98"
# A series with more points than this is drawn as its moving average over a faint line of all points.
_SMOOTH_ABOVE = 200


def plot_curves(metrics_csv: str | Path, png: str | Path, title: str) -> None:
    """Draw loss, accuracy, learning rate and throughput over the epochs of ``metrics_csv`` into ``png``.

    Series that were not written are left out, and gaps and non-finite values are gaps in the lines.
    """
    # Figure instead of pyplot: it needs no window system, and nothing is kept after the return.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_csv)
    figure = Figure(figsize=(12, 7.6), dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    (loss, accuracy), (schedule, speed) = figure.subplots(2, 2, sharex=True)
    # Room for the labels, once: finding it out (layout="constrained") draws everything twice more.
    figure.subplots_adjust(left=0.08, right=0.93, top=0.9, bottom=0.07, wspace=0.28, hspace=0.15)
    _draw_loss(loss, rows)
    _draw_accuracy(accuracy, rows)
    _draw_schedule(schedule, rows)
    _draw_speed(speed, rows)
    loss.set_xlim(0, 1.02 * max((row["epoch"] for row in rows), default=0) or 1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(Path(png), picture.getvalue())


def _draw_loss(axes, rows: list[dict]) -> None:
    _line(axes, rows, "train/loss", "train", _BLUE)
    _line(axes, rows, "train/loss_cls", "train, class token", _BLUE, linestyle="--", linewidth=1)
    _line(axes, rows, "train/loss_dense", "train, tokens", _BLUE, linestyle=":", linewidth=1.2)
    _line(axes, rows, "val/loss", "validation", _ORANGE)
    _line(axes, rows, "val_ema/loss", "validation, EMA", _GREEN)
    _finish(axes, "Loss", "cross entropy (nats)")


def _draw_accuracy(axes, rows: list[dict]) -> None:
    best = []
    for prefix, label, colour in (("val", "raw weights", _ORANGE), ("val_ema", "EMA weights", _GREEN)):
        epochs, values = _line(axes, rows, f"{prefix}/top1", f"top-1, {label}", colour)
        _line(axes, rows, f"{prefix}/top5", f"top-5, {label}", colour, linestyle="--", linewidth=1)
        if np.isfinite(values).any():
            i = int(np.nanargmax(values))
            best.append((values[i], epochs[i], label))
    _finish(axes, "Accuracy", "validation accuracy (%)")
    if best:
        top1, epoch, label = max(best)
        axes.plot(epoch, top1, marker="*", markersize=13, color="black", zorder=5)
        axes.set_title(f"\N{BLACK STAR} best top-1 {top1:.2f} % ({label}, epoch {epoch:g})", loc="right", fontsize=9.5)


def _draw_schedule(axes, rows: list[dict]) -> None:
    _line(axes, rows, "train/lr", "learning rate", _BLUE)
    norm = _right_axis(axes, rows, "train/grad_norm", "gradient norm", _GREY)
    _finish(axes, "Learning rate and gradient norm", "learning rate", "epoch", norm)
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_speed(axes, rows: list[dict]) -> None:
    _, speeds = _line(axes, rows, "train/images_per_s", "images/s", _BLUE)
    shares = [{**row, "wait": 100 * row["train/data_wait"]} for row in rows if "train/data_wait" in row]
    wait = _right_axis(axes, shares, "wait", "waiting for data (% of the time)", _ORANGE)
    _finish(axes, "Throughput and waiting for data", "images/s", "epoch", wait)
    if axes.lines:
        axes.set_ylim(0, 1.15 * np.nanmax(speeds) or None)
    if wait is not None:
        wait.set_ylim(0, 100)


def _line(axes, rows: list[dict], name: str, label: str, colour: str, **style) -> tuple[np.ndarray, np.ndarray]:
    """Draw one metric over the epoch, if it has a finite value, and return both."""
    points = np.array([(row["epoch"], row[name]) for row in rows if name in row]).reshape(-1, 2)
    epochs, values = points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], np.nan)
    if np.isfinite(values).any():
        drawn = values
        if len(values) > _SMOOTH_ABOVE:
            axes.plot(epochs, values, color=colour, alpha=0.15, linewidth=0.7)
            drawn = _moving_average(values, len(values) // 100 + 1)
        marker = "o" if len(values) <= 30 else ""
        axes.plot(epochs, drawn, color=colour, label=label, marker=marker, markersize=3.5, **style)
    return epochs, values


def _right_axis(axes, rows: list[dict], name: str, label: str, colour: str):
    """Draw a metric behind the others against its own axis on the right; return it, or None without the metric."""
    right = axes.twinx()
    _line(right, rows, name, label, colour, linewidth=1)
    if not right.lines:
        right.remove()
        return None
    right.set_ylabel(label, color=colour)
    right.tick_params(axis="y", colors=colour)
    right.spines["top"].set_visible(False)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    return right


def _finish(axes, title: str, ylabel: str, xlabel: str = "", right=None) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if right is not None:
        # One curve per axis: the colours of the axes say which is which, and a legend would cover the curves.
        axes.yaxis.label.set_color(_BLUE)
        axes.tick_params(axis="y", colors=_BLUE)
    elif len(axes.lines) > 1:
        axes.legend(fontsize=8.5, framealpha=0.85)
    elif not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color=_GREY)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean over up to ``width`` values around each, without those that are NaN."""
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), np.ones(width), mode="same")
    counts = np.convolve(known.astype(float), np.ones(width), mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)
