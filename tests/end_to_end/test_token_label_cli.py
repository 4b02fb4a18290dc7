"""train.py with label maps: from a packed store to a trained network, and what must be refused."""

import re
import struct

import numpy as np
import pytest
import torch
from programs import CLASSES, FAILED, TRAIN, USAGE, make_images, run, start, write_recipe

from volo.data.sources.folders import FolderSplit, scan_class_folders
from volo.data.sources.records import class_names
from volo.token_labels.store import TokenLabelMap, label_key
from volo.token_labels.writer import StoreWriter

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("token_labels")]


def write_store(path, images, classes=CLASSES, num_classes=None, leave_out=0, exif="ignore", one_size=False):
    """A teacher that sees the image's own class everywhere, and some of the next one in the left half."""
    records = scan_class_folders(str(images / "train"), class_names("folders", FolderSplit(str(images / "train"))))
    header = {"teacher": "made by hand", "covers": "whole_image", "top_k": 2}
    with StoreWriter(path, **header, num_classes=num_classes or len(classes), classes=classes, exif=exif) as writer:
        for image, label in list(zip(records.names, records.labels, strict=True))[leave_out:]:
            height, width = 5, 6 if one_size else 6 + int(label)  # maps need not be square, nor alike
            scores = np.stack([np.full((height, width), 9.0), np.zeros((height, width))])
            scores[1, :, : width // 2] = 7.0
            names = np.stack([np.full((height, width), label), np.full((height, width), (label + 1) % len(classes))])
            writer.add(label_key(image), TokenLabelMap(scores.astype(np.float16), names.astype(np.int16)))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def store(images):
    return write_store(images / "labels", images)


def test_training_on_label_maps_does_not_depend_on_workers(images, store, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(store)})
    for name, workers in (("a", 0), ("b", 1)):
        ended = run(TRAIN, "--config", recipe, "--train.name", name, "--data.workers", workers, cwd=tmp_path)
        ended.assert_done()
        assert "made by hand, whole_image, read as aligned for a grid of 4x4 tokens" in ended.out
    weights = [torch.load(tmp_path / "runs" / name / "last.pt")["state_dict"] for name in ("a", "b")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert (tmp_path / "runs" / "a" / "batch.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options",
    [
        {"mix": {"mix_token": False, "mixup": 0.8, "cutmix": 1.0, "mode": "elem", "off_epoch": 1}},
        {"mix": {"mix_token": False, "cutmix": 1.0, "mode": "pair"}},
        {"augment": {"order": "published"}, "token_label": {"geometry": "published", "smoothing": "published"}},
        {
            "augment": {"order": "published"},
            "token_label": {"geometry": "published", "ground_truth": "published"},
            "mix": {"mixup": 0.5},
        },
        {"token_label": {"ground_truth": "corrected", "verify_checksums": True}, "loss": {"dense_weight": 0}},
    ],
    ids=["elem mixing that ends", "pair", "published", "published with mixup", "no token term"],
)
def test_every_way_to_use_label_maps_trains(options, images, store, tmp_path):
    if options.get("token_label", {}).get("geometry") == "published":
        store = write_store(tmp_path / "labels", images, one_size=True)
    options["token_label"] = {"root": str(store)} | options.get("token_label", {})
    recipe = write_recipe(tmp_path / "recipe.yaml", images, **options)
    ended = run(TRAIN, "--config", recipe, "--augment.rand_augment", "rand-m9-mstd0.5-inc1", cwd=tmp_path)
    losses = [float(value) for value in re.findall(r"  loss ([\d.]+)", ended.assert_done().out)]
    assert len(losses) == 6
    assert all(0 < loss < 4 for loss in losses)


def test_two_processes_train_on_label_maps(images, store, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(store)})
    for ended in start(TRAIN, "--config", recipe, cwd=tmp_path, ranks=2).finish():
        ended.assert_done()


