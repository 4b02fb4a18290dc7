"""Opening token labels of either layout, and checking that they belong to a data set."""

import json
import pickle
from pathlib import Path

import pytest
from label_maps import GOOD, LABELS, published, with_class, write_store

from volo.token_labels.opening import check_orientation, match_images, open_labels
from volo.token_labels.store import TokenLabelStore


def edit_header(path: Path, **changes) -> None:
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps({k: v for k, v in (header | changes).items() if v != "gone"}))


def test_the_orientation_of_a_store_must_match_the_training(packed):
    path = write_store(packed.parent / "turned", LABELS, exif="apply")
    for made, other in ((path, "ignore"), (packed, "apply")):
        check_orientation(TokenLabelStore(made), TokenLabelStore(made).header.exif)
        with pytest.raises(ValueError, match=rf"{made.name}: .* data.exif is '{other}'.*--exif {other}$"):
            check_orientation(TokenLabelStore(made), other)
    edit_header(path, exif="gone")  # as before it was recorded
    assert TokenLabelStore(path).header.exif == "ignore"


def test_the_published_layout_counts_as_exif_ignore(tmp_path):
    labels = open_labels(published(tmp_path, {"a/x": GOOD}))
    check_orientation(labels, "ignore")
    with pytest.raises(ValueError, match="--data.exif ignore.*pack_token_labels.py --exif apply"):
        check_orientation(labels, "apply")


def test_folders_without_labels(tmp_path):
    with pytest.raises(ValueError, match="holds no token labels"):
        open_labels(tmp_path)
    with pytest.raises(ValueError, match="none is not a folder"):
        open_labels(tmp_path / "none")


def test_the_layout_is_detected_by_content(packed):
    assert isinstance(open_labels(str(packed)), TokenLabelStore)
    published(packed, {"a/x": GOOD})  # a stray file does not make a store a folder of labels
    assert isinstance(open_labels(packed), TokenLabelStore)
    (packed / "header.json").unlink()
    with pytest.raises(ValueError, match="is not a store.*packing was interrupted"):
        open_labels(packed)


NAMES = tuple("abcdefghij")


def test_each_image_is_matched_with_its_entry(tmp_path):
    opened = TokenLabelStore(write_store(tmp_path / "labels", LABELS, classes=NAMES))
    keys = ["cat/c2", "cat/c0"]
    for classes in (NAMES, list(NAMES), None):
        assert match_images(opened, keys, 10, classes).tolist() == [2, 0]


def test_missing_labels_are_listed(packed):
    keys = [*LABELS, *(f"dog/d{i:02}" for i in range(1234))]
    with pytest.raises(ValueError, match="no label for 1,234 of 1,238 images: dog/d00, .*dog/d09 and 1,224 more") as e:
        match_images(TokenLabelStore(packed), keys, 10, None)
    assert "dog/d10" not in str(e.value) and "names like 'cat/c0'" in str(e.value)
    with pytest.raises(ValueError, match="no label for 1 of 1 images: x. "):
        match_images(TokenLabelStore(packed), ["x"], 10, None)


def test_other_classes_are_refused(tmp_path):
    opened = TokenLabelStore(write_store(tmp_path / "labels", LABELS, classes=NAMES))
    with pytest.raises(ValueError, match="labels: the teacher a teacher had 10 classes.* 1,000"):
        match_images(opened, [*LABELS], 1000, None)
    with pytest.raises(ValueError, match="class 8 is 'i', but 'j'"):
        match_images(opened, [*LABELS], 10, (*NAMES[:8], "j", "i"))


def test_images_with_the_same_key_are_refused(packed):
    with pytest.raises(ValueError, match="1 names belong to several images.*: cat/c1. Rename"):
        match_images(TokenLabelStore(packed), ["cat/c1", "cat/c2", "cat/c1"], 10, None)


def test_published_labels_are_checked_against_the_classes_of_the_data_set(tmp_path):
    opened = open_labels(published(tmp_path, {"a/x": with_class(9)}))
    opened.read(0)
    assert match_images(opened, ["a/x"], 9, None).tolist() == [0]
    assert opened.header.num_classes == 9
    for labels in (opened, pickle.loads(pickle.dumps(opened))):
        with pytest.raises(ValueError, match=r"a/x.pt: class index 9, allowed is 0 \.\.\. 8"):
            labels.read(0)
