"""validate.py as a user runs it: exact counts, and all that a number depends on stored beside it.

Expected counts come from a plain loop over the files, one at a time, with torchvision's own transforms; the labels
are then chosen by what the network says, so that a known number of them is right.
"""

import csv
import hashlib
import json
import math
import pickle
import pkgutil
import shlex
import sys
from pathlib import Path

import programs
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from programs import CLASSES, DONE, FAILED, ROOT, TRAIN, USAGE, VALIDATE
from torchvision import transforms

import volo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("validate")]

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VAL = 13  # images to evaluate on: five a batch leaves three


def results(folder: Path) -> list[dict]:
    rows = json.loads((folder / "results.json").read_text())
    with open(folder / "results.csv", newline="") as file:
        of_csv = list(csv.DictReader(file))
    assert [
        {name: str(value) for name, value in row.items() if not isinstance(value, list) and value is not None}
        for row in rows
    ] == [
        {name: cell for name, cell in row.items() if cell and name != "skipped_files" and cell != "nan"}
        for row in of_csv
    ]
    return rows


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------- after training


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = programs.make_images(tmp_path_factory.mktemp("images"))
    programs.picture("disc", 99).save(root / "val/disc/one_more.png")
    return root


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished run with EMA; recipe, run folder and output."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = programs.write_recipe(folder / "recipe.yaml", images, ema={"enabled": True, "decay": 0.7})
    ended = programs.run(TRAIN, "--config", recipe, cwd=folder).assert_done()
    return recipe, folder / "runs/run", ended


def last_row(run: Path, step: int | None = None) -> dict[str, float]:
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/top1"] and step in (None, int(row["step"]))]
    return {name: float(cell) for name, cell in rows[-1].items() if cell}


def test_command_that_training_prints_gives_its_best_accuracy(trained, tmp_path):
    recipe, run, ended = trained
    (command,) = (line.removeprefix("next:") for line in ended.out.splitlines() if line.startswith("next:"))
    words = [*shlex.split(command), "--output", tmp_path]
    programs.finish(programs.launch(*words, cwd=ROOT)).assert_done()
    (row,) = results(tmp_path)
    of_best = torch.load(run / "best.pt", weights_only=True)["progress"]
    there = last_row(run, of_best["global_step"])
    assert (row["top1"], row["top5"], row["loss"]) == tuple(
        there[f"val_ema/{name}"] for name in ("top1", "top5", "loss")
    )
    assert row["top1"] == of_best["best_top1"]
    assert (row["weights"], row["images"], row["skipped"]) == ("ema", VAL, 0)
    assert row["sha256"] == sha256(run / "best.pt")


@pytest.mark.parametrize(("weights", "name"), [("raw", "val"), ("ema", "val_ema")])
def test_final_evaluation_of_training_is_reproduced_to_the_last_bit(trained, tmp_path, weights, name):
    recipe, run, _ = trained
    words = ("--config", recipe, "--checkpoint", run / "last.pt", "--weights", weights, "--output", tmp_path)
    ended = programs.run(VALIDATE, *words, cwd=tmp_path).assert_done()
    (row,) = results(tmp_path)
    there = last_row(run)
    assert [row[m] for m in ("top1", "top5", "loss")] == [there[f"{name}/{m}"] for m in ("top1", "top5", "loss")]
    # Everything the number depends on is printed and stored.
    stored = {
        "model": "volo_nano",
        "checkpoint": str(run / "last.pt"),
        "sha256": sha256(run / "last.pt"),
        "weights": weights,
        "resolution": "32x32",
        "resize": "to cover 33x33",
        "crop_ratio": "0.96",
        "interpolation": "bicubic",
        "precision": "fp32",
    }
    assert {key: row[key] for key in stored} == stored
    head = {line.split(None, 1)[0]: line for line in ended.out.splitlines() if line}
    for key, value in stored.items():
        assert value in head[key.split("_")[0]], key
    assert row["images_per_s"] > 0
    assert f"{row['top1']:.3f}" in ended.out and f"{row['loss']:.4f}" in ended.out


# ------------------------------------------------------------------------- exact counts on any number of processes

