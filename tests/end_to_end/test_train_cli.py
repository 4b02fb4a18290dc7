"""train.py as a user runs it: in one process, under torchrun, and on two machines.

One process with two passes per step, two processes, and two machines of one process each: all three write the
same numbers.
"""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import LAUNCHER, TRAIN, USAGE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from volo.cli import build_parser, parse

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]

TRAIN_COLUMNS = {"loss", "loss_cls", "loss_dense", "grad_norm", "images_per_s", "data_wait", "lr"}
VAL_COLUMNS = {"top1", "top5", "loss"}
COLUMNS = {
    *("step", "epoch"),
    *(f"train/{name}" for name in TRAIN_COLUMNS),
    *(f"{weights}/{name}" for weights in ("val", "val_ema") for name in VAL_COLUMNS),
}
STEPS = 3  # per epoch: 36 images, 12 per step


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return programs.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def recipe(images, tmp_path_factory) -> Path:
    return programs.write_recipe(
        tmp_path_factory.mktemp("recipe") / "recipe.yaml",
        images,
        data={"workers": 1},
        ema={"enabled": True, "decay": 0.8},
        train={"device_batch_size": 6, "output": "runs"},
    )


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    ended = programs.finish(programs.launch(sys.executable, TRAIN, "--config", recipe, cwd=folder))
    return folder / "runs/run", ended.assert_done()


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    ended = programs.finish(programs.launch(*programs.torchrun(2, TRAIN, "--config", recipe), cwd=folder))
    return folder / "runs/run", ended.assert_done()


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", ["plain", "two"])
def test_run_folder_holds_every_file(how, request):
    run, ended = request.getfixturevalue(how)
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names >= {"config.yaml", "log.txt", "metrics.csv", "last.pt", "best.pt", "curves.png", "batch.png"}
    assert len([name for name in names if name.startswith("events.out.tfevents")]) == 1
    assert sorted(name for name in names if name.startswith("step-")) == ["step-00000003.pt", "step-00000006.pt"]
    assert len(names) == 10, "no other file, no temporary file"
    assert ended.err == ""


@pytest.mark.parametrize("how", ["plain", "two"])
def test_metrics_csv_has_every_column_and_tensorboard_the_same_numbers(how, request):
    run, _ = request.getfixturevalue(how)
    rows = rows_of(run)
    assert set(rows[0]) == COLUMNS
    written = {(row["step"], name) for row in rows for name, cell in row.items() if cell}
    for step in range(1, 2 * STEPS + 1):
        assert written >= {(str(step), f"train/{name}") for name in TRAIN_COLUMNS}
    for step in (STEPS, 2 * STEPS):
        assert written >= {(str(step), f"{w}/{name}") for w in ("val", "val_ema") for name in VAL_COLUMNS}

    board = EventAccumulator(str(run)).Reload()
    assert set(board.Tags()["scalars"]) == COLUMNS - {"step", "epoch"}
    for name in board.Tags()["scalars"]:
        from_csv = [(int(row["step"]), np.float32(row[name])) for row in rows if row[name]]
        assert [(event.step, np.float32(event.value)) for event in board.Scalars(name)] == from_csv


def test_numbers_are_plausible(plain):
    rows = rows_of(plain[0])
    first = rows[0]
    assert float(first["train/loss_cls"]) == pytest.approx(math.log(3), rel=0.05)  # an untrained network
    for row in rows:
        if row["train/loss"]:
            terms = float(row["train/loss_cls"]) + 0.5 * float(row["train/loss_dense"])
            assert float(row["train/loss"]) == pytest.approx(terms, rel=1e-5)
            assert 0 <= float(row["train/data_wait"]) <= 1
            assert float(row["train/images_per_s"]) > 0
        else:
            correct = float(row["val/top1"]) / 100 * 12
            assert correct == pytest.approx(round(correct))
            assert float(row["val/top5"]) == 100  # of three classes
    # One cosine over two epochs, set per epoch: its peak, then its middle.
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert rates == pytest.approx([2e-3] * STEPS + [1e-5 + (2e-3 - 1e-5) / 2] * STEPS)


def test_two_processes_equal_one_process_in_two_passes(plain, two):
    for one, other in zip(rows_of(plain[0]), rows_of(two[0]), strict=True):
        assert one["step"] == other["step"]
        for name in ("train/loss", "train/loss_cls", "train/loss_dense", "train/grad_norm", "train/lr"):
            if one[name]:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=2e-4), (one["step"], name)
    weights = [torch.load(run / "last.pt", weights_only=True)["state_dict"] for run, _ in (plain, two)]
    for name, tensor in weights[0].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):  # rank 0's batches only
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=2e-4, msg=name)


def test_start_of_the_log_gives_effective_values(plain, two):
    head = plain[1].out
    assert "36 to train on, 12 to evaluate on" in head
    assert "12 images per step, 12 per process in 2 passes of 6\n" in head
    assert "2 epochs of 3 steps; learning rate up to 0.002, not scaled" in head
    assert "decay 0.8: averages over about 5 steps, 1.7 epochs" in head
    assert "12 images per step, 6 per process\n" in two[1].out
    assert head.count("EMA ") >= 1


def test_log_txt_is_what_was_printed(plain):
    run, ended = plain
    # Every record starts with time and level; its further lines are unchanged.
    logged = [line.split(" INFO ", 1)[-1] for line in (run / "log.txt").read_text().splitlines()]
    assert logged == ended.out.splitlines()


