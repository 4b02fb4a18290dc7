"""Reporting in files: numbers survive the trip through metrics.csv, TensorBoard and results, and curves are drawn."""

import contextlib
import csv
import json
import math
import resource
import signal

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from volo.reporting import MetricsWriter, plot_curves, read_metrics, write_results
from volo.reporting.metrics import COLUMNS

AWKWARD = [0.1, 1 / 3, 1e-300, 6.907755374908447, -0.0, 1.6e-3, float(np.float32(0.1)), 12345678.875]


def board_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.fixture(autouse=True)
def names_of_event_files_sort_by_age(monkeypatch):
    """Readers go by name, and within one second and process the name ends in a counter: 10 would come before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


# metrics.csv and TensorBoard


def test_metrics_round_trip_exactly(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, value in enumerate(AWKWARD):
        writer.scalars(step, step / 7, **{"train/loss": value, "train/lr": value / 3})
    writer.scalars(99, 9.5, **{"train/loss": math.nan, "train/grad_norm": math.inf})
    writer.close()
    *rows, last = read_metrics(tmp_path / "metrics.csv")
    assert [row["train/loss"] for row in rows] == AWKWARD
    assert [row["train/lr"] for row in rows] == [value / 3 for value in AWKWARD]
    assert [(row["step"], row["epoch"]) for row in rows] == [(i, i / 7) for i in range(len(AWKWARD))]
    assert math.copysign(1, rows[4]["train/loss"]) == -1
    assert all(isinstance(row["step"], int) for row in rows)
    assert math.isnan(last["train/loss"]) and last["train/grad_norm"] == math.inf


def test_every_column_is_there_from_the_start(tmp_path):
    """An independent reader sees one header and rows of one length, and the header never changes."""
    writer = MetricsWriter(tmp_path)
    header = (tmp_path / "metrics.csv").read_text()
    writer.scalars(1, 0.5, **{"train/loss": 1.0})
    writer.scalars(2, 1.0, **{"val/top1": 50.0, "val/top5": 80.0})
    with pytest.raises(ValueError, match="train/accuracy"):
        writer.scalars(3, 1.5, **{"train/accuracy": 0.5})
    writer.close()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "epoch": 0.5, "train/loss": 1.0},
        {"step": 2, "epoch": 1.0, "val/top1": 50.0, "val/top5": 80.0},
    ]
    assert (tmp_path / "metrics.csv").read_text().startswith(header)
    with open(tmp_path / "metrics.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert {len(line) for line in lines} == {len(COLUMNS)} and lines[0] == list(COLUMNS)


def test_a_run_folder_of_an_earlier_version_is_resumed(tmp_path):
    """Its metrics.csv had the columns it had used by then, and perhaps one that is unknown today."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/lr,train/speed,train/loss\n1,0.5,0.125,7.0,6.5\n2,1.0,,,6.25\n")
    (tmp_path / "old").hardlink_to(path)
    old = path.read_text()
    writer = MetricsWriter(tmp_path, last_step=2)
    writer.scalars(2, 1.0, **{"val/top1": 50.0})
    writer.close()
    assert read_metrics(path) == [
        {"step": 1, "epoch": 0.5, "train/lr": 0.125, "train/speed": 7.0, "train/loss": 6.5},
        {"step": 2, "epoch": 1.0, "train/loss": 6.25},
        {"step": 2, "epoch": 1.0, "val/top1": 50.0},
    ]
    assert (tmp_path / "old").read_text() == old, "the file was replaced at once, not written over"
    assert sorted(p.name for p in tmp_path.iterdir() if "tfevents" not in p.name) == ["metrics.csv", "old"]