IMAGENET = {
    "model": {**programs.SMALL["model"], "num_classes": 1000},
    "data": {"workers": 0, "class_list": "imagenet", "val_labels": "labels.txt"},
    "eval": {"batch_size": 2, "crop_pct": 1.15},
}
FLAT, NUMBERED = 11, 13  # one fewer and one more than two and three processes divide


class Teller:
    """Logits of a network for one file, computed independently."""

    def __init__(self, model: torch.nn.Module, crop_pct: float):
        resized = math.floor(32 / crop_pct)
        self.model = model.eval()
        self.look = transforms.Compose(
            [
                transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(32),  # pads with black where the resized image is smaller
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.model(self.look(image.convert("RGB"))[None])[0]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A network of 1,000 classes, a flat folder of official names with labels, one of ImageNet-V2, expected counts."""
    folder = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(3)
    fields = {name: value for name, value in IMAGENET["model"].items() if name not in ("name",)}
    model = volo.create_model("volo_nano", **fields)
    torch.save({"state_dict": model.state_dict(), "arch": "volo_nano"}, folder / "net.pth.tar")
    tell = Teller(model, crop_pct=1.15)
    synsets = pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split()
    real = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))

    def chosen(index: int, ranked: list[int]) -> int:
        """The label of image ``index``: every third the first guess, every third the fourth, the others wrong."""
        return ranked[(0, 3, 500)[index % 3]]

    # The flat folder. A third of the files are called like one whose ReaL labels hold the first guess, a third like
    # one without ReaL labels, the others like one whose labels are all wrong.
    (folder / "val").mkdir()
    truth = {
        "flat": dict(top1=0, top5=0, loss=0.0),
        "v2": dict(top1=0, top5=0, loss=0.0),
        "real": dict(images=0, top1=0, top5=0),
    }
    lines, taken = [], set()
    for index in range(FLAT):
        image = programs.picture(CLASSES[index % 3], index, (40 + index, 30))
        image.save(folder / "image.png")
        logits = tell(image)
        ranked = logits.argsort(descending=True).tolist()
        label = chosen(index, ranked)
        wanted = (
            lambda labels, ranked=ranked: ranked[0] in labels,
            lambda labels, ranked=ranked: not labels,
            lambda labels, ranked=ranked: labels and not set(labels) & set(ranked[:5]),
        )[index // 4]
        number = next(n for n, labels in enumerate(real, 1) if wanted(labels) and n not in taken)
        taken.add(number)
        name = f"ILSVRC2012_val_{number:08d}.png"
        (folder / "image.png").rename(folder / "val" / name)
        lines.append(f"{name} {synsets[label]}")
        count(truth["flat"], logits, label)
        if real[number - 1]:
            truth["real"]["images"] += 1
            truth["real"]["top1"] += ranked[0] in real[number - 1]
            truth["real"]["top5"] += bool(set(ranked[:5]) & set(real[number - 1]))
    (folder / "labels.txt").write_text("\n".join(lines))

    v2 = folder / "imagenetv2-threshold0.7-format-val"
    for index in range(NUMBERED):
        image = programs.picture(CLASSES[index % 3], 100 + index, (33, 48))
        logits = tell(image)
        label = chosen(index, logits.argsort(descending=True).tolist())
        (v2 / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(v2 / str(label) / f"{index}.png")
        count(truth["v2"], logits, label)

    (folder / "recipe.yaml").write_text(yaml.safe_dump({**programs.SMALL, **IMAGENET}))
    return folder, v2, truth


def count(truth: dict, logits: torch.Tensor, label: int) -> None:
    ranked = logits.argsort(descending=True).tolist()
    truth["top1"] += ranked[0] == label
    truth["top5"] += label in ranked[:5]
    truth["loss"] += float(F.cross_entropy(logits.double(), torch.tensor(label)))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_counts_are_exact_on_any_number_of_processes(imagenet, tmp_path, processes):
    folder, v2, truth = imagenet
    words = ["--config", folder / "recipe.yaml", "--checkpoint", folder / "net.pth.tar", "--data.root", folder]
    words += ["--real", "true", "--v2", v2, "--output", tmp_path]
    every = programs.start(VALIDATE, *words, cwd=folder, ranks=processes).finish()
    assert [(ended.code, ended.err) for ended in every] == [(DONE, "")] * processes
    assert [ended.out for ended in every[1:]] == [""] * (processes - 1), "one process speaks"

    flat, real, numbered = results(tmp_path)
    assert [row["dataset"] for row in (flat, real, numbered)] == [
        "imagenet",
        "imagenet-real",
        "imagenet-v2 threshold-0.7",
    ]
    for row, images, wanted in ((flat, FLAT, truth["flat"]), (numbered, NUMBERED, truth["v2"])):
        assert row["images"] == images
        assert (row["top1_correct"], row["top5_correct"]) == (wanted["top1"], wanted["top5"])
        assert row["top1"] == 100 * wanted["top1"] / images
        assert row["loss"] == pytest.approx(wanted["loss"] / images, rel=1e-5)
    assert 0 < truth["flat"]["top1"] < truth["flat"]["top5"] < FLAT
    wanted = truth["real"]
    assert (real["images"], real["top1_correct"], real["top5_correct"]) == (
        wanted["images"],
        wanted["top1"],
        wanted["top5"],
    )
    assert 0 < wanted["top1"] <= wanted["top5"] < wanted["images"] < FLAT
    assert real["loss"] is None
    for row in (flat, real, numbered):
        assert (row["crop_ratio"], row["resize"]) == ("1.15", "to cover 27x27")
        assert row["processes"] == f"{processes} on cpu"
        assert row["weights"] == "raw"
        assert row["sha256"] == sha256(folder / "net.pth.tar")


def test_torchrun_counts_the_same(imagenet, tmp_path):
    folder, v2, truth = imagenet
    words = ["--config", folder / "recipe.yaml", "--checkpoint", folder / "net.pth.tar", "--data.root", folder]
    words += ["--data.val_split", "none", "--v2", v2, "--output", tmp_path]
    programs.finish(programs.launch(*programs.torchrun(2, VALIDATE, *words), cwd=folder)).assert_done()
    (row,) = results(tmp_path)
    assert (row["images"], row["top1_correct"], row["top5_correct"]) == (
        NUMBERED,
        truth["v2"]["top1"],
        truth["v2"]["top5"],
    )


def test_the_first_process_alone_reads_the_checkpoint(imagenet, tmp_path):
    folder, v2, truth = imagenet
    words = [VALIDATE, "--config", folder / "recipe.yaml", "--checkpoint", "net.pth.tar", "--data.val_split", "none"]
    words += ["--v2", v2, "--output", tmp_path]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(programs.free_port()), "WORLD_SIZE": "2"}
    ranks = [
        programs.launch(sys.executable, *words, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank, cwd in enumerate((folder, tmp_path))  # there is no such file in the second folder
    ]
    for rank in ranks:
        programs.finish(rank).assert_done()
    (row,) = results(tmp_path)
    assert (row["images"], row["top1_correct"]) == (NUMBERED, truth["v2"]["top1"])
    assert row["sha256"] == sha256(folder / "net.pth.tar")


def test_more_processes_than_images(imagenet, tmp_path):
    folder, _, _ = imagenet
    programs.picture("disc", 5).save(folder / "single.png")
    (tmp_path / "v2/7").mkdir(parents=True)
    (folder / "single.png").rename(tmp_path / "v2/7/single.png")
    words = ["--config", folder / "recipe.yaml", "--checkpoint", folder / "net.pth.tar", "--data.val_split", "none"]
    words += ["--v2", tmp_path / "v2", "--output", tmp_path]
    for ended in programs.start(VALIDATE, *words, cwd=folder, ranks=2).finish():
        ended.assert_done()
    (row,) = results(tmp_path)
    assert (row["dataset"], row["images"]) == ("imagenet-v2 v2", 1)


# ------------------------------------------------------------------------------------------- published models


def test_published_model_is_shown_beside_the_papers_value(tmp_path):
    """The shipped recipe of D1 at 224, a file like the published one (untrained), and three images."""
    torch.manual_seed(0)
    checkpoint = tmp_path / "d1_224_84.2.pth.tar"
    model = volo.create_model("volo_d1")
    torch.save({"state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}, checkpoint)
    for index, synset in enumerate(("n01440764", "n01443537", "n15075141")):
        folder = tmp_path / "images/val" / synset
        folder.mkdir(parents=True)
        programs.picture("stripes", index, (260, 240)).save(folder / f"{index}.JPEG", "JPEG")
    words = ["--config", ROOT / "configs/volo_d1_224.yaml", "--checkpoint", checkpoint]
    words += ["--data.root", tmp_path / "images", "--data.workers", "0", "--train.device", "cpu"]
    ended = programs.run(VALIDATE, *words, cwd=tmp_path).assert_done()
    (row,) = results(tmp_path)
    assert (row["dataset"], row["images"], row["resize"], row["crop_ratio"]) == (
        "imagenet",
        3,
        "to cover 233x233",
        "0.96",
    )
    assert (row["paper_top1"], row["timm_top1"]) == (84.2, 84.148)
    assert row["difference_to_paper"] == pytest.approx(row["top1"] - 84.2)
    assert f"paper 84.20 ({row['top1'] - 84.2:+.2f}, crop 0.96)" in ended.out
    assert f"timm 84.15 ({row['top1'] - 84.148:+.2f}, crop 0.96)" in ended.out


# ------------------------------------------------------------------------------------------------ what is refused


def test_without_a_checkpoint_it_refuses(trained, tmp_path):
    recipe, run, _ = trained
    ended = programs.run(VALIDATE, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(USAGE, "--checkpoint FILE", "--random_weights true")
    ended = programs.run(VALIDATE, "--config", recipe, "--checkpoint", tmp_path / "none.pt", cwd=tmp_path)
    ended.assert_failed(USAGE, f"--checkpoint {tmp_path / 'none.pt'} is not a file")
    words = ("--checkpoint", run / "last.pt", "--random_weights", "true")
    programs.run(VALIDATE, "--config", recipe, *words, cwd=tmp_path).assert_failed(USAGE, "exclude each other")
    assert not list(tmp_path.iterdir())


def test_random_weights_are_evaluated_if_asked_for_and_said_so(trained, tmp_path):
    recipe, _, _ = trained
    losses = []
    for ranks in (1, 2):
        words = ("--config", recipe, "--random_weights", "true", "--output", tmp_path / f"on{ranks}")
        ended = programs.start(VALIDATE, *words, cwd=tmp_path, ranks=ranks).finish()[0].assert_done()
        assert "random weights: the numbers below say nothing about any trained network" in ended.out
        (row,) = results(tmp_path / f"on{ranks}")
        assert (row["weights"], row["checkpoint"], row["sha256"]) == ("random", "none", "none")
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "all processes draw the same network"


def test_weights_that_the_file_does_not_have(images, trained, imagenet, tmp_path):
    recipe, run, _ = trained
    state = torch.load(run / "last.pt", weights_only=True)
    del state["state_dict_ema"]
    torch.save(state, tmp_path / "raw.pt")
    words = ("--config", recipe, "--checkpoint", tmp_path / "raw.pt", "--weights", "ema")
    programs.run(VALIDATE, *words, cwd=tmp_path).assert_failed(USAGE, "raw.pt has no EMA weights", "state_dict_ema")


def test_checkpoint_of_another_model(trained, imagenet, tmp_path):
    recipe, run, _ = trained
    words = ("--config", recipe, "--checkpoint", run / "last.pt")
    ended = programs.run(VALIDATE, *words, "--model.layers", "[1,1,2,1]", cwd=tmp_path)
    ended.assert_failed(USAGE, "does not fit the model; nothing was loaded", "missing: network.3.1.norm1.weight")
    # A head for other classes would be untrained.
    folder, _, _ = imagenet
    ended = programs.run(VALIDATE, "--config", recipe, "--checkpoint", folder / "net.pth.tar", cwd=tmp_path)
    ended.assert_failed(USAGE, "has 1000 classes and model.num_classes is 3", "--model.num_classes 1000")


class Malice:
    """Unpickling it would create a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "malicious", "malicious_zip"])
