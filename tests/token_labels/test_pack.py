"""scripts/pack_token_labels.py: the store it makes of a folder of label files, and its exit codes.

Most tests call its body; those about the command line, exit codes and signals run the program.
"""

import contextlib
import logging
import os
import signal
from pathlib import Path

import formats
import numpy as np
import programs
import pytest
import torch
from programs import FAILED, ROOT, USAGE

from volo.data.sources.records import imagenet_classes
from volo.runtime.program import UsageError
from volo.token_labels.opening import open_labels
from volo.token_labels.pack import PackOptions, run_packing
from volo.token_labels.store import TokenLabelStore

SCRIPT = ROOT / "scripts" / "pack_token_labels.py"


@pytest.fixture(autouse=True)
def quiet_logger():
    yield
    logger = logging.getLogger("volo")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def label(seed: int, h: int = 3, w: int = 4, num_classes: int = 1000) -> torch.Tensor:
    """A label file's tensor, float16 [2, 5, h, w]."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, num_classes, (5, h, w), generator=rng)
    return torch.stack([torch.randn(5, h, w, generator=rng), classes.float()]).half()


def save(root: Path, labels: dict[str, torch.Tensor]) -> Path:
    for stem, tensor in labels.items():
        path = root / f"{stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensor, path)
    return root


N = imagenet_classes()[:3]
LABELS = {f"{N[i % 3]}/n{i % 3}_{i}": label(i, 3 + i % 2, 4) for i in range(12)}


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "labels", LABELS)


def pack(source: Path, **options) -> TokenLabelStore:
    output = source.parent / "store"
    assert run_packing(PackOptions(str(source), str(output), **options)) == 0
    return TokenLabelStore(output)


def assert_holds(store: TokenLabelStore, labels: dict[str, torch.Tensor]) -> None:
    assert len(store) == len(labels)
    for entry, (key, tensor) in zip(store.find([*labels]).tolist(), labels.items(), strict=True):
        assert entry >= 0, key
        scores, classes = store.read(entry)
        np.testing.assert_array_equal(scores, tensor[0].numpy())
        np.testing.assert_array_equal(classes, tensor[1].numpy())


# ------------------------------------------------------------------------------------------------ what is packed


def test_published_labels_are_packed(source, capsys):
    (source / "readme.txt").touch()
    store = pack(source)
    assert_holds(store, LABELS)
    store.verify_checksums()
    header = store.header
    assert (header.teacher, header.covers, header.top_k, header.num_classes) == ("published", "center_crop", 5, 1000)
    assert header.classes == imagenet_classes()
    out = capsys.readouterr().out
    size = sum(file.stat().st_size for file in store.path.iterdir())
    assert f"store: 12 entries, maps 3x4 (6), 4x4 (6), {size:,} bytes in 7 files" in out
    assert "1 files of other kinds" in out
    assert "packing  step 12/12" in out and "ETA" in out


def test_labels_of_another_data_set(tmp_path):
    labels = {f"deep/er/x{i}": label(i, num_classes=7) for i in range(3)} | {"top": label(9, num_classes=7)}
    names = tmp_path / "classes.txt"
    names.write_text("\n".join("abcdefg"))
    store = pack(
        save(tmp_path / "labels", labels),
        teacher="mine",
        covers="whole_image",
        exif="apply",
        class_list=str(names),
        num_classes=7,
    )
    assert store.header.exif == "apply"
    assert_holds(store, labels)
    assert (store.header.teacher, store.header.covers, store.header.classes) == ("mine", "whole_image", (*"abcdefg",))


def test_a_number_of_classes_without_names(tmp_path):
    store = pack(save(tmp_path / "labels", {"a/x": label(0, num_classes=7)}), num_classes=7)
    assert (store.header.num_classes, store.header.classes) == (7, None)


def test_images_give_the_keys_if_file_names_were_cut(tmp_path, capsys):
    """The published code calls the label of n1/a.b.JPEG n1/a.pt; our key of that image is n1/a.b."""
    source = save(tmp_path / "labels", {f"{N[1]}/a": label(0), f"{N[1]}/c": label(1), f"{N[1]}/spare": label(2)})
    for name in (f"{N[1]}/a.b.JPEG", f"{N[1]}/c.png", f"{N[1]}/notes.txt", ".hidden.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    store = pack(source, images=str(tmp_path / "images"))
    assert_holds(store, {f"{N[1]}/a.b": label(0), f"{N[1]}/c": label(1), f"{N[1]}/spare": label(2)})
    assert "2 images have a label; 1 labels" in capsys.readouterr().out


def test_images_in_an_archive(source, tmp_path, capsys):
    """WebDataset shards whose keys have no folder: the class list tells what folder an image would lie in."""
    files = {f"n1_{i}.{suffix}": b"1" for i in (1, 4) for suffix in ("jpg", "cls")}
    archive = formats.write_tar(tmp_path / "images.tar", files)
    assert_holds(pack(source, images=str(archive), cache="none"), LABELS)
    assert "2 images have a label; 10 labels" in capsys.readouterr().out
    formats.write_tar(archive, files | {"n1_2.jpg": b"", "n1_2.cls": b"2"})
    with pytest.raises(UsageError, match=f"no label for 1 of 3 images: {N[2]}/n1_2"):
        pack(source, images=str(archive), cache="none", overwrite=True)
    (tmp_path / "few.txt").write_text("only\nthese\n")
    with pytest.raises(UsageError, match="images.tar, .cls files: .* nor indices below 2: 2"):
        pack(source, images=str(archive), cache="none", class_list=str(tmp_path / "few.txt"), overwrite=True)


# ------------------------------------------------------------------------------------------------ what is refused


def test_images_without_a_label_are_refused_before_any_work(source, tmp_path):
    images = tmp_path / "images"
    (images / N[0]).mkdir(parents=True)
    for i in range(13):
        (images / N[0] / f"n0_{i}.JPEG").touch()
    with pytest.raises(UsageError, match=f"no label for 9 of 13 images: {N[0]}/n0_1, "):
        pack(source, images=str(images))
    with pytest.raises(UsageError, match="--images is .*none'"):
        pack(source, images=str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"has no image \(.jpg"):
        pack(source, images=str(source))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_list": "imagnet"}, "--class_list is 'imagnet'; it takes \"imagenet\" or a text file"),
        ({"class_list": "imagenet", "num_classes": 10}, "--num_classes is 10, but --class_list imagenet names 1,000"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 40000}, "1 ... 32,768"),
        ({"num_classes": 4}, r"top_k is 5, allowed is 1 \.\.\. 4"),
    ],
)
def test_wrong_options(source, options, message):
    with pytest.raises(UsageError, match=message):
        pack(source, **options)
    assert [p.name for p in source.parent.iterdir()] == ["labels"]


def test_an_existing_store_is_replaced_only_when_asked(source):
    pack(source)
    save(source, {"new/x": label(77)})
    with pytest.raises(UsageError, match="store exists already; .*--overwrite true"):
        pack(source)
    assert_holds(open_labels(source.parent / "store"), LABELS)
    assert_holds(pack(source, overwrite=True), LABELS | {"new/x": label(77)})
    with pytest.raises(UsageError, match="labels exists, is not a store"):
        run_packing(PackOptions(str(source), str(source), overwrite=True))


@pytest.mark.parametrize("stem", ["a/first", f"{N[2]}/zlast"])
def test_a_wrong_label_file_is_named_and_nothing_is_left(source, stem):
    save(source, {stem: torch.zeros(2, 5, 3)})
    with pytest.raises(ValueError, match=rf"{stem}.pt is not a token label: its shape is \[2, 5, 3\]"):
        pack(source)
    assert [p.name for p in source.parent.iterdir()] == ["labels"]


def test_a_full_disk_is_a_plain_failure(source, monkeypatch):
    import volo.token_labels.writer as writer

    real = writer._HashedFile.write

    def write(self, data):
        if self._file.name.endswith("index.bin"):
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(writer._HashedFile, "write", write)
    with pytest.raises(ValueError, match="store could not be written.*No space left"):
        pack(source)
    assert [p.name for p in source.parent.iterdir()] == ["labels"]


# ------------------------------------------------------------------------------------------------ the program


def test_command_line_mistakes(tmp_path):
    for words, message in (
        ([], "source, output"),
        (["--source", "x", "--output", "y", "--covers", "crop"], "crop"),
        (["--source", "x", "--output", "y", "--over", "true"], "--over"),
    ):
        programs.run(SCRIPT, *words, cwd=tmp_path).assert_failed(USAGE, message)


def test_exit_codes(source, tmp_path):
    words = ("--output", tmp_path / "store", "--source")
    programs.run(SCRIPT, *words, "none", cwd=tmp_path).assert_failed(USAGE, f"{tmp_path}/none is not a folder")
    save(source, {f"{N[1]}/bad": label(0) * torch.nan})
    programs.run(SCRIPT, *words, source, cwd=tmp_path).assert_failed(FAILED, f"{source}/{N[1]}/bad.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["labels"]


STUCK = f"{N[1]}/n1_10"


@pytest.fixture
def stuck(source):
    """A program that waits in the middle: one of its label files is a pipe that nobody writes to."""
    (source / f"{STUCK}.pt").unlink()
    os.mkfifo(source / f"{STUCK}.pt")
    program = programs.start(SCRIPT, "--source", source, "--output", "store", cwd=source.parent, waits_for_pipes=True)
    program.follow("packing  step 5/12")  # four files of n0, and n1/n1_1
    yield program
    with contextlib.suppress(ProcessLookupError):
        os.kill(program.pids[0], signal.SIGKILL)


def test_a_killed_program_leaves_nothing_that_opens(source, stuck, capsys):
    parent = source.parent
    with pytest.raises(UsageError, match="another process is writing"):
        pack(source)
    os.kill(stuck.pids[0], signal.SIGKILL)
    assert stuck.finish()[0].code == -signal.SIGKILL
    left = [p for p in parent.iterdir() if p != source]
    assert [p.name for p in left] == [".store.partial"]
    for path in (*left, parent / "store"):
        with pytest.raises(ValueError, match="is not a (store|folder)"):
            open_labels(path)

    (source / f"{STUCK}.pt").unlink()
    save(source, {STUCK: LABELS[STUCK]})
    assert_holds(pack(source), LABELS)
    assert "bytes of an interrupted packing" in capsys.readouterr().out
    assert {p.name for p in parent.iterdir()} == {"labels", "store"}


def test_an_interrupted_program_cleans_up(source, stuck):
    os.kill(stuck.pids[0], signal.SIGINT)
    stuck.finish()[0].assert_failed(FAILED, "interrupted")
    assert [p.name for p in source.parent.iterdir()] == ["labels"]


def test_the_program_in_another_folder(source, tmp_path):
    (tmp_path / "images" / N[2]).mkdir(parents=True)
    (tmp_path / "images" / N[2] / "n2_2.JPEG").touch()
    words = ["--source", "labels", "--output", "new/store", "--teacher", "x", "--covers", "whole_image"]
    words += ["--class_list", "imagenet", "--images", "images", "--overwrite", "true"]
    ended = programs.run(SCRIPT, *words, cwd=tmp_path).assert_done()
    assert ended.err == ""
    output = tmp_path / "new" / "store"
    assert ended.out.splitlines()[-1].startswith(f"{output}: 12 entries, maps 3x4 (6), 4x4 (6), ")
    store = open_labels(output)
    assert_holds(store, LABELS)
    assert (store.header.teacher, store.header.covers) == ("x", "whole_image")
