"""Every format in train.py and validate.py: a stopped and resumed run equals the run on the folder, bit for bit."""

import csv
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import formats
import programs
import pytest
import torch
from programs import CLASSES, STOPPED, TRAIN, USAGE, VALIDATE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("formats")]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return programs.make_images(tmp_path_factory.mktemp("images"), train=16)


@pytest.fixture(scope="module")
def archives(images, tmp_path_factory) -> Iterator[dict[str, dict]]:
    """Data options of the same images in other formats."""
    root = tmp_path_factory.mktemp("archives")
    for split in ("train", "val"):
        files = formats.files_of(images / split)
        formats.write_shards(f"{root}/shards/{split}/%02d.tar", files, list(CLASSES))
        formats.write_tar_of_tars(root / f"{split}.tar", files, root)
        formats.write_parquet(root / "parquet", split, files, list(CLASSES), official=False)
    official = write_official(root / "official", images, root)
    flat = write_flat(root / "flat", images)
    tars = {"root": str(root), "train_split": "train.tar", "val_split": "val.tar"}
    with formats.serving(root / "shards") as url:
        parts = {split: len(list((root / "shards" / split).iterdir())) - 1 for split in ("train", "val")}
        split_names = {f"{split}_split": f"{split}/{{00..{last:02d}}}.tar" for split, last in parts.items()}
        yield {
            "shards": {"root": str(root / "shards"), "workers": 1},
            "tars": {**tars, "cache": str(root / "cache")},
            "parquet": {"root": str(root / "parquet"), "workers": 1},
            "url": {"root": url, "workers": 1, **split_names},
            "official": {"root": str(official), "workers": 2, "cache": str(root / "cache")},
            "flat": {
                "root": str(flat),
                "train_labels": str(flat / "train.csv"),
                "val_labels": str(flat / "val.txt"),
            },
        }


def write_official(folder: Path, images: Path, scratch: Path) -> Path:
    """The files of ILSVRC2012: training images in a tar of tars, validation images without folders, development kit."""
    train, val = formats.files_of(images / "train"), formats.files_of(images / "val")
    formats.write_tar_of_tars(folder / "ILSVRC2012_img_train.tar", train, scratch)
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(val))]
    formats.write_tar(folder / "ILSVRC2012_img_val.tar", dict(zip(names, val.values(), strict=True)))
    formats.write_devkit(folder / formats.DEVKIT, list(CLASSES), [name.split("/")[0] for name in val])
    return folder


def write_flat(folder: Path, images: Path) -> Path:
    """All images of a split in one folder, with a file of class names (train) or class indices (val)."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for name, content in formats.files_of(images / split).items():
            (folder / split / name.split("/")[1]).write_bytes(content)
    names = [name.split("/") for name in formats.files_of(images / "train")]
    (folder / "train.csv").write_text("image,label\n" + "".join(f"{file},{one}\n" for one, file in reversed(names)))
    names = [name.split("/") for name in formats.files_of(images / "val")]
    (folder / "val.txt").write_text("".join(f"{file} {CLASSES.index(one)}\n" for one, file in names))
    return folder


def recipe(folder: Path, images: Path, **data) -> Path:
    return programs.write_recipe(
        folder / "recipe.yaml",
        images,
        model={"drop_path_rate": 0.3},
        data=data,
        schedule={"epochs": 2},
        train={"device_batch_size": 6, "output": str(folder / "runs")},
    )


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory) -> dict[int, Path]:
    """Uninterrupted runs on the folder, with one and with two processes."""
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("straight")
        for ended in programs.start(TRAIN, "--config", recipe(folder, images), cwd=folder, ranks=ranks).finish():
            ended.assert_done()
        runs[ranks] = folder / "runs/run"
    return runs


def outcome(run: Path) -> tuple[dict, list[dict]]:
    """Weights, and every number of every step except the times."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [{**row, "train/images_per_s": None, "train/data_wait": None} for row in csv.DictReader(file)]
    return torch.load(run / "last.pt", weights_only=True)["state_dict"], rows


@pytest.mark.parametrize(
    ("name", "ranks"), [("shards", 1), ("tars", 2), ("parquet", 1), ("url", 2), ("official", 2), ("flat", 2)]
)
def test_a_stopped_run_on_any_format_equals_the_run_on_the_folder(images, archives, straight, tmp_path, name, ranks):
    words = ("--config", recipe(tmp_path, images, **archives[name]))
    run = programs.start(TRAIN, *words, cwd=tmp_path, ranks=ranks)
    run.follow("epoch 1/2  step 2/4  ")
    for pid in run.pids:
        os.kill(pid, signal.SIGTERM)
    assert [ended.code for ended in run.finish()] == [STOPPED] * ranks
    for ended in programs.start(TRAIN, *words, cwd=tmp_path, ranks=ranks).finish():
        ended.assert_done()
    assert "resuming from" in (tmp_path / "runs/run/log.txt").read_text()
    (weights, rows), (expected, expected_rows) = outcome(tmp_path / "runs/run"), outcome(straight[ranks])
    assert rows == expected_rows and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_evaluation_on_any_format_equals_that_on_the_folder(images, archives, straight, tmp_path):
    results = []
    for data, ranks in (({}, 1), *((data, 2) for data in archives.values())):
        words = ("--config", recipe(tmp_path, images, **data), "--checkpoint", straight[1] / "best.pt")
        for ended in programs.start(VALIDATE, *words, "--output", "out", cwd=tmp_path, ranks=ranks).finish():
            ended.assert_done()
        with open(tmp_path / "out/results.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        results.append([row[name] for name in ("images", "top1_correct", "top5_correct", "loss")])
    counts = [row[:3] for row in results]
    assert counts[0][0] == "12" and counts == counts[:1] * 7
    losses = [float(row[3]) for row in results]
    assert losses == pytest.approx(losses[:1] * 7, rel=1e-6)


def test_a_damaged_archive_is_found_before_the_first_step(images, archives, tmp_path):
    whole = Path(archives["tars"]["root"], "train.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    data = {**archives["tars"], "train_split": str(tmp_path / "cut.tar")}
    ended = programs.run(TRAIN, "--config", recipe(tmp_path, images, **data), cwd=tmp_path)
    ended.assert_failed(USAGE, "cut.tar")
