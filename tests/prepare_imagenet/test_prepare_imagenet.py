"""scripts/prepare_imagenet.py on tiny archives with the official names: what it writes, and resuming after a stop."""

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import formats
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import DONE, FAILED, ROOT, USAGE, environment, picture, run

from volo.config import DataConfig
from volo.data.sources import archive_index
from volo.data.sources.archives import ArchiveSource
from volo.data.sources.formats import open_split
from volo.prepare_imagenet import verify
from volo.prepare_imagenet.options import ShardOptions, UnpackOptions
from volo.prepare_imagenet.shard import run_shard
from volo.prepare_imagenet.unpack import run_unpack
from volo.runtime.program import UsageError

SCRIPT = ROOT / "scripts/prepare_imagenet.py"
CLASSES = ("n01440764", "n01443537", "n02119789")
COUNTS = (11, 7)
EXPECT = ("--expect_train", COUNTS[0], "--expect_val", COUNTS[1])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Files of both splits by class/name: some beyond 40 pixels, one a PNG of that size, one no image at all."""
    made = {"train": {}, "val": {}}
    for split, count in zip(made, COUNTS, strict=True):
        for i in range(count):
            content = io.BytesIO()
            size = (60 + i, 33) if i % 3 == 1 else (40, 21 + i)
            picture("cross", i, size).save(content, "PNG" if i == 4 else "JPEG", quality=95)
            one = CLASSES[i % 3]
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG" if split == "val" else f"{one}_{i}.JPEG"
            made[split][f"{one}/{name}"] = b"no image" if (split, i) == ("train", 9) else content.getvalue()
    return made


@pytest.fixture
def source(images, tmp_path) -> Path:
    folder = tmp_path / "source"
    formats.write_tar_of_tars(folder / "ILSVRC2012_img_train.tar", images["train"], tmp_path)
    flat = {name.split("/")[1]: content for name, content in images["val"].items()}
    formats.write_tar(folder / "ILSVRC2012_img_val.tar", flat)
    truth = [name.split("/")[0] for name in sorted(images["val"], key=lambda name: name.split("/")[1])]
    formats.write_devkit(folder / formats.DEVKIT, list(CLASSES), truth)
    return folder


def prepare(command: str, source: Path, *words):
    cache = () if command == "verify" else ("--cache", source.parent / "cache")
    return run(SCRIPT, command, "--source", source, *cache, *words, cwd=source.parent)


def options_of(options_class: type, source: Path, output: Path, **changes):
    """Options to call a command in this process."""
    counts = {"expect_train": COUNTS[0], "expect_val": COUNTS[1]}
    return options_class(source=str(source), output=str(output), cache="none", **counts, **changes)


# ---------------------------------------------------------------------------------------------------------- verify


@pytest.mark.slow
def test_verify_finds_archives_that_differ(source):
    ended = prepare("verify", source)
    # The published checksums, as torchvision has them.
    ended.assert_failed(FAILED, "ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e")
    assert ended.out.count("DIFFERS") == 3


def test_verify_accepts_archives_with_the_published_checksums(source, monkeypatch, caplog):
    """The published checksums stand in for those of the tiny archives."""
    names = {split: name for split, (name, _) in verify.ARCHIVE_META.items()}
    sums = {split: (name, hashlib.md5((source / name).read_bytes()).hexdigest()) for split, name in names.items()}
    monkeypatch.setattr(verify, "ARCHIVE_META", sums)
    (source / names["devkit"]).unlink()
    with caplog.at_level("INFO", "volo"):
        assert verify.run_verify(str(source)) == DONE
    messages = [record.getMessage() for record in caplog.records]
    assert [line for line in messages if line.startswith("as published")] == messages[:2]
    assert "missing: ILSVRC2012_devkit_t12.tar.gz" in messages[2]

    with open(source / names["val"], "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=names["val"]):
        verify.run_verify(str(source))


def test_verify_needs_an_archive(tmp_path):
    prepare("verify", tmp_path / "none").assert_failed(USAGE, "--source", "ILSVRC2012_img_train.tar")


# ----------------------------------------------------------------------------------------------------------- index


@pytest.mark.slow
def test_after_indexing_training_need_not(source, images, monkeypatch):
    for file in source.iterdir():
        formats.settle(file)
    ended = prepare("index", source, *EXPECT).assert_done()
    assert "train 11 images, val 7 images, as expected" in ended.out
    assert f"--data.root {source}" in ended.out
    monkeypatch.setattr(archive_index, "_index_one", None)
    data = DataConfig(str(source), cache=str(source.parent / "cache"))
    records = open_split(data, "train").records(CLASSES)
    assert [records.read(i) for i in range(11)] == [images["train"][name] for name in sorted(images["train"])]


def test_counts_are_checked(source):
    prepare("index", source).assert_failed(FAILED, "train has 11 images, not 1,281,167; val has 7 images, not 50,000")
    ended = prepare("index", source, "--split", "val", "--expect_val", 8)
    ended.assert_failed(FAILED, "val has 7 images, not 8", "--expect_val")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("index", ("--split", "test"), "--split is test"),
        ("index", ("--devkit", "nothing.tar.gz"), "--devkit is 'nothing.tar.gz'"),
        ("index", ("--splits", "val"), "split"),
        ("index", ("--output", "out"), "--output"),
        ("unpack", (), "output"),
        ("shard", ("--output", "out", "--max_side", 3), "--max_side is 3; it should be 32 ... 65,536"),
        ("shard", ("--output", "out", "--max-side", 40), "max_side"),
        ("shard", ("--output", "out", "--images", 4), "images_per_shard"),
        ("fetch", (), "unpack"),
    ],
)
def test_wrong_usage(source, command, words, message):
    for file in source.iterdir():
        formats.settle(file)  # old enough for its listing to be cached, if it were listed
    before = sorted(source.parent.iterdir())
    prepare(command, source, *words).assert_failed(USAGE, message)
    assert sorted(source.parent.iterdir()) == before


def test_without_the_development_kit_the_validation_set_has_no_classes(source):
    (source / formats.DEVKIT).unlink()
    prepare("index", source, *EXPECT).assert_failed(USAGE, "7 of 7 images", "--devkit")
    (source / "ILSVRC2012_img_train.tar").unlink()
    prepare("index", source, *EXPECT).assert_failed(USAGE, "ILSVRC2012_img_val.tar")


# ---------------------------------------------------------------------------------------------------------- unpack


@pytest.mark.parametrize("command", ["unpack", "shard"])
def test_archives_are_not_written_over(source, command):
    before = sorted(source.iterdir())
    ended = prepare(command, source, "--output", source / "../source", *EXPECT)
    ended.assert_failed(USAGE, "--output", "--source")
    assert sorted(source.iterdir()) == before


def test_unpacked_archives_are_the_folders_they_were_made_of(source, images, tmp_path):
    ended = prepare("unpack", source, "--output", "out", *EXPECT).assert_done()
    assert "train 11 images, val 7 images" in ended.out
    for split, files in images.items():
        assert formats.files_of(tmp_path / "out" / split) == dict(sorted(files.items()))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare("unpack", source, "--output", "out", *EXPECT).assert_done()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    (tmp_path / "out/train/n01440764/n01440764_0.JPEG").unlink()
    ended = prepare("unpack", source, "--output", "out", *EXPECT)
    ended.assert_failed(FAILED, "out/train/n01440764 has 3 files and should have 4")
    (tmp_path / "out/train/mine").mkdir()
    ended = prepare("unpack", source, "--output", "out", *EXPECT)
    ended.assert_failed(USAGE, "out/train holds mine")


def flat_archive(folder: Path, names: list[str]) -> Path:
    """Write a training archive whose classes come from .cls files, one image each."""
    files = {}
    for number, name in enumerate(names):
        files |= {f"{number}.jpg": b"image", f"{number}.cls": name.encode("utf-8", "surrogateescape")}
    formats.write_tar(folder / "ILSVRC2012_img_train.tar", files)
    return folder


HOSTILE = ("../../x", "/proc/x", "..", ".", "", "a/b", ".hidden", "a\0b", "../out2", "a/../../x", "x/")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text("./ax\\\n\x1bü", max_size=6))
@example("../../x")
@example("a\0b")
@example("\x1b]0;x\x07")
def test_classes_of_an_archive_are_folders_of_the_output_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("drawn")
    classes = {name.strip(), "other"}
    source = flat_archive(folder / "source", [name, "other"])
    options = UnpackOptions(
        source=str(source), output=str(folder / "out"), cache="none", split="train", expect_train=2, expect_val=0
    )
    try:
        run_unpack(options)
    except UsageError as error:
        assert not (folder / "out").exists()
        assert "ILSVRC2012_img_train.tar" in str(error) and (repr(name.strip()) in str(error) or len(classes) == 1)
        assert "/" in name or name.strip()[:1] in ("", ".") or "\0" in name
    else:
        assert {path.name for path in (folder / "out/train").iterdir()} == classes
    assert {path.name for path in folder.iterdir()} <= {"source", "out"}


def test_keys_of_shards_lead_nowhere(tmp_path):
    """Also not in shards that are unpacked by tar."""
    source = flat_archive(tmp_path / "source", ["../../x", "other"])
    options = ShardOptions(
        source=str(source), output=str(tmp_path / "out"), cache="none", split="train", expect_train=2, expect_val=0
    )
    with pytest.raises(UsageError, match=r"ILSVRC2012_img_train.tar: .* has the name '../../x/0'"):
        run_shard(options)
    assert not (tmp_path / "out").exists()


class Interrupted:
    """Counts reads of archives, and interrupts one of them as Ctrl-C does."""

    def __init__(self, monkeypatch, at: int):
        self.reads, self.at = 0, at
        plain = ArchiveSource.read

        def read(source, index):
            self.reads += 1
            if self.reads == self.at:
                raise KeyboardInterrupt
            return plain(source, index)

        monkeypatch.setattr(ArchiveSource, "read", read)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 6, 11, 12, 18])
def test_unpacking_resumes_after_an_interruption(source, images, tmp_path, monkeypatch, at):
    reads = Interrupted(monkeypatch, at)
    options = options_of(UnpackOptions, source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_unpack(options)
    whole = {path.parent for path in (tmp_path / "out").glob("*/[!.]*/*")}
    kept = sum(len(list(folder.iterdir())) for folder in whole)
    reads.reads = 20
    assert run_unpack(options) == DONE and reads.reads == 20 + sum(COUNTS) - kept
    for split, files in images.items():
        assert formats.files_of(tmp_path / "out" / split) == dict(sorted(files.items()))


# ----------------------------------------------------------------------------------------------------------- shard

SMALL = {"max_side": 40, "quality": 80, "images_per_shard": 4, "workers": 1}
OPTIONS = ("--max_side", 40, "--images_per_shard", 4, "--output", "out", *EXPECT)


def test_shards_hold_every_image_and_the_log_what_changed(source, images, tmp_path):
    ended = prepare("shard", source, *OPTIONS, "--quality", 80, "--workers", 2).assert_done()
    for split, files in images.items():
        shards = sorted(str(path) for path in (tmp_path / "out" / split).glob("*.tar"))
        assert len(shards) == -(-len(files) // 4)
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        stored = {sample["__key__"]: sample for sample in samples}
        assert stored.keys() == {name.rsplit(".", 1)[0] for name in files} and len(samples) == len(files)
        resized = after = 0
        for name, content in files.items():
            sample = stored[name.rsplit(".", 1)[0]]
            assert CLASSES[int(sample["cls"])] == name.split("/")[0]
            after += len(sample["jpg"])
            if content == b"no image" or max(Image.open(io.BytesIO(content)).size) <= 40:
                assert sample["jpg"] == content
                continue
            resized += 1
            was, expected = Image.open(io.BytesIO(content)), io.BytesIO()
            size = (40, round(was.height * 40 / was.width))
            was.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(expected, "JPEG", quality=80)
            assert sample["jpg"] == expected.getvalue()
        before = sum(map(len, files.values()))
        message = f"{split}: {len(files)} images, {resized} ({100 * resized / len(files):.1f} %) resized; {before:,}"
        assert f"{message} bytes before, {after:,} after ({100 * after / before:.1f} %)" in ended.out
    assert "1 unreadable" in ended.out and "n01440764_9.JPEG" in ended.out
    assert " of 255 (" in ended.out
    data = DataConfig(str(tmp_path / "out"), cache="none")
    for split, files in images.items():
        records = open_split(data, split).records(CLASSES)
        assert [n.rsplit(".")[0] for n in records.names] == sorted(n.rsplit(".", 1)[0] for n in files)

    prepare("shard", source, *OPTIONS, "--quality", 70).assert_failed(USAGE, "quality was 80, is 70", "--output")
    again = prepare("shard", source, *OPTIONS, "--quality", 80).assert_done()
    assert "3 of 3 shards exist already" in again.out and again.out.splitlines()[-3:] == ended.out.splitlines()[-3:]


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5, 8, 18])
def test_sharding_resumes_after_an_interruption(source, tmp_path, monkeypatch, at):
    straight = options_of(ShardOptions, source, tmp_path / "straight", **SMALL)
    run_shard(straight)
    options = dataclasses.replace(straight, output=str(tmp_path / "out"))
    reads = Interrupted(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        run_shard(options)
    done = formats.files_of(tmp_path / "out")
    (tmp_path / "out/train/.train-000002.tar.0123.tmp").write_bytes(b"left by a killed run")
    run_shard(options)
    assert formats.files_of(tmp_path / "out") == formats.files_of(tmp_path / "straight")
    kept = sum(json.loads(data)["images"] for name, data in done.items() if name.split("/")[-1].startswith("."))
    assert reads.reads == at + sum(COUNTS) - kept


def test_shards_of_an_earlier_version_are_kept(source, tmp_path):
    """shards.json called images_per_shard "images"."""
    prepare("shard", source, *OPTIONS).assert_done()
    about = tmp_path / "out/shards.json"
    written = about.read_text()
    about.write_text(written.replace('"images_per_shard": 4', '"images": 4'))
    assert about.read_text() != written
    assert "3 of 3 shards exist already" in prepare("shard", source, *OPTIONS).assert_done().out
    assert about.read_text() == written
    about.write_text(written.replace('"images_per_shard": 4', '"images": 5'))
    prepare("shard", source, *OPTIONS).assert_failed(USAGE, "images_per_shard was 5, is 4")


def test_an_incomplete_shard_is_written_again(source, tmp_path, caplog):
    options = options_of(ShardOptions, source, tmp_path / "out", **SMALL)
    run_shard(options)
    done = formats.files_of(tmp_path / "out")
    (tmp_path / "out/train/train-000001.tar").write_bytes(done["train/train-000000.tar"][:1024] + bytes(1024))
    (tmp_path / "out/val/val-000000.tar").write_bytes(b"no tar")
    with caplog.at_level("WARNING", "volo"):
        run_shard(options)
    assert formats.files_of(tmp_path / "out") == done
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.args[0].name for record in warned] == ["train-000001.tar", "val-000000.tar"]


def test_images_that_share_a_key_are_refused_before_anything_is_written(source, images, tmp_path):
    twins = dict(images["train"])
    name = next(iter(twins))
    twins[name.replace(".JPEG", ".a.JPEG")] = twins[name.replace(".JPEG", "_a.JPEG")] = twins.pop(name)
    formats.write_tar_of_tars(source / "ILSVRC2012_img_train.tar", twins, tmp_path)
    words = (*OPTIONS, "--expect_train", COUNTS[0] + 1)
    prepare("shard", source, *words).assert_failed(USAGE, ".a.JPEG", "_a.JPEG")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_as_it_is(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    prepare("shard", source, *OPTIONS).assert_failed(USAGE, "--output out exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_help_needs_no_imports():
    for words in ((), ("shard",)):
        command = [sys.executable, "-X", "importtime", SCRIPT, *words, "--help"]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        assert "usage: prepare_imagenet.py" in ended.stdout and "torch" not in ended.stderr