def test_tensorboard_equals_the_csv_file(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.scalars(step, step / 5, **{"train/loss": 1 / step, "train/lr": 1e-6 * step})
    writer.scalars(5, 1.0, **{"val/top1": 81.25})
    writer.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    board = board_scalars(tmp_path)
    assert set(board) == {"train/loss", "train/lr", "val/top1"}
    for tag, points in board.items():
        assert points == [(row["step"], float(np.float32(row[tag]))) for row in rows if tag in row]


@pytest.mark.parametrize("checkpoint", [-1, 0, 1, 3, 5, 9])
@pytest.mark.parametrize("redone", [None, "val/top1"])
def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path, checkpoint, redone):
    first = MetricsWriter(tmp_path)
    for step in range(6):
        first.scalars(step, step / 6, **{"train/loss": float(step)})
    first.scalars(3, 0.5, **{"val/top1": 33.0})
    first.close()
    resumed = MetricsWriter(tmp_path, checkpoint, redone)
    for step in range(checkpoint + 1, checkpoint + 3):
        resumed.scalars(step, step / 6, **{"train/loss": 100.0 + step})
    resumed.close()
    kept = [s for s in range(6) if s <= checkpoint]
    expected = [(s, float(s)) for s in kept] + [(s, 100.0 + s) for s in (checkpoint + 1, checkpoint + 2)]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == expected
    evaluated = checkpoint > 3 or (checkpoint == 3 and redone is None)
    assert [row["val/top1"] for row in rows if "val/top1" in row] == [33.0] * evaluated
    board = board_scalars(tmp_path)
    assert board["train/loss"] == expected
    assert board["val/top1"] == ([(3, 33.0)] if checkpoint >= 3 else [])


def test_a_line_torn_by_a_kill_is_dropped_and_reported(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.scalars(step, 0.25, **{"train/loss": 6.5, "train/lr": 0.125})
    writer.close()
    path = tmp_path / "metrics.csv"
    text = path.read_text()
    path.write_text(text[: text.rindex("25,")])  # "0.125" is now "0.1": a number, but not the one that was meant
    assert [row["step"] for row in read_metrics(path)] == [1]
    writer = MetricsWriter(tmp_path, last_step=2)
    assert "2,0.25,6.5,,,,,,0.1" in caplog.text
    writer.scalars(2, 0.25, **{"train/loss": 6.5, "train/lr": 0.125})
    writer.close()
    assert [row["train/lr"] for row in read_metrics(path)] == [0.125, 0.125]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,top1\na,1\n", "not a metrics.csv"),
        ("step,epoch,train/loss\n1,0.5,6.9\n2,0.5\n", "line 3 is damaged"),
        ("step,epoch,train/loss\n1,0.5,6.9x\n", "line 2 is damaged"),
        ("step,epoch,train/loss\n,0.5,6.9\n", "line 2 is damaged"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_and_left_alone(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)
    assert path.read_text() == text


def test_a_disabled_writer_touches_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False)
    writer.scalars(1, 0.5, **{"train/loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


# results


def test_results_round_trip(tmp_path):
    rows = [
        {"dataset": "imagenet", "top1": 84.148, "images": 50_000, "published": [{"source": "paper", "top1": 84.2}]},
        {"dataset": "re,al", "top1": 1 / 3, "loss": math.nan},
    ]
    write_results(tmp_path / "out" / "results.json", tmp_path / "out" / "results.csv", rows)
    stored = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert stored == [rows[0], {**rows[1], "loss": None}]
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["dataset", "top1", "images", "published", "loss"]
    assert (table[1]["dataset"], float(table[1]["top1"]), table[1]["loss"]) == ("re,al", 1 / 3, "nan")
    assert json.loads(table[0]["published"]) == rows[0]["published"]


def test_a_failed_write_keeps_the_old_results(tmp_path):
    paths = tmp_path / "results.json", tmp_path / "results.csv"
    write_results(*paths, [{"top1": 1.0}])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(TypeError):
        write_results(*paths, [{"top1": object()}])
    assert [path.read_bytes() for path in paths] == before
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError):
        write_results(tmp_path / "folder.json", paths[1], [{"top1": 2.0}])
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "results.csv", "results.json"]


@contextlib.contextmanager
def full_disk(size: int):
    """Let writes beyond ``size`` bytes of a file fail."""
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_signal)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writing thread
def test_rows_that_a_full_disk_refused_follow_later(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.scalars(0, 0.0, **{"train/loss": 0.5})
    with full_disk((tmp_path / "metrics.csv").stat().st_size + 3):  # room for a part of a row
        for step in (1, 2):
            writer.scalars(step, step / 7, **{"train/loss": 1 / step})
    assert "metrics.csv: 2 rows could not be written so far" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1
    writer.scalars(3, 1.0, **{"train/loss": 0.25})
    writer.close()
    losses = [0.5, 1.0, 0.5, 0.25]
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == losses
    assert (3, 0.25) in board_scalars(tmp_path)["train/loss"]


def test_a_full_disk_keeps_the_old_file_whole(tmp_path):
    paths = tmp_path / "results.json", tmp_path / "results.csv"
    write_results(*paths, [{"top1": 1.0}])
    before = [path.read_bytes() for path in paths]
    with full_disk(4096), pytest.raises(OSError):
        write_results(*paths, [{"top1": float(i)} for i in range(1000)])
    assert [path.read_bytes() for path in paths] == before
    assert len(list(tmp_path.iterdir())) == 2


# curves.png


def drawn(tmp_path, rows) -> Image.Image:
    writer = MetricsWriter(tmp_path)
    for row in rows:
        writer.scalars(**row)
    writer.close()
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "volo_tiny 32")
    assert sorted(path.suffix for path in tmp_path.iterdir() if "tfevents" not in path.name) == [".csv", ".png"]
    image = Image.open(tmp_path / "curves.png").convert("RGB")
    assert image.width >= 1000 and image.height >= 600
    return image


