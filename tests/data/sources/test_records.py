"""Class lists, folders and labels files: the right class by name, and an error with a name for everything else."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torchvision

from volo.config import DataConfig
from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.base import PackedNames
from volo.data.sources.folders import FolderSplit, folder_layout, scan_class_folders
from volo.data.sources.formats import open_split
from volo.data.sources.label_files import LabelsOption
from volo.data.sources.records import ImageRecords, class_names, imagenet_classes


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_imagenet_classes():
    classes = imagenet_classes()
    assert len(classes) == 1000 and classes[0] == "n01440764" and classes[999] == "n15075141"
    assert list(classes) == sorted(classes)
    assert class_names("imagenet") == classes


def test_folders_are_listed_as_torchvision_lists_them(tmp_path):
    touch(tmp_path, "n02/a.png", "n01/B.JPEG", "n01/a.jpg", "n01/deep/c.webp", "n10/x.TIF", "N01/z.bmp")
    touch(tmp_path, "n01/notes.txt", "n02/.hidden.png", ".cache/x.png", "readme.txt")
    # torchvision lists the two hidden files, which some operating systems leave behind.
    reference = [
        (path, label)
        for path, label in torchvision.datasets.ImageFolder(str(tmp_path), allow_empty=True).samples
        if "/." not in path
    ]
    classes = class_names("folders", FolderSplit(str(tmp_path)))
    assert classes == ("N01", "n01", "n02", "n10")
    records = scan_class_folders(str(tmp_path), classes)
    offset = 1  # torchvision makes a class of the hidden folder
    assert {(f"{tmp_path}/{p}", label + offset) for p, label in zip(records.names, records.labels, strict=True)} == set(
        reference
    )
    assert list(records.names) == sorted(records.names) and records.labels.dtype == np.int64
    assert records.ignored == 3 and len(records) == 6 and records.classes == classes


def test_numbered_folders_are_sorted_by_number(tmp_path):
    touch(tmp_path, *(f"{i}/x.png" for i in range(12)))
    classes = class_names("folders", FolderSplit(str(tmp_path)))
    assert classes == tuple(str(i) for i in range(12))
    records = scan_class_folders(str(tmp_path), classes)
    assert {path.split("/")[0]: label for path, label in zip(records.names, records.labels, strict=True)} == {
        str(i): i for i in range(12)
    }


def test_a_subset_of_the_classes_keeps_their_indices(tmp_path):
    touch(tmp_path, "n15075141/x.jpg", "n01443537/x.jpg")
    records = scan_class_folders(str(tmp_path), imagenet_classes())
    assert dict(zip(records.names, records.labels.tolist(), strict=True)) == {
        "n01443537/x.jpg": 1,
        "n15075141/x.jpg": 999,
    }


def test_imagenet_v2_layout(tmp_path):
    touch(tmp_path, "0/x.jpeg", "10/x.jpeg", "9/x.jpeg", "999/x.jpeg")
    classes = imagenet_classes()
    assert folder_layout(str(tmp_path), classes) == "indices"
    records = scan_class_folders(str(tmp_path), classes, layout="indices")
    assert records.labels.tolist() == [0, 10, 9, 999]
    # Only with the synsets as classes; with others a number is a name.
    assert folder_layout(str(tmp_path), ("cat", "dog")) == "names"
    touch(tmp_path, "1000/x.jpeg")
    assert folder_layout(str(tmp_path), classes) == "names"
    with pytest.raises(ValueError, match=r"1 of 5 folders .* \(0 \.\.\. 999\): 1000"):
        scan_class_folders(str(tmp_path), classes, layout="indices")


def test_unknown_folders_are_never_mapped(tmp_path):
    touch(tmp_path, "cat/x.png", *(f"stranger{i:02d}/x.png" for i in range(13)))
    with pytest.raises(ValueError, match="13 of 14 folders .*stranger00, .*stranger09 and 3 more.*class_list"):
        scan_class_folders(str(tmp_path), ("cat", "dog"))


def test_class_list_file(tmp_path):
    listing = tmp_path / "classes.txt"
    listing.write_text("dog\nsea cow\n\ncat\n")
    assert class_names(str(listing)) == ("dog", "sea cow", "cat")
    listing.write_text("dog\ncat\ndog\n")
    with pytest.raises(ValueError, match="more than once: dog"):
        class_names(str(listing))
    listing.write_text("dog\n")
    with pytest.raises(ValueError, match="only the class 'dog'.*at least two"):
        class_names(str(listing))
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        class_names(str(listing))
    with pytest.raises(ValueError, match="data.class_list is 'imagnet', which is not a file.*imagenet"):
        class_names("imagnet")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="data.root is '.*none'"):
        open_split(DataConfig(str(tmp_path / "none")), "train")
    with pytest.raises(ValueError, match="data.train_split is 'train'.*it holds nothing"):
        open_split(DataConfig(str(tmp_path)), "train")
    touch(tmp_path, "training/only/x.txt", "training/only/y.md")
    with pytest.raises(ValueError, match="it holds training"):
        open_split(DataConfig(str(tmp_path)), "train")
    train = open_split(DataConfig(str(tmp_path), train_split="training"), "train").location
    with pytest.raises(ValueError, match="only the class 'only'"):
        class_names("folders", FolderSplit(train))
    with pytest.raises(ValueError, match=r"no image \(.jpg.*2 files .*only/x.txt"):
        scan_class_folders(train, ("only", "other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class"):
        class_names("folders", FolderSplit(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="no class folders"):
        scan_class_folders(str(tmp_path / "empty"), ("a", "b"))
    with pytest.raises(ValueError, match="is not a folder"):
        scan_class_folders(str(tmp_path / "none"), ("a", "b"))


def test_images_outside_class_folders_are_not_lost(tmp_path):
    touch(tmp_path, "a/x.png", "b/x.png", "stray.png")
    with pytest.raises(ValueError, match="1 images .*: stray.png.*data.train_labels"):
        scan_class_folders(str(tmp_path), ("a", "b"))


def test_dead_links_are_listed(tmp_path):
    """Reading them gives an error with their name."""
    touch(tmp_path, "a/x.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert scan_class_folders(str(tmp_path), ("a", "b")).names == PackedNames.of(["a/gone.png", "a/x.png"])


def test_links_of_the_user_are_followed(tmp_path):
    """Class folders and images may lie on other disks."""
    touch(tmp_path, "root/a/x.png", "disk/b/y.png", "disk/z.png")
    (tmp_path / "root/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "root/a/z.png").symlink_to("../../disk/z.png")
    (tmp_path / "disk/z.png").write_bytes(b"z")
    records = scan_class_folders(str(tmp_path / "root"), ("a", "b"))
    assert list(records.names) == ["a/x.png", "a/z.png", "b/y.png"] and records.read(1) == b"z"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_image_that_is_no_regular_file_is_named_without_opening_it(tmp_path, kind):
    def make(path: Path) -> None:
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/null")

    touch(tmp_path, "a/x.png", "b/x.png")
    make(tmp_path / "a/notes.txt")
    assert scan_class_folders(str(tmp_path), ("a", "b")).ignored == 1
    make(tmp_path / "b/y.png")
    with pytest.raises(ValueError, match="b/y.png is a pipe, a socket or a device"):
        scan_class_folders(str(tmp_path), ("a", "b"))


def test_an_image_that_has_become_a_device_is_not_read(tmp_path):
    touch(tmp_path, "a/x.png", "b/x.png")
    records = scan_class_folders(str(tmp_path), ("a", "b"))
    (tmp_path / "a/x.png").unlink()
    (tmp_path / "a/x.png").symlink_to("/dev/null")
    with pytest.raises(UnreadableImage, match="a/x.png: a pipe, a socket or a device"):
        records.read(0)


def labelled(directory: str, labels_file: str, classes: tuple[str, ...]) -> ImageRecords:
    return FolderSplit(directory, LabelsOption("data.val_labels", labels_file)).records(classes)


FLAT = ["val_1.JPEG", "val_2.JPEG", "val_3.JPEG"]


@pytest.mark.parametrize(
    "text",
    [
        "val_2.JPEG dog\nval_1.JPEG cat\nval_3.JPEG sea cow\n",
        "val_3.JPEG 2\nval_2.JPEG 1\n\nval_1.JPEG 0\n",
        "cat\ndog\nsea cow\n",
        "0\n1\n2",
    ],
)
def test_flat_folder(tmp_path, text):
    touch(tmp_path, *FLAT, ".hidden.JPEG")
    (tmp_path / "labels.txt").write_text(text)
    records = labelled(str(tmp_path), str(tmp_path / "labels.txt"), ("cat", "dog", "sea cow"))
    assert list(records.names) == FLAT and records.labels.tolist() == [0, 1, 2]
    assert records.ignored == 2  # the labels file and the hidden image


@pytest.mark.parametrize(
    "text",
    [
        "image,label\nval 1.JPEG,dog\nval_2.JPEG,cat\ndeep/3.JPEG,sea cow\n",
        'val_2.JPEG,cat,a third column\n"val 1.JPEG", "dog"\ndeep/3.JPEG,"sea cow"\n',
        "\ufeffid,label\r\ndeep/3.JPEG,2\r\nval_2.JPEG,0\r\nval 1.JPEG,1\r\n",  # as a spreadsheet saves it
    ],
)
def test_labels_in_a_csv_file_of_images_at_any_depth(tmp_path, text):
    touch(tmp_path, "val 1.JPEG", "val_2.JPEG", "deep/3.JPEG", "deep/.hidden/4.JPEG")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    records = labelled(str(tmp_path), str(tmp_path / "labels.csv"), ("cat", "dog", "sea cow"))
    assert list(zip(records.names, records.labels.tolist(), strict=True)) == [
        ("deep/3.JPEG", 2),
        ("val 1.JPEG", 1),
        ("val_2.JPEG", 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_1.JPEG,cat\n", "images without a line: val_2.JPEG"),
        ("image.name,label\nval_1.JPEG,cat\nval_2.JPEG,cat\n", "without a label or file: image.name"),
        ("image,label\nval_1,cat\nval_2,cat\n", "without a label or file: val_1, val_2; images without .*val_1.JPEG"),
        ("val_1.JPEG,cat\nval_2.JPEG,\n", "without a label or file: val_2.JPEG"),
        ("", "images without a line: val_1.JPEG, val_2.JPEG"),
        ("val_1.JPEG;cat\nval_2.JPEG;dog\n", 'file: val_1.JPEG;cat.*"file-name,label"'),
        ('val_1.JPEG,cat\nval_2.JPEG,"dog\n', "labels.csv .*comma-separated values"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    touch(tmp_path, *FLAT[:2])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        labelled(str(tmp_path), str(tmp_path / "labels.csv"), ("cat", "dog", "sea cow"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(("dog", "sea cow", "dog"), ("dog", "sea cow")), (("10", "9", "1"), ("1", "9", "10"))],
)
def test_a_flat_training_folder_takes_its_classes_from_its_labels(tmp_path, labels, classes):
    touch(tmp_path / "train", *FLAT)
    touch(tmp_path / "val", *(f"{name}/x.png" for name in classes))
    (tmp_path / "labels.txt").write_text("".join(map("{} {}\n".format, FLAT, labels)))
    data = DataConfig(str(tmp_path), train_labels=str(tmp_path / "labels.txt"), cache="none")
    train = open_split(data, "train")
    assert class_names("folders", train) == classes
    found = train.records(classes)
    assert list(found.names) == FLAT and [classes[i] for i in found.labels] == list(labels)
    val = open_split(data, "val").records(classes)
    assert [f"{classes[label]}/x.png" for label in val.labels] == list(val.names)
    with pytest.raises(ValueError, match="3 images .*val_1.JPEG.*data.train_labels"):
        class_names("folders", open_split(dataclasses.replace(data, train_labels=None), "train"))


def test_circular_links_are_named(tmp_path):
    touch(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "c").symlink_to(tmp_path / "a")  # not circular: another class with the same images
    assert len(scan_class_folders(str(tmp_path), ("a", "b", "c"))) == 3
    for link, target, named in (("a/z", ".", "a/z/a"), ("b/deep", "b", "b/deep")):
        (tmp_path / link).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"/{named} links to a folder that contains it"):
            scan_class_folders(str(tmp_path), ("a", "b", "c"))
        (tmp_path / link).unlink()


def test_flat_folder_labels_that_are_names_and_numbers(tmp_path):
    """If the class names are numbers, labels are names, not indices."""
    touch(tmp_path, *FLAT)
    (tmp_path / "labels.txt").write_text("1\n2\n3\n")
    assert labelled(str(tmp_path), str(tmp_path / "labels.txt"), ("1", "2", "3")).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\n", "has 2 labels, but .* has 3 images"),
        ("cat\ndog\ncat\ndog\n", "has 4 labels"),
        ("1\n2\n3\n", "indices below 3: 3.*start at 1"),
        ("cat\n1\ndog\n", "neither class names .*: 1"),
        ("val_1.JPEG cat\nval_2.JPEG dog\n", "images without a line: val_3.JPEG"),
        ("d/val_1.JPEG cat\nd/val_2.JPEG dog\nd/val_3.JPEG cat\n", "d/val_1.JPEG.*such as 'val_1.JPEG'"),
        ("val_1.jpeg,cat\nval_2.jpeg,dog\nval_3.jpeg,cat\n", "without a label or file: val_1.jpeg,cat.*no space in"),
        ("my val_1.JPEG cat\nmy val_2.JPEG dog\nmy val_3.JPEG cat\n", "without a label or file: my, my, my"),
        ("val_1.JPEG cat\nval_2.JPEG dog\nval_3.JPEG\n", "lines without a label or file: val_3.JPEG"),
        ("val_1.JPEG cat\nval_2.JPEG dog\nval_3.JPEG cat\nval_4.JPEG cat\n", "lines .*: val_4.JPEG"),
        ("val_1.JPEG cat\nval_2.JPEG dog\nval_3.JPEG cat\nval_1.JPEG dog\n", "several lines: val_1.JPEG"),
        ("", "has 0 labels"),
    ],
)
def test_flat_folder_errors(tmp_path, text, message):
    touch(tmp_path, *FLAT)
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        labelled(str(tmp_path), str(tmp_path / "labels.txt"), ("cat", "dog", "sea cow"))


def test_flat_folder_missing_things(tmp_path):
    with pytest.raises(ValueError, match="data.val_labels is .*labels.txt', which does not exist"):
        open_split(DataConfig(str(tmp_path), val_labels=str(tmp_path / "labels.txt")), "val")
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="has no image"):
        labelled(str(tmp_path), str(tmp_path / "labels.txt"), ("cat", "dog"))
    with pytest.raises(ValueError, match="is not a folder"):
        labelled(str(tmp_path / "none"), str(tmp_path / "labels.txt"), ("cat", "dog"))