def test_labels_that_do_not_belong_are_refused_before_the_first_step(images, store, tmp_path):
    others = make_images(tmp_path / "others", train=4, val=1)
    for file in (others / "train" / "disc").iterdir():
        file.rename(file.with_name("x" + file.name))
    cases = [
        ({"data": {"root": str(others)}}, store, ("4 of 12", "train", "xdisc_00")),
        ({}, write_store(tmp_path / "few", images, leave_out=3), ("3 of 36", "cross_00")),
        ({}, write_store(tmp_path / "order", images, classes=("disc", "cross", "stripes")), ("class 0", "'disc'")),
        (
            {},
            write_store(tmp_path / "more", images, classes=tuple("abcdefg")),
            ("7 classes", "data set has 3"),
        ),
        ({}, tmp_path / "nothing", ("nothing",)),
    ]
    for options, labels, words in cases:
        words = [word for word in words if word != "train"]
        recipe = write_recipe(tmp_path / "recipe.yaml", images, **options)
        ended = run(TRAIN, "--config", recipe, "--token_label.root", labels, cwd=tmp_path)
        ended.assert_failed(USAGE, *words)


def test_published_geometry_needs_the_published_order(images, store, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(store), "geometry": "published"})
    run(TRAIN, "--config", recipe, cwd=tmp_path).assert_failed(USAGE, "augment.order")


def test_the_published_geometry_takes_maps_of_one_size(images, store, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", images, augment={"order": "published"})
    words = ("--config", recipe, "--token_label.root", store, "--token_label.geometry")
    run(TRAIN, *words, "published", cwd=tmp_path).assert_failed(USAGE, str(store), "3 sizes", "aligned")


def test_a_damaged_store_is_found_by_its_checksums(images, tmp_path):
    damaged = write_store(tmp_path / "damaged", images)
    file = damaged / "scores.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(damaged)})
    ended = run(TRAIN, "--config", recipe, "--token_label.verify_checksums", "true", cwd=tmp_path)
    ended.assert_failed(USAGE, "scores.bin")


def test_labels_of_another_exif_orientation_are_refused(images, store, tmp_path):
    turned = write_store(tmp_path / "turned", images, exif="apply")
    recipe = write_recipe(tmp_path / "recipe.yaml", images, schedule={"epochs": 1})
    for labels, exif, other in ((store, "apply", "ignore"), (turned, "ignore", "apply")):
        words = ("--config", recipe, "--token_label.root", labels, "--data.exif")
        run(TRAIN, *words, exif, cwd=tmp_path).assert_failed(USAGE, str(labels), f"--data.exif {other}")
        run(TRAIN, *words, other, "--train.name", other, cwd=tmp_path).assert_done()


# ------------------------------------------------------------------------------------- damaged label files


def write_files(path, images):
    """The labels of :func:`write_store` in the published layout."""
    for folder in sorted((images / "train").iterdir()):
        for image in sorted(folder.iterdir()):
            tensor = torch.zeros(2, 2, 5, 5, dtype=torch.float16)
            tensor[0, 0], tensor[1, 0] = 9, CLASSES.index(folder.name)
            tensor[1, 1] = (CLASSES.index(folder.name) + 1) % 3
            file = path / folder.name / f"{image.stem}.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensor, file)
    return path


def damage(file, kind):
    tensor = torch.load(file)
    if kind == "shape":
        tensor = tensor[:, :, 0]
    elif kind == "top-k":
        tensor = tensor[:, :1].clone()
    elif kind == "NaN":
        tensor[0, 0, 1, 2] = torch.nan
    elif kind == "class":
        tensor[1, 0, 1, 2] = 3
    torch.save(tensor, file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("shape", ["its shape is [2, 2, 5]", "Generate or download it again"]),
        ("top-k", ["scores [1, 5, 5]", "top 2 as in the other entries", "generate this label again"]),
        ("NaN", ["NaN", "generate this label again"]),
        ("class", ["class index 3, allowed is 0 ... 2", "number of classes that the teacher had"]),
        ("cut", ["not a file of one tensor", "Generate or download it again"]),
    ],
)
def test_damaged_label_files_are_named_before_the_first_step(kind, words, images, tmp_path):
    labels = write_files(tmp_path / "files", images)
    broken = labels / "disc" / "disc_07.pt"
    damage(broken, kind)
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(labels)})
    ended = run(TRAIN, "--config", recipe, cwd=tmp_path)
    ended.assert_failed(USAGE, "1 of 36 label files", str(broken), *words)
    assert "step 1" not in ended.out