def test_config_yaml_gives_the_same_options(plain, recipe):
    parser = build_parser("train.py", "")
    given, _ = parse(parser, ["--config", str(recipe)])
    stored, _ = parse(parser, ["--config", str(plain[0] / "config.yaml")])
    assert stored == given


def test_checkpoint_is_plain_data_with_every_entry(plain):
    state = torch.load(plain[0] / "last.pt", weights_only=True)
    entries = {"state_dict", "state_dict_ema", "optimizer", "scaler", "progress", "rng", "config", "classes"}
    assert state.keys() >= entries
    assert state["classes"] == list(programs.CLASSES)
    assert state["progress"] == {**state["progress"], "epoch": 2, "step": 0, "global_step": 6, "closed_epochs": 2}
    assert state["config"]["optim"]["lr"] == 2e-3
    best = max(float(row["val_ema/top1"]) for row in rows_of(plain[0]) if row["val_ema/top1"])
    assert state["metric"] == state["progress"]["best_top1"] == best
    of_best = torch.load(plain[0] / "best.pt", weights_only=True)["progress"]
    assert of_best["epoch"] == of_best["best_epoch"] == state["progress"]["best_epoch"]


def test_curves_are_a_picture(plain):
    with Image.open(plain[0] / "curves.png") as picture:
        assert min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_two_machines_equal_two_processes(two, recipe, tmp_path):
    rendezvous = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(programs.free_port())}
    nodes = []
    for rank in range(2):
        words = (LAUNCHER, 1, "--config", recipe)
        nodes.append(programs.launch(*words, cwd=tmp_path, NODE_RANK=str(rank), PYTHON=sys.executable, **rendezvous))
    for node in nodes:
        programs.finish(node).assert_done()
    timing = ("train/images_per_s", "train/data_wait")
    runs = tmp_path / "runs/run", two[0]
    there, here = ([{**row, **dict.fromkeys(timing)} for row in rows_of(run)] for run in runs)
    assert there == here


# ------------------------------------------------------------------------------------------- wrong options


def test_wrong_options_end_at_once_with_code_2(recipe, tmp_path):
    for words, message in {
        ("--optim.lrr", "1"): "Did you mean optim.lr?",
        ("--train.batch_size", "many"): "train.batch_size",
        ("--eval.weights", "ema", "--ema.enabled", "false"): "ema.enabled",
    }.items():
        ended = subprocess.run(
            [sys.executable, str(TRAIN), "--config", str(recipe), *words],
            cwd=tmp_path,
            env=programs.environment(),
            capture_output=True,
            text=True,
        )
        programs.Finished(ended.returncode, ended.stdout, ended.stderr).assert_failed(USAGE, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.img_size", 33), "33"),
        (("--model.name", "volo_d6"), "volo_d5"),
        (("--model.layers", "[1,1]"), "layers"),
        (("--optim.name", "adamx"), "adamax"),
        (("--optim.implementation", "apex"), "Apex"),
        (("--optim.weight_decay", -1), "it is in [0, 1]"),
        (("--optim.lr", 1e-6), "schedule.min_lr"),
        (("--eval.crop_pct", 96), "0.96"),
        (("--augment.rand_augment", "rand-m99-q"), "rand_augment"),
        (("--model.checkpoint", "nowhere.pt"), "model.checkpoint: nowhere.pt does not exist"),
        (("--token_label.root", "nowhere"), "token_label.root: nowhere does not exist"),
        (("--token_label.size", 28), "follows from the network's grid"),
        (("--train.resume", "nowhere.pt"), "train.resume: nowhere.pt does not exist"),
        (("--train.precision", "apex_o1"), "apex.amp"),
    ],
)
def test_wrong_options_end_before_anything_is_written(recipe, tmp_path, words, message):
    programs.run(TRAIN, "--config", recipe, *words, cwd=tmp_path).assert_failed(USAGE, message)
    assert not list(tmp_path.glob("runs"))


# --------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_starts_from_the_weights_and_keeps_them_if_nothing_improves(images, plain, tmp_path):
    run, _ = plain
    # A learning rate that changes nothing: the initial weights stay the best.
    still = programs.write_recipe(
        tmp_path / "recipe.yaml",
        images,
        model={"checkpoint": str(run / "last.pt")},
        optim={"lr": 1e-12},
        schedule={"epochs": 1, "warmup_lr": 1e-12, "min_lr": 1e-12},
        eval={"before_training": True},
    )
    done = programs.run(TRAIN, "--config", still, cwd=tmp_path).assert_done()
    assert f"weights from {run / 'last.pt'} (state_dict" in done.out
    before, after = (row for row in rows_of(tmp_path / "runs/run") if row["val/top1"])
    last = [row for row in rows_of(run) if row["val/top1"]][-1]
    assert (before["step"], after["step"]) == ("0", "3")
    assert [before[name] for name in ("val/top1", "val/top5", "val/loss")] == [
        last[name] for name in ("val/top1", "val/top5", "val/loss")
    ]
    best = torch.load(tmp_path / "runs/run/best.pt", weights_only=True)
    assert best["progress"]["best_epoch"] == 0
    given = torch.load(run / "last.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(best["state_dict"][name], tensor) for name, tensor in given.items())
