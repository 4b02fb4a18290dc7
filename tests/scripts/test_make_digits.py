"""scripts/make_digits.py: the images, and a folder that is complete or not there."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import programs
import pytest
from PIL import Image
from programs import ROOT
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def make_digits():
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "scripts/make_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "new" / "digits"
    ended = programs.run(ROOT / "scripts/make_digits.py", "--output", output, cwd=output.parents[1])
    assert "1,797" in ended.assert_done().out
    return output


def images_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/*/*.png")}


def test_every_digit_is_written_once_in_its_class(digits):
    target = load_digits().target
    labels = {}
    for path in digits.glob("*/*/*.png"):
        assert path.stem not in labels, "in train and in val"
        labels[path.stem] = int(path.parent.name)
    assert labels == {f"{i:04d}": int(label) for i, label in enumerate(target)}
    assert len(labels) == 1797
    assert [p.name for p in digits.parent.iterdir()] == ["digits"]


def test_a_fifth_of_every_digit_is_held_out(digits):
    for label, count in enumerate(np.bincount(load_digits().target)):
        held_out = len(list((digits / "val" / str(label)).iterdir()))
        assert abs(held_out - count / 5) <= 0.5


def test_digit_images_show_the_scans(digits):
    scans = load_digits().images
    for path in [*digits.glob("val/3/*.png")][:5] + [*digits.glob("train/8/*.png")][:5]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
            pixels = np.asarray(image, dtype=float)
        cells = pixels.reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16  # what each of the 8x8 values became
        assert np.abs(cells - scans[int(path.stem)]).mean() < 1.2
        assert np.corrcoef(cells.ravel(), scans[int(path.stem)].ravel())[0, 1] > 0.98


def test_digits_are_the_same_every_time(digits, make_digits, tmp_path):
    assert make_digits.make_digits(tmp_path / "again") is True
    assert images_of(tmp_path / "again") == images_of(digits)


def test_complete_digits_are_left_alone(digits, make_digits, capsys):
    before = {p: p.stat().st_mtime_ns for p in digits.rglob("*")}
    assert make_digits.run(make_digits.DigitsOptions(str(digits))) == 0
    assert "exist already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in digits.rglob("*")} == before


def test_other_files_in_place_of_the_digits_are_an_error_and_stay(digits, make_digits, tmp_path):
    output = tmp_path / "digits"
    shutil.copytree(digits, output)
    next(output.glob("val/0/*.png")).unlink()
    with pytest.raises(ValueError, match="found 1,796"):
        make_digits.make_digits(output)
    assert make_digits.count_images(output) == 1796
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=str(tmp_path / "file")):
        make_digits.make_digits(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_partial_digits(make_digits, tmp_path, monkeypatch):
    real_save = Image.Image.save

    def save(self, path, *args):
        if path.stem == "0100":
            raise OSError(28, "No space left on device")
        real_save(self, path, *args)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        make_digits.make_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_write_one_complete_folder(digits, make_digits, tmp_path, monkeypatch):
    write = make_digits.write_images

    def write_and_be_overtaken(folder):
        write(folder)
        shutil.copytree(digits, tmp_path / "digits")

    monkeypatch.setattr(make_digits, "write_images", write_and_be_overtaken)
    assert make_digits.make_digits(tmp_path / "digits") is False
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
    assert make_digits.count_images(tmp_path / "digits") == 1797