def test_damaged_label_files_are_left_out_and_reported_if_asked_for(images, tmp_path):
    labels = write_files(tmp_path / "files", images)
    for kind in ("NaN", "cut"):
        damage(labels / "disc" / "disc_07.pt", kind)
        damage(labels / "cross" / "cross_00.pt", kind)  # the very first
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(labels)})
    words = ("--config", recipe, "--data.on_error", "skip")
    for ranks in (1, 2):
        ended = start(TRAIN, *words, "--train.name", f"on{ranks}", cwd=tmp_path, ranks=ranks).finish()
        out = [one.assert_done() for one in ended][0].out
        assert "2 of 36 label files" in out and "data.on_error is skip" in out
        for file in ("cross/cross_00.pt", "disc/disc_07.pt"):
            replaced = [line for line in out.splitlines() if "replaced" in line and str(labels / file) in line]
            assert len(replaced) == 2, "two epochs"
        assert "replaced unreadable training images 4 times" in out

    for file in (labels / "stripes").iterdir():
        damage(file, "NaN")
    for file in (labels / "disc").iterdir():
        file.write_bytes(b"")
    ended = run(TRAIN, *words, "--train.name", "most", cwd=tmp_path)  # most of them: not damage but other files
    ended.assert_failed(USAGE, "25 of 36 label files", str(labels))


def test_a_label_that_changed_in_its_store_is_named_when_it_is_read(images, tmp_path):
    labels = write_store(tmp_path / "changed", images)
    file = labels / "scores.bin"
    file.write_bytes(struct.pack("<e", float("nan")) + file.read_bytes()[2:])
    recipe = write_recipe(tmp_path / "recipe.yaml", images, token_label={"root": str(labels)})
    for workers in (0, 1):
        ended = run(TRAIN, "--config", recipe, "--data.workers", workers, cwd=tmp_path)
        ended.assert_failed(FAILED, f"{labels}: label of 'cross/cross_00'", "NaN", "pack it again", "data.on_error")


def test_fine_tuning_on_other_classes_with_and_without_labels(images, store, tmp_path):
    """A 32 px run is fine-tuned at 48 px: evaluation first, position embedding resized, new heads."""
    recipe = write_recipe(tmp_path / "recipe.yaml", images, schedule={"epochs": 1, "warmup_epochs": 0})
    run(TRAIN, "--config", recipe, "--train.name", "first", cwd=tmp_path).assert_done()
    fine = {
        "model": {"img_size": 48},
        "eval": {"before_training": True},
        "optim": {"lr": 8e-6, "weight_decay": 1e-8},
        "schedule": {"epochs": 1, "warmup_epochs": 0, "min_lr": 4e-6},
        "token_label": {"ground_truth": "published"},
    }
    recipe = write_recipe(tmp_path / "fine.yaml", images, **fine)
    run(TRAIN, "--config", recipe, cwd=tmp_path).assert_failed(USAGE, "--model.checkpoint")

    weights = tmp_path / "runs" / "first" / "best.pt"
    start_from = ("--config", recipe, "--model.checkpoint", weights)
    ended = run(TRAIN, *start_from, "--token_label.root", store, "--train.name", "labels", cwd=tmp_path).assert_done()
    assert "position embedding resized from 4x4 to 6x6" in ended.out
    assert ended.out.index("epoch 0: raw weights top-1") < ended.out.index("epoch 1/1  step 1/3")

    for kind in ("disc", "stripes"):  # other classes: only two of the three
        (tmp_path / "two" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / "val").mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (tmp_path / "two" / split / kind).symlink_to(images / split / kind)
    other = ("--data.root", tmp_path / "two", "--model.num_classes", 2)
    labels_of_two = write_store(tmp_path / "two" / "labels", tmp_path / "two", classes=("disc", "stripes"))
    for name, words in (
        ("unlabelled", (*other, "--loss.dense_weight", 0)),
        ("two", (*other, "--token_label.root", labels_of_two)),
        ("two-class-token", (*other, "--token_label.root", labels_of_two, "--loss.dense_weight", 0)),
    ):
        ended = run(TRAIN, *start_from, *words, "--train.name", name, cwd=tmp_path).assert_done()
        assert "heads dropped: theirs have 3 classes" in ended.out
        assert ("\nlabels " in ended.out) == (name != "unlabelled")
    ended = run(TRAIN, *start_from, *other, "--token_label.root", store, "--train.name", "three", cwd=tmp_path)
    ended.assert_failed(USAGE, "had 3 classes", "data set has 2")
