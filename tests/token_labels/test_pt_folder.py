"""The published layout of token labels, read, and the ways in which files can be wrong."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_maps import GOOD, LABELS, assert_same, published, save

from volo.token_labels.opening import open_labels
from volo.token_labels.pt_folder import PublishedLabels, sample
from volo.token_labels.store import StoreHeader


def test_published_labels_are_read_as_they_are(tmp_path):
    published(tmp_path, LABELS)
    (tmp_path / "readme.txt").touch()
    (tmp_path / ".hidden.pt").touch()
    labels = open_labels(tmp_path)
    assert isinstance(labels, PublishedLabels)
    assert labels.header == StoreHeader("published", "center_crop", 2, None, None, 4)
    assert (len(labels), labels.ignored) == (4, 1)
    for opened in (labels, pickle.loads(pickle.dumps(labels))):
        found = opened.find(["cat/c3", "cat/c9", "cat/c0"])
        assert found.dtype == np.int64 and found.tolist() == [3, -1, 0]
        for key, entry in zip(LABELS, opened.find([*LABELS]), strict=True):
            assert opened.key(entry) == key
            assert_same(opened.read(int(entry)), LABELS[key])


def test_published_float32_and_odd_strides(tmp_path):
    both = torch.stack([torch.randn(5, 7, 3), torch.randint(0, 30000, (5, 7, 3)).float()])
    save(tmp_path / "a/x.pt", both.transpose(2, 3).requires_grad_())
    label = PublishedLabels(tmp_path).read(0)
    np.testing.assert_array_equal(label.scores, both[0].mT.half().numpy())
    np.testing.assert_array_equal(label.classes, both[1].mT.numpy())
    assert label.classes.dtype == np.int16


def test_published_names_with_dots(tmp_path):
    labels = published(tmp_path, {"n1/a.b": GOOD, "n1/a": GOOD, "n1/c": GOOD, "v1": GOOD})
    opened = open_labels(labels)
    entry = {opened.key(i): i for i in range(4)}
    assert opened.find(["n1/a.b"]).tolist() == [entry["n1/a.b"]]  # a file of the very name comes first
    assert opened.find(["n1/c.d.e", "n1/a"]).tolist() == [entry["n1/c"], entry["n1/a"]]
    assert opened.find(["v1.5/x", "n1/z.b"]).tolist() == [entry["v1"], -1]  # the first dot of "class/file"
    assert opened.find(["n1/c.d", "n1/c.d"]).tolist() == [entry["n1/c"]] * 2
    for two in (["n1/c.1", "n1/c.2"], ["n1/c", "n1/c.2"]):
        with pytest.raises(ValueError, match=r"n1/c.pt would be the label of 2 images \(n1/c.*first dot.*generate_to"):
            opened.find(["n1/a", *two])


def plane(value: float, dtype=torch.float16) -> torch.Tensor:
    both = torch.ones(2, 2, 3, 4, dtype=dtype)
    both[1, 1, 2, 3] = value
    return both


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scores": torch.ones(2, 5, 3, 4)}, "it holds a dict"),
        (torch.ones(5, 3, 4).half(), r"its shape is \[5, 3, 4\]"),
        (torch.ones(2, 5, 0, 4).half(), r"its shape is \[2, 5, 0, 4\]"),
        (torch.ones(2, 2, 3, 4).long(), "its values are torch.int64"),
        (torch.ones(2, 2, 3, 4).to_sparse(), "its values are torch.float32, torch.sparse_coo"),
        (plane(0.5), "does not hold class indices"),
        (plane(float("nan")), "does not hold class indices"),
        (plane(32768, torch.float32), "class index 32768 is above 32,767"),
        (plane(2050), "2050 in float16.* 2,048"),
        (plane(-1), r"class index -1, allowed is 0 \.\.\. 999"),
        (plane(1000), r"class index 1000, allowed is 0 \.\.\. 999"),
        (plane(0).flip(0) * torch.nan, "NaN|does not hold class"),
        (torch.ones(2, 2, 3, 4) * torch.tensor([1e5, 1.0]).view(2, 1, 1, 1), "NaN or beyond float16"),
        (torch.ones(2, 3, 3, 4).half(), r"scores \[3, 3, 4\].*should be \[2, height"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_files_with_other_content_are_refused(tmp_path, content, message):
    published(tmp_path, {"a/good": GOOD})
    path = save(tmp_path / "z/bad.pt", content)
    opened = PublishedLabels(tmp_path, num_classes=1000)
    opened.read(0)
    with pytest.raises(ValueError, match=message) as caught:
        opened.read(1)
    assert str(path) in str(caught.value) and "enerate" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["empty", "text", "cut", "pickle", "dangling"])
def test_files_that_cannot_be_loaded_are_named(tmp_path, how):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = published(tmp_path, {"a/x": GOOD}) / "a/x.pt"
    content = path.read_bytes()
    if how == "dangling":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": content[:400], "pickle": pickle.dumps(Exploit())}[how])
    with pytest.raises(ValueError, match="a/x.pt is not a token label: (not a file of one tensor|No such file)"):
        PublishedLabels(tmp_path).read(0)
    with pytest.raises(ValueError, match="a/x.pt"):
        _ = PublishedLabels(tmp_path).header
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["a/0", "a/3", "z/9"])
def test_one_damaged_file_does_not_affect_the_others(tmp_path, name):
    """A file of another top_k, or that is not a label map, first, in the middle or last."""
    published(tmp_path, {f"a/{i}": GOOD for i in range(8)})
    for content in (torch.ones(2, 3, 3, 4).half(), torch.ones(7)):
        path = save(tmp_path / f"{name}.pt", content)
        opened = PublishedLabels(tmp_path)
        assert opened.header.top_k == 2
        for entry in range(len(opened)):
            if opened.key(entry) != name:
                opened.read(entry)
                continue
            with pytest.raises(ValueError, match=f"^{path}"):
                opened.read(entry)


@given(count=st.integers(1, 2_000_000), most=st.integers(1, 1000))
def test_a_sample_is_spread_evenly(count, most):
    drawn = sample(count, most)
    assert drawn[0] == 0 and (most == 1 or drawn[-1] == count - 1)
    assert len(drawn) == min(count, most) == len(set(drawn))
    assert max(np.diff(drawn), default=1) - min(np.diff(drawn), default=1) <= 1


def test_a_label_file_that_is_a_pipe_or_a_device_is_not_read(tmp_path):
    published(tmp_path, LABELS)
    os.mkfifo(tmp_path / "cat/pipe.pt")
    (tmp_path / "cat/zero.pt").symlink_to("/dev/zero")  # it never ends
    labels = open_labels(tmp_path)
    for entry in labels.find(["cat/pipe", "cat/zero"]).tolist():
        with pytest.raises(ValueError, match="is not a token label: a pipe, a socket or a device"):
            labels.read(entry)