def test_damaged_or_malicious_checkpoint(trained, tmp_path, how):
    recipe, run, _ = trained
    whole = (run / "last.pt").read_bytes()
    sentinel, path = tmp_path / "was_executed", tmp_path / "checkpoint.pt"
    if how == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": Malice(sentinel)}))
    elif how == "malicious_zip":
        torch.save(
            {"state_dict": torch.load(run / "last.pt", weights_only=True)["state_dict"], "x": Malice(sentinel)}, path
        )
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[how])
    reason = "may run code" if how.startswith("malicious") else "empty" if how == "empty" else "truncated, corrupt"
    before = path.read_bytes()
    ended = programs.run(VALIDATE, "--config", recipe, "--checkpoint", path, cwd=tmp_path)
    ended.assert_failed(FAILED, str(path), reason)
    # The same file as the start of a training run.
    ended = programs.run(TRAIN, "--config", recipe, "--model.checkpoint", path, "--train.name", how, cwd=tmp_path)
    ended.assert_failed(FAILED, str(path), reason)
    assert not sentinel.exists()
    assert path.read_bytes() == before
    assert not (tmp_path / "results.json").exists()


def test_an_evaluation_that_is_not_finite_is_no_success(trained, tmp_path):
    recipe, run, _ = trained
    state = torch.load(run / "last.pt", weights_only=True)["state_dict"]
    state["norm.weight"].fill_(3e38)  # finite, as every weight of a file has to be
    torch.save(state, tmp_path / "net.pt")
    ended = programs.run(VALIDATE, "--config", recipe, "--checkpoint", tmp_path / "net.pt", cwd=tmp_path)
    ended.assert_failed(FAILED, "the mean loss is nan", "no results were written")
    assert not (tmp_path / "results.json").exists()
    state["norm.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "net.pt")
    for program in (VALIDATE, "--checkpoint"), (TRAIN, "--train.name", "nan", "--model.checkpoint"):
        ended = programs.run(program[0], "--config", recipe, *program[1:], tmp_path / "net.pt", cwd=tmp_path)
        ended.assert_failed(FAILED, "values of norm.weight are NaN or infinite")


def test_unknown_class_folder_is_never_mapped_to_another_class(images, trained, tmp_path):
    recipe, run, _ = trained
    (tmp_path / "images").mkdir()
    (tmp_path / "images/train").symlink_to(images / "train")
    for kind in ("cross", "stripes", "star"):  # sorted, "star" would take the place of "disc"
        (tmp_path / "images/val" / kind).mkdir(parents=True)
        programs.picture("disc", 1).save(tmp_path / "images/val" / kind / "1.png")
    words = ("--config", recipe, "--checkpoint", run / "last.pt", "--data.root", tmp_path / "images")
    ended = programs.run(VALIDATE, *words, cwd=tmp_path)
    ended.assert_failed(USAGE, "1 of 3 folders of", "star", "not among the 3 classes")
    # The classes are those of the checkpoint, whatever training folders exist: a missing one shifts no index.
    (tmp_path / "images/val/star").rename(tmp_path / "images/val/disc")
    (tmp_path / "images/train").unlink()
    programs.run(VALIDATE, *words, "--output", tmp_path, cwd=tmp_path).assert_done()
    assert results(tmp_path)[0]["images"] == 3


# ---------------------------------------------------------------------------------------------- unreadable images


def test_unreadable_image_is_named_or_skipped_and_counted(images, trained, tmp_path):
    recipe, run, _ = trained
    for path in (images / "val").glob("*/*"):
        copy = tmp_path / "images/val" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = tmp_path / "images/val/disc/disc_01.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    words = ("--config", recipe, "--checkpoint", run / "last.pt", "--data.root", tmp_path / "images")
    words += ("--output", tmp_path)
    for ended in programs.start(VALIDATE, *words, cwd=tmp_path, ranks=2).finish():
        ended.assert_failed(FAILED, f"cannot read {broken}", "data.on_error")
    assert not (tmp_path / "results.json").exists()

    words += ("--data.on_error", "skip")
    for ranks in (1, 2):
        ended = programs.start(VALIDATE, *words, cwd=tmp_path, ranks=ranks).finish()[0].assert_done()
        (row,) = results(tmp_path)
        assert (row["images"], row["skipped"]) == (VAL - 1, 1)
        (message,) = row["skipped_files"]
        assert message.startswith(f"cannot read {broken}: ")
        assert "skipped 1 unreadable image" in ended.out
        assert message in ended.out
