"""scripts/prepare_imagenet.py on tiny archives of the official names: what it writes, and going on after a stop."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import formats
import pytest
import webdataset
from PIL import Image
from programs import DONE, FAILED, ROOT, USAGE, environment, picture, run

from volo.config import DataConfig
from volo.data.sources import archive_index
from volo.data.sources.archives import ArchiveSource
from volo.data.sources.formats import open_split
from volo.data.sources.listing_cache import ListingCache
from volo.prepare_imagenet.official import MD5, ImageNetFiles
from volo.prepare_imagenet.shard import ShardOptions, run_shard
from volo.prepare_imagenet.unpack import run_unpack
from volo.prepare_imagenet.verify import md5_of

SCRIPT = ROOT / "scripts/prepare_imagenet.py"
CLASSES = ("n01440764", "n01443537", "n02119789")
COUNTS = (11, 7)
EXPECT = ("--expect", *COUNTS)


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


def prepare(command: str, source: Path, *words, **options):
    cwd = source.parent
    return run(SCRIPT, command, "--source", source, "--cache", cwd / "cache", *words, cwd=cwd, **options)


# ---------------------------------------------------------------------------------------------------------- verify


def test_verify_knows_the_official_checksums(source):
    ended = prepare("verify", source)
    ended.assert_failed(FAILED, "ILSVRC2012_img_train.tar", MD5["ILSVRC2012_img_train.tar"], "Fetch it again")
    assert ended.out.count("DIFFERS") == 3


def test_verify_takes_checksums(source):
    given = [f"{name}={hashlib.md5((source / name).read_bytes()).hexdigest().upper()}" for name in MD5]
    words = [word for text in given for word in ("--md5", text)]
    ended = prepare("verify", source, *words).assert_done()
    assert ended.out.count("as published") == 3 and "3 files are whole" in ended.out
    (source / formats.DEVKIT).unlink()
    ended = prepare("verify", source, *words[:4]).assert_done()
    assert "2 files are whole; not there: ILSVRC2012_devkit_t12.tar.gz" in ended.out


def test_a_checksum_is_computed_again_where_the_file_changed(tmp_path, monkeypatch):
    file = tmp_path / "a.tar"
    listing_cache = ListingCache(tmp_path / "cache")
    for content in (b"one", b"two!"):
        file.write_bytes(content)
        formats.settle(file)
        assert md5_of(file, listing_cache) == hashlib.md5(content).hexdigest()
    expected = hashlib.md5(b"two!").hexdigest()
    monkeypatch.setattr(hashlib, "md5", None)  # and only there
    assert md5_of(file, listing_cache) == expected


# ----------------------------------------------------------------------------------------------------------- index


def test_after_indexing_training_need_not(source, images, monkeypatch):
    for file in source.iterdir():
        formats.settle(file)
    ended = prepare("index", source, *EXPECT).assert_done()
    assert "train 11 images, val 7 images, as many as there are to be" in ended.out
    assert f"--data.root {source}" in ended.out
    monkeypatch.setattr(archive_index, "_go_through", None)
    data = DataConfig(str(source), cache=str(source.parent / "cache"))
    records = open_split(data, "train").records(CLASSES)
    assert [records.read(i) for i in range(11)] == [images["train"][name] for name in sorted(images["train"])]


def test_counts_are_checked(source):
    prepare("index", source).assert_failed(FAILED, "train has 11 images, not 1,281,167; val has 7 images, not 50,000")
    ended = prepare("index", source, "--splits", "val", "--expect", 8)
    ended.assert_failed(FAILED, "val has 7 images, not 8", "--expect")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--expect", 3), "--expect has 1 counts for 2 splits"),
        (("--splits", "test"), "invalid choice"),
        (("--devkit", "nothing.tar.gz"), "--devkit is 'nothing.tar.gz', which is not a file"),
    ],
)
def test_wrong_usage(source, words, told):
    ended = prepare("index", source, *words)
    assert ended.code == USAGE and told in ended.err


def test_without_the_development_kit_the_validation_set_has_no_classes(source):
    (source / formats.DEVKIT).unlink()
    prepare("index", source, *EXPECT).assert_failed(USAGE, "7 of 7 images", "--devkit")
    (source / "ILSVRC2012_img_train.tar").unlink()
    prepare("index", source, *EXPECT).assert_failed(USAGE, "has no such folder", "ILSVRC2012_img_val.tar")


# ---------------------------------------------------------------------------------------------------------- unpack


@pytest.mark.parametrize("command", ["unpack", "shard"])
def test_archives_are_not_written_over(source, command):
    before = sorted(source.iterdir())
    ended = prepare(command, source, "--output", source / "../source", *EXPECT)
    assert ended.code == USAGE and "is --source; name another folder" in ended.err
    assert sorted(source.iterdir()) == before


def test_unpacked_archives_are_the_folders_they_were_made_of(source, images, tmp_path):
    ended = prepare("unpack", source, "--output", "out", *EXPECT).assert_done()
    assert "as many as there are to be" in ended.out
    for split, files in images.items():
        assert formats.files_of(tmp_path / "out" / split) == dict(sorted(files.items()))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare("unpack", source, "--output", "out", *EXPECT).assert_done()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    (tmp_path / "out/train/n01440764/n01440764_0.JPEG").unlink()
    ended = prepare("unpack", source, "--output", "out", *EXPECT)
    ended.assert_failed(FAILED, "out/train/n01440764 has 3 files and should have 4; remove it and run again")
    (tmp_path / "out/train/mine").mkdir()
    ended = prepare("unpack", source, "--output", "out", *EXPECT)
    ended.assert_failed(USAGE, "holds mine, which is no class")


class Interrupted:
    """Reads of archives that stop at one of them, once, as Ctrl-C does; counts them."""

    def __init__(self, monkeypatch, at: int):
        self.reads, self.at = 0, at
        plain = ArchiveSource.read

        def read(source, index):
            self.reads += 1
            if self.reads == self.at:
                raise KeyboardInterrupt
            return plain(source, index)

        monkeypatch.setattr(ArchiveSource, "read", read)


@pytest.mark.parametrize("at", [1, 6, 11, 12, 18])
def test_unpacking_goes_on_after_an_interruption(source, images, tmp_path, monkeypatch, at):
    reads = Interrupted(monkeypatch, at)
    words = ImageNetFiles(str(source), expect=COUNTS, cache="none"), str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_unpack(*words)
    whole = {path.parent for path in (tmp_path / "out").glob("*/[!.]*/*")}
    kept = sum(len(list(folder.iterdir())) for folder in whole)
    reads.reads = 20
    assert run_unpack(*words) == DONE and reads.reads == 20 + sum(COUNTS) - kept
    for split, files in images.items():
        assert formats.files_of(tmp_path / "out" / split) == dict(sorted(files.items()))


# ----------------------------------------------------------------------------------------------------------- shard

OPTIONS = ("--max-side", 40, "--images", 4, "--output", "out", *EXPECT)


def test_shards_hold_every_image_and_the_words_what_changed(source, images, tmp_path):
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
        told = f"{split}: {len(files)} images, {resized} ({100 * resized / len(files):.1f} %) made smaller; {before:,}"
        assert f"{told} bytes before, {after:,} after ({100 * after / before:.1f} %)" in ended.out
    assert "1 cannot be read and stay as they are: cannot read" in ended.out and "n01440764_9.JPEG" in ended.out
    assert " of 255 (" in ended.out
    data = DataConfig(str(tmp_path / "out"), cache="none")
    for split, files in images.items():
        records = open_split(data, split).records(CLASSES)
        assert [n.rsplit(".")[0] for n in records.names] == sorted(n.rsplit(".", 1)[0] for n in files)

    prepare("shard", source, *OPTIONS, "--quality", 70).assert_failed(USAGE, "quality was 80, is 70", "--output")
    again = prepare("shard", source, *OPTIONS, "--quality", 80).assert_done()
    assert "3 of 3 shards are there already" in again.out and again.out.splitlines()[-3:] == ended.out.splitlines()[-3:]


@pytest.mark.parametrize("at", [1, 5, 8, 18])
def test_sharding_goes_on_after_an_interruption(source, tmp_path, monkeypatch, at):
    def contents(folder: str) -> dict[str, bytes]:
        return {name: data for name, data in formats.files_of(tmp_path / folder).items() if ".partial" not in name}

    words = ImageNetFiles(str(source), expect=COUNTS, cache="none"), ShardOptions(40, 80, 4)
    run_shard(words[0], str(tmp_path / "straight"), words[1])
    reads = Interrupted(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        run_shard(words[0], str(tmp_path / "out"), words[1])
    done = contents("out")
    run_shard(words[0], str(tmp_path / "out"), words[1])
    assert contents("out") == contents("straight")
    kept = sum(json.loads(data)["images"] for name, data in done.items() if name.split("/")[-1].startswith("."))
    assert reads.reads == at + sum(COUNTS) - kept


def test_a_shard_that_is_not_whole_is_written_again(source, tmp_path, caplog):
    words = ImageNetFiles(str(source), expect=COUNTS, cache="none"), str(tmp_path / "out"), ShardOptions(40, 80, 4)
    run_shard(*words)
    done = formats.files_of(tmp_path / "out")
    (tmp_path / "out/train/train-000001.tar").write_bytes(done["train/train-000000.tar"][:1024] + bytes(1024))
    (tmp_path / "out/val/val-000000.tar").write_bytes(b"no tar")
    with caplog.at_level("WARNING", "volo"):
        run_shard(*words)
    assert formats.files_of(tmp_path / "out") == done
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage().split(": ")[0].split("/")[-1] for record in warned] == [
        "train-000001.tar has 0 images and not 4",
        "val-000000.tar has 0 images and not 4",
    ]


def test_images_of_one_key_are_refused_before_anything_is_written(source, images, tmp_path):
    twins = dict(images["train"])
    name = next(iter(twins))
    twins[name.replace(".JPEG", ".a.JPEG")] = twins[name.replace(".JPEG", "_a.JPEG")] = twins.pop(name)
    formats.write_tar_of_tars(source / "ILSVRC2012_img_train.tar", twins, tmp_path)
    words = ("--max-side", 40, "--output", "out", "--expect", COUNTS[0] + 1, COUNTS[1])
    prepare("shard", source, *words).assert_failed(USAGE, ".a.JPEG", "_a.JPEG", "rename one of them")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    prepare("shard", source, *OPTIONS).assert_failed(USAGE, "out exists already; it is not touched")
    prepare("shard", source, *OPTIONS, "--max-side", 3).assert_failed(USAGE, "--max-side is 3; it is in [32, 65536]")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_help_needs_no_imports():
    for words in ((), ("shard",)):
        command = [sys.executable, "-X", "importtime", SCRIPT, *words, "--help"]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        assert "exit codes" in ended.stdout and "torch" not in ended.stderr