def colours(image: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    """Colours of a box given in hundredths of width and height."""
    scale = [image.width / 100, image.height / 100] * 2
    crop = image.crop(tuple(int(edge * s) for edge, s in zip(box, scale, strict=True)))
    return {colour for _, colour in crop.getcolors(crop.width * crop.height)}


def test_curves_of_one_epoch_with_gaps(tmp_path):
    image = drawn(
        tmp_path,
        [
            {"step": 1, "epoch": 0.5, "train/loss": 7.0, "train/lr": 1e-3, "train/images_per_s": 800.0},
            {"step": 2, "epoch": 1.0, "train/loss": math.nan, "train/lr": 1e-3, "train/images_per_s": math.inf},
            {"step": 2, "epoch": 1.0, "val/top1": 60.0, "val/top5": 90.0, "val/loss": 2.0},
            {"step": 2, "epoch": 1.0, "val_ema/top1": math.nan, "val_ema/loss": math.inf},
        ],
    )
    blue, orange, green = (0x1F, 0x6F, 0xB4), (0xE0, 0x7B, 0x1A), (0x2B, 0x9A, 0x66)
    loss, accuracy = colours(image, (0, 0, 50, 50)), colours(image, (50, 0, 100, 50))
    assert {blue, orange} <= loss and green not in loss
    assert orange in accuracy and green not in accuracy


def test_curves_of_a_long_run_are_smoothed(tmp_path):
    noise = np.random.default_rng(0).normal(size=(401, 2))
    path = tmp_path / "metrics.csv"
    lines = [f"{i},{i / 40!r},{6 + a!r},{abs(b) / 10!r}\n" for i, (a, b) in enumerate(noise.tolist())]
    path.write_text("step,epoch,train/loss,train/data_wait\n" + "".join(lines))
    plot_curves(path, tmp_path / "curves.png", "long")
    image = Image.open(tmp_path / "curves.png").convert("RGB")
    assert {(0x1F, 0x6F, 0xB4), (255, 255, 255)} <= colours(image, (0, 0, 50, 50))
    assert (0xE0, 0x7B, 0x1A) in colours(image, (50, 50, 100, 100))


@pytest.mark.parametrize("rows", [[], [{"step": 0, "epoch": 0.0, "val/top1": 0.0}]], ids=["nothing", "epoch 0"])
def test_curves_of_almost_nothing(tmp_path, rows):
    if not rows:
        (tmp_path / "metrics.csv").write_text("step,epoch\n")
    drawn(tmp_path, rows)


def test_names_in_results(tmp_path):
    """JSON gives them back as they are, in plain ASCII; a CSV file goes to terminals and spreadsheets line by line."""
    name = "a\x1b[2J\nb\udce9ü"
    write_results(tmp_path / "r.json", tmp_path / "r.csv", [{"dataset": name, "skipped_files": [name]}])
    assert json.loads((tmp_path / "r.json").read_text("ascii")) == [{"dataset": name, "skipped_files": [name]}]
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text("utf-8").splitlines())
    assert row["dataset"] == r"a\x1b[2J\nb\udce9ü" and json.loads(row["skipped_files"]) == [name]
