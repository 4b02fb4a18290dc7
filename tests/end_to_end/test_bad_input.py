"""Unusable input ends with a clear reason on the last line; nothing is lost and nothing written.

Exit codes: 2 if the command or the folders are wrong, found before any work; 1 if a file, the disk or the network
fails. Checkpoints that are damaged, malicious or of another model are in test_validate_cli.py, damaged
checkpoints of a run and full disks in test_resume.py.
"""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import CLASSES, FAILED, LAUNCHER, STOPPED, TRAIN, USAGE, VALIDATE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bad input")]


@pytest.fixture(scope="module")
def good_images(tmp_path_factory) -> Path:
    return programs.make_images(tmp_path_factory.mktemp("images"), train=6, val=2)


@pytest.fixture
def images(good_images, tmp_path) -> Path:
    """A copy to damage: 18 training images, 6 validation images."""
    return Path(shutil.copytree(good_images, tmp_path / "images"))


@pytest.fixture
def recipe(images, tmp_path) -> Path:
    """One epoch of three steps of six images."""
    return programs.write_recipe(
        tmp_path / "recipe.yaml", images, schedule={"epochs": 1}, train={"batch_size": 6, "output": "runs"}
    )


@pytest.fixture(scope="module")
def finished(good_images, tmp_path_factory):
    """A folder with a finished run, and its recipe; read only."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = programs.write_recipe(
        folder / "recipe.yaml", good_images, schedule={"epochs": 1}, train={"batch_size": 6, "output": "runs"}
    )
    programs.run(TRAIN, "--config", recipe, cwd=folder).assert_done()
    return folder, recipe


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file under ``folder``."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]  # of a refused run
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ----------------------------------------------------------------------------------------------- data folders


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FOLDERS = {
    "no data folder": (lambda root: shutil.rmtree(root), ("data.root is", "images", "not a folder")),
    "empty data folder": (lambda root: emptied(root), ("data.train_split is 'train'", "holds nothing")),
    "no training folder": (lambda root: shutil.rmtree(root / "train"), ("data.train_split is 'train'", "it holds val")),
    "empty training folder": (lambda root: emptied(root / "train"), ("train has no class", "at least two")),
    "no validation folder": (lambda root: shutil.rmtree(root / "val"), ("data.val_split", '"none"', "it holds train")),
    "empty validation folder": (lambda root: emptied(root / "val"), ("val has no class folders",)),
    "class folders without images": (
        lambda root: [emptied(folder) for folder in (root / "train").iterdir()],
        ("train has no image", ".jpg"),
    ),
    "one class only": (
        lambda root: [shutil.rmtree(root / split / kind) for split in ("train", "val") for kind in CLASSES[1:]],
        ("only the class 'cross'", "at least two"),
    ),
    "one class fewer than the network has": (
        lambda root: [shutil.rmtree(root / split / "disc") for split in ("train", "val")],
        ("gives 2 classes", "--model.num_classes 2"),
    ),
    "a class in the validation folder alone": (
        lambda root: shutil.copytree(root / "val/disc", root / "val/star"),
        ("1 of 4 folders", "star", "not among the 3 classes"),
    ),
    "images outside the class folders": (
        lambda root: shutil.copy(root / "val/disc/disc_00.jpg", root / "val/loose.jpg"),
        ("loose.jpg", "data.val_labels"),
    ),
    "fewer images than a batch": (
        lambda root: [path.unlink() for path in (root / "train").glob("*/*_0[1-5].jpg")],
        ("train.batch_size is 6", "only 3 training images"),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_data_folder(recipe, images, tmp_path, case):
    spoil, words = FOLDERS[case]
    spoil(images)
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(USAGE, *words)
    assert "epoch" not in ended.out
    assert not list(tmp_path.glob("runs/*/*.pt"))


def test_data_folder_of_an_evaluation(finished, tmp_path):
    folder, recipe = finished
    words = ("--config", recipe, "--checkpoint", folder / "runs/run/best.pt", "--output", tmp_path)
    ended = programs.run(VALIDATE, *words, "--data.root", tmp_path / "nowhere", cwd=tmp_path)
    ended.assert_failed(USAGE, "data.root is", "nowhere", "not a folder")
    (tmp_path / "images/val").mkdir(parents=True)
    ended = programs.run(VALIDATE, *words, "--data.root", tmp_path / "images", cwd=tmp_path)
    ended.assert_failed(USAGE, "has no class folders")
    ended = programs.run(VALIDATE, *words, "--real", "true", cwd=tmp_path)
    ended.assert_failed(USAGE, "--real", "1,000 ImageNet classes")
    assert not (tmp_path / "results.json").exists()


# ------------------------------------------------------------------------------------- unusual image files


def write_unusual(folder: Path, shown: Image.Image) -> dict[str, str]:
    """Write image files of every unusual kind into ``folder``; return name and description of each."""
    wide = shown.resize((40, 20))
    shown.convert("CMYK").save(folder / "cmyk.jpg")
    sixteen = np.asarray(shown.convert("L")).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    shown.convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(folder / "rotated.jpg", exif=exif)
    shown.save(folder / "really_a_png.jpg", "PNG")
    shown.convert("L").save(folder / "grey.jpg")
    return {
        "cmyk.jpg": "cmyk",
        "sixteen.png": "sixteen_bit",
        "palette.png": "palette",
        "rotated.jpg": "exif_rotated",
        "really_a_png.jpg": "other_format",
        "grey.jpg": "",
    }


def test_unusual_images_are_read_in_training_and_evaluation(recipe, images, tmp_path):
    for split in ("train", "val"):
        notes = write_unusual(images / split / "disc", programs.picture("disc", 7))
    trained = programs.run(TRAIN, "--config", recipe, "--augment.order", "published", cwd=tmp_path).assert_done()
    assert "24 to train on, 12 to evaluate on" in trained.out
    assert "(12 images)" in trained.out, "every one was evaluated"
    words = ("--config", recipe, "--checkpoint", "runs/run/best.pt", "--output", tmp_path)
    evaluated = programs.run(VALIDATE, *words, cwd=tmp_path).assert_done()
    for note in filter(None, notes.values()):
        assert f"1 images: {note}" in evaluated.out
    turned = programs.run(VALIDATE, *words, "--data.exif", "apply", cwd=tmp_path).assert_done()
    assert "1 images: exif_rotated" in turned.out


# ------------------------------------------------------------------------------------ unreadable image files

UNREADABLE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated"),
    "zero-byte": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "not an image"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_training_image_is_named(recipe, images, tmp_path, kind):
    spoil, reason = UNREADABLE[kind]
    broken = images / "train/disc/disc_03.jpg"
    spoil(broken)
    before = state_of(images)
    ended = programs.run(TRAIN, "--config", recipe, "--data.workers", "1", cwd=tmp_path)
    ended.assert_failed(FAILED, f"cannot read {broken}", reason, "data.on_error to skip")
    assert ended.last_line.removeprefix("error: ") in (tmp_path / "runs/run/log.txt").read_text()
    assert state_of(images) == before


def test_unreadable_training_images_are_replaced_and_reported_if_asked_for(recipe, images, tmp_path):
    broken = [images / f"train/{kind}/{kind}_02.jpg" for kind in CLASSES]
    for path, (spoil, _) in zip(broken, UNREADABLE.values(), strict=True):
        spoil(path)
    words = ("--config", recipe, "--data.on_error", "skip", "--data.workers", "1")
    outs = []
    for ranks in (1, 2):
        folder = tmp_path / f"on{ranks}"
        for ended in programs.start(TRAIN, *words, cwd=folder, ranks=ranks).finish():
            outs.append(ended.assert_done().out)
        log = (folder / "runs/run/log.txt").read_text()
        for path, (_, reason) in zip(broken, UNREADABLE.values(), strict=True):
            (line,) = (line for line in log.splitlines() if f"cannot read {path}" in line)
            assert "replaced unreadable training image: " in line
            assert reason in line
    assert outs[0].count("cannot read") == 3
    assert outs[2] == "", "rank 0 reports for all"


def test_the_count_of_replaced_images_survives_resuming(recipe, images, tmp_path):
    (images / "train/disc/disc_03.jpg").write_bytes(b"")
    words = ("--config", recipe, "--data.on_error", "skip", "--schedule.epochs", 6, "--train.log_every_steps", 2)
    run = programs.start(TRAIN, *words, cwd=tmp_path)
    run.follow("epoch 3/6  step 2/3  ")  # two of the three steps: what the third meets is in no log line yet
    os.kill(run.pids[0], signal.SIGTERM)
    (first,) = run.finish()
    assert first.code == STOPPED
    last = programs.run(TRAIN, *words, cwd=tmp_path).assert_done()
    named = sum(ended.out.count("replaced unreadable training image: ") for ended in (first, last))
    assert named >= 6, "at least once an epoch: it may be drawn for itself"
    assert f"replaced unreadable training images {named} times" in last.out


def test_unreadable_validation_image_stops_a_run_that_resumes_when_repaired(recipe, images, good_images, tmp_path):
    broken = images / "val/disc/disc_01.jpg"
    broken.write_bytes(b"")
    first, second = programs.start(TRAIN, "--config", recipe, cwd=tmp_path, ranks=2).finish()
    for ended in (first, second):
        ended.assert_failed(
            FAILED, f"cannot read {broken}: the file is empty", "runs/run/last.pt has all that was trained"
        )
    trained = torch.load(tmp_path / "runs/run/last.pt", weights_only=True)
    assert (trained["progress"]["epoch"], trained["progress"]["closed_epochs"]) == (1, 0)

    broken.write_bytes((good_images / "val/disc/disc_01.jpg").read_bytes())
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path).assert_done()
    assert "resuming from runs/run/last.pt: epoch 1, step 0" in ended.out
    assert "  step " not in ended.out, "nothing is trained twice"
    done = torch.load(tmp_path / "runs/run/best.pt", weights_only=True)
    assert all(torch.equal(done["state_dict"][name], tensor) for name, tensor in trained["state_dict"].items())
    assert done["progress"]["best_top1"] >= 0


def test_unreadable_validation_image_is_counted_if_asked_for(recipe, images, tmp_path):
    broken = images / "val/disc/disc_01.jpg"
    broken.write_bytes(b"")
    ended = programs.run(TRAIN, "--config", recipe, "--data.on_error", "skip", cwd=tmp_path).assert_done()
    assert "(5 images)" in ended.out
    assert "skipped 1 unreadable validation image" in ended.out
    assert f"cannot read {broken}: the file is empty" in ended.out


def test_unreadable_image_of_one_process_ends_all_without_a_traceback(recipe, images, tmp_path):
    (images / "train/disc/disc_03.jpg").write_bytes(b"")
    both = programs.start(TRAIN, "--config", recipe, cwd=tmp_path, ranks=2).finish()
    (reader,) = (ended for ended in both if "cannot read" in ended.err)
    (other,) = (ended for ended in both if ended is not reader)
    reader.assert_failed(FAILED, "disc_03.jpg: the file is empty")
    other.assert_failed(FAILED, "another process of the run is gone", "its own message says why")


# ------------------------------------------------------------------------------------------------ processes


def test_more_processes_than_images_per_batch(recipe, tmp_path):
    words = ("--config", recipe, "--train.batch_size", 1)
    for ended in programs.start(TRAIN, *words, cwd=tmp_path, ranks=2).finish():
        ended.assert_failed(USAGE, "train.batch_size is 1, over 2 processes", "Start at most 1 processes")
    assert not (tmp_path / "runs").exists()


def test_launcher_ends_with_code_and_reason_of_the_program(recipe, tmp_path):
    for words, message in {
        ("--optim.lrr", 1): "unrecognized arguments: --optim.lrr 1. Did you mean optim.lr?",
        ("--train.batch_size", 7): "train.batch_size 7 does not divide over 2 processes",
    }.items():
        process = programs.launch(LAUNCHER, 2, "--config", recipe, *words, cwd=tmp_path, PYTHON=sys.executable)
        ended = programs.finish(process)
        assert ended.code == USAGE, ended.err
        assert ended.last_line.startswith("distributed_train.sh: error: ")
        assert message in ended.last_line
    assert not (tmp_path / "runs").exists()


def test_port_in_use(recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path, **place)
    ended.assert_failed(FAILED, f"127.0.0.1:{port}", "MASTER_PORT", "--standalone")
    assert not (tmp_path / "runs").exists()


def test_missing_device(recipe, tmp_path):
    ended = programs.run(TRAIN, "--config", recipe, "--train.device", "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    ended.assert_failed(USAGE, "train.device is 'cuda'", "no CUDA device")


# ----------------------------------------------------------------------------------------------- run folders


def test_finished_run_is_left_unchanged(finished):
    folder, recipe = finished
    before = state_of(folder / "runs")
    ended = programs.run(TRAIN, "--config", recipe, cwd=folder)
    ended.assert_failed(USAGE, "already holds a finished run (1 of 1 epochs", "nothing was changed", "train.name")
    assert state_of(folder / "runs") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train.resume", "never"), "already holds checkpoints, and train.resume is 'never'"),
        (("--schedule.epochs", "2", "--model.embed_dims", "[32,32,32,32]"), "model.embed_dims was [16, 32, 32, 32]"),
        (("--schedule.epochs", "2", "--train.batch_size", "9"), "train.batch_size was 6 and is now 9"),
        (("--schedule.epochs", "2", "--train.resume", "runs/none.pt"), "runs/none.pt does not exist"),
    ],
)
def test_run_of_other_options_is_not_resumed(finished, words, message):
    folder, recipe = finished
    before = state_of(folder / "runs")
    programs.run(TRAIN, "--config", recipe, *words, cwd=folder).assert_failed(USAGE, message)
    assert state_of(folder / "runs") == before


def test_run_on_other_classes_is_not_resumed(finished, images):
    folder, recipe = finished
    before = state_of(folder / "runs")
    for split in ("train", "val"):
        (images / split / "disc").rename(images / split / "ring")
    words = ("--data.root", images, "--schedule.epochs", "2")
    ended = programs.run(TRAIN, "--config", recipe, *words, cwd=folder)
    ended.assert_failed(USAGE, "a run on other classes", "'cross'", "data.class_list")
    after = state_of(folder / "runs")
    assert after.pop("run/log.txt")[0].startswith(before.pop("run/log.txt")[0])  # it tells of the other options
    assert after == before


def test_a_file_has_the_name_of_the_run_folder(recipe, tmp_path):
    (tmp_path / "runs").write_text("mine")
    ended = programs.run(TRAIN, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(USAGE, "run folder runs/run cannot be written to", "train.output")
    assert (tmp_path / "runs").read_text() == "mine"
