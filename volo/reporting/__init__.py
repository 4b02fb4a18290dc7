"""What a run reports: log lines, progress, tables, TensorBoard, metrics.csv and pictures.

Names of metrics, which are the columns of metrics.csv after ``step`` and ``epoch``: ``train/loss``, ``train/loss_cls``,
``train/loss_dense``, ``train/grad_norm``, ``train/images_per_s``, ``train/data_wait`` (fraction of the time, 0 to 1),
``train/lr``, and for both ``val`` (raw weights) and ``val_ema`` (averaged weights) ``top1`` and ``top5`` in percent and
``loss``.

TensorBoard and matplotlib are imported on first use: that takes seconds, and many processes need neither.
"""

from volo.reporting.curves import plot_curves
from volo.reporting.log import LINES, ProgressBar, setup_logging
from volo.reporting.metrics import MetricsWriter, read_metrics, write_results
from volo.reporting.tables import text_table

__all__ = [
    "LINES",
    "MetricsWriter",
    "ProgressBar",
    "plot_curves",
    "read_metrics",
    "setup_logging",
    "text_table",
    "write_results",
]
