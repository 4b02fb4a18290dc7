"""Archives, patterns, labels: which images they give, and an error with a name for everything else."""

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import formats
import pytest

from volo.config import DataConfig
from volo.data.pixels.decode import UnreadableImage
from volo.data.sources.archives import ArchiveSplit
from volo.data.sources.formats import open_split
from volo.data.sources.label_files import LabelsOption
from volo.data.sources.parquet import ParquetSplit
from volo.data.sources.ranges import fingerprint
from volo.data.sources.records import class_names, imagenet_classes
from volo.token_labels.store import label_key

CLASSES = ("a", "b")
FILES = {"a/x.jpg": b"1" * 700, "a/y.JPEG": b"", "b/x.jpg": b"3" * 512}


def records(*paths: Path, labels_file: str | None = None):
    return ArchiveSplit([str(path) for path in paths], "here", LabelsOption(file=labels_file)).records(CLASSES)


def test_a_tar_of_class_folders(tmp_path):
    others = {"b/notes.txt": b"?", "b/._x.jpg": b"resource", "./.hidden/y.jpg": b"?", "b/mask.cls.txt": b"?"}
    found = records(formats.write_tar(tmp_path / "all.tar", {**others, **FILES}))
    assert list(found.names) == list(FILES) and found.labels.tolist() == [0, 0, 1] and found.ignored == 4
    assert [found.read(i) for i in range(3)] == list(FILES.values())
    assert found.location(2) == f"{tmp_path}/all.tar: b/x.jpg"
    assert [label_key(name) for name in found.names] == ["a/x", "a/y", "b/x"]


@pytest.mark.parametrize("keep", [*range(0, 3584, 512), 700, 1535])
def test_a_truncated_archive_is_named(tmp_path, keep):
    """Also if it is cut between two members, which tarfile takes for the end."""
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{tmp_path}/all.tar (is|cannot)"):
        records(path)


@pytest.mark.parametrize("at", [0, 1536, 2048])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, at):
    path = formats.write_tar(tmp_path / "all.tar", FILES)
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xffdamaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="all.tar is (not a tar archive|damaged)"):
        records(path)


@pytest.mark.parametrize("inner", [False, True])
def test_data_after_the_end_mark_is_never_lost(tmp_path, inner):
    """An archive overwritten with zeros in part, and archives joined with cat; padding of any length is allowed."""
    content = formats.write_tar(tmp_path / "all.tar", FILES).read_bytes()
    assert len(content) == 10240

    def found(content: bytes) -> list[str]:
        if inner:  # followed by another one
            outer = formats.write_tar(tmp_path / "all.tar", {"a.tar": content, "b.tar": another})
            return [name for name in records(outer).names if name.startswith("a/")]
        (tmp_path / "all.tar").write_bytes(content)
        return list(records(tmp_path / "all.tar").names)

    another = formats.tar_bytes(tmp_path, {"z.jpg": b"z"})
    for padding in (b"", bytes(512), bytes(3 << 20)):
        assert len(found(content + padding)) == 3
    for continued in (content[:1536] + bytes(512) + content[2048:], content + content, content + bytes(2 << 20) + b"?"):
        with pytest.raises(ValueError, match="all.tar.* at byte [0-9,]+: .*tar --concatenate"):
            found(continued)


def test_an_inner_archive_without_end_mark_ends_with_its_size(tmp_path):
    """The next class follows it directly."""
    inner = {one: formats.tar_bytes(tmp_path, {f"{one}_1.jpg": b"1", f"{one}_2.jpg": b"2"})[:2048] for one in CLASSES}
    path = formats.write_tar(tmp_path / "all.tar", {f"{one}.tar": content for one, content in inner.items()})
    found = records(path)
    assert list(found.names) == ["a/a_1.jpg", "a/a_2.jpg", "b/b_1.jpg", "b/b_2.jpg"]
    assert [found.read(i) for i in range(4)] == [b"1", b"2"] * 2 and found.ignored == 0


def test_files_that_are_not_archives_are_named(tmp_path):
    (tmp_path / "page.tar").write_text("<html>404</html>" * 99)
    with tarfile.open(tmp_path / "small.tar", "w:gz"):
        pass
    for name in ("page.tar", "small.tar"):
        with pytest.raises(ValueError, match=f"{name} is not a tar archive"):
            records(tmp_path / name)
    with pytest.raises(ValueError, match="none.tar cannot be read: No such file or directory"):
        records(tmp_path / "none.tar")


def test_a_name_that_an_archive_holds_twice_is_refused(tmp_path):
    """tar -r makes such archives; the same name in another archive is another image."""
    path, other = formats.write_tar(tmp_path / "all.tar", FILES), formats.write_tar(tmp_path / "other.tar", FILES)
    assert list(records(path, other).names) == sorted([*FILES, *FILES])
    formats.write_tar(path, {"./a/x.jpg": b"newer"}, "a")
    with pytest.raises(ValueError, match=f"{path} holds a/x.jpg 2 times"):
        records(path, other)


def test_links_in_archives_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(b"1")
    os.link(tmp_path / "a/x.jpg", tmp_path / "a/y.jpg")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    with pytest.raises(ValueError, match="a/[xy].jpg is a link .*--hard-dereference"):
        records(tmp_path / "all.tar")


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "../../a.cls", "//x.jpg", "a/x\0y.jpg"])
def test_members_whose_names_leave_the_archive_are_refused(tmp_path, name, inner):
    path = write_pax(tmp_path / "all.tar", {**FILES, name: b"0"})
    if inner:
        path = formats.write_tar(tmp_path / "outer.tar", {"a.tar": path.read_bytes()})
    with pytest.raises(ValueError, match=f"{path}(: a.tar)? has the name .*leave|out of its folder") as error:
        records(path)
    assert repr(os.path.normpath(name)) in str(error.value)


def write_pax(path: Path, files: dict[str, bytes]) -> Path:
    """Names with a NUL only get into an archive by a header of their own."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("a/z.jpg" if "\0" in name else name)
            member.pax_headers = {"path": name} if "\0" in name else {}
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_names_that_stay_in_the_archive_are_read(tmp_path):
    """Also if they go there and back; other files may have any name, and are counted."""
    names = {"./a/../a/x.jpg": b"1", "b//y.jpg": b"2", "../notes.txt": b"3", "b/...jpg": b"4"}
    found = records(formats.write_tar(tmp_path / "all.tar", names))
    assert list(found.names) == ["a/x.jpg", "b/y.jpg"]


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("name", ["a/y.jpg", "a/x.cls", "a.tar"])
def test_members_that_are_no_regular_files_are_refused(tmp_path, kind, name):
    with tarfile.open(formats.write_tar(tmp_path / "all.tar", FILES), "a", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.type = kind
        archive.addfile(member)
    with pytest.raises(ValueError, match=f"all.tar: {name} is (a pipe or a device|stored as a sparse file)"):
        records(tmp_path / "all.tar")


def test_an_archive_may_have_a_name_that_is_not_utf8(tmp_path):
    assert len(records(formats.write_tar(tmp_path / os.fsdecode(b"\xe9.tar"), FILES))) == len(FILES)


def test_shards_that_are_no_regular_files_are_refused(tmp_path):
    formats.write_tar(tmp_path / "train/0.tar", FILES)
    (tmp_path / "train/1.tar").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="train/1.tar cannot be read: a pipe, a socket or a device"):
        open_split(DataConfig(str(tmp_path), cache="none"), "train").records(CLASSES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"c/x.jpg": b""}, "1 of 1 folders of here .*2 classes .*: c"),
        ({"x.jpg": b"", "a/x.jpg": b""}, "1 of 2 images of here .*data.train_labels.*: x.jpg"),
        ({"x.jpg": b"", "x.cls": b"0", "y.jpg": b""}, "1 of 2 images of here .*[.]cls.*: y.jpg"),
        ({"x.jpg": b"", "x.cls": b"2"}, ".cls files: labels .* below 2: 2"),
        ({"x.jpg": b"", "x.png": b"", "x.cls": b"0"}, "x.jpg and x.png"),
        ({"b/x.jpg": b"", "b/x.cls": b"0"}, "b/x.jpg has '0', which is 'a'. .*data.class_list"),
        ({"notes.txt": b""}, "here has no image"),
    ],
)
def test_images_without_a_class_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        records(formats.write_tar(tmp_path / "all.tar", files))


def test_webdataset_samples(tmp_path):
    """Classes by name or number, other files of a sample, a class without an image."""
    first = formats.write_tar(
        tmp_path / "0.tar", {"2.jpg": b"2", "2.cls": b"b\n", "2.mask.png": b"?", "2.json": b"{}", "9.cls": b"a"}
    )
    second = formats.write_tar(tmp_path / "1.tar", {"1.png": b"1", "1.cls": b"b", "3.jpg": b"3", "3.cls": b"a"})
    found = records(first, second)
    assert list(found.names) == ["a/3.jpg", "b/1.png", "b/2.jpg"] and found.labels.tolist() == [0, 1, 1]
    assert [found.read(i) for i in range(3)] == [b"3", b"1", b"2"]
    assert found.ignored == 3  # mask, json, and the class without an image


def test_numeric_class_names_are_matched_by_name(tmp_path):
    """If class 3 has no training image, the index of class 4 is 3: numbers must not be taken for indices."""

    def shard(name: str, *numbers: bytes) -> Path:
        files = {f"{i}.{end}": data for i, n in enumerate(numbers) for end, data in (("jpg", b""), ("cls", n))}
        return formats.write_tar(tmp_path / name, files)

    train = shard("train.tar", b"4", b"0", b"1", b"2")
    classes = class_names("folders", ArchiveSplit([str(train)], "here"))
    assert classes == ("0", "1", "2", "4")
    val = ArchiveSplit([str(shard("val.tar", b"1", b"4"))], "here")
    assert val.records(classes).labels.tolist() == [1, 3]
    for numbers in ((b"3",), (b"0", b"3")):
        with pytest.raises(ValueError, match="4 classes.*: 3[.] .*data.class_list"):
            ArchiveSplit([str(shard("val.tar", *numbers))], "here").records(classes)
    formats.write_parquet(tmp_path, "train", {"3/x.jpg": b"1", "0/y.jpg": b"2"}, ["0", "1", "2", "3"], named=False)
    data = DataConfig(str(tmp_path), cache="none")
    with pytest.raises(ValueError, match="4 classes.*: 3[.] .*data.class_list"):
        open_split(data, "train").records(classes)


def test_patterns(tmp_path):
    for number in range(3):
        formats.write_tar(tmp_path / f"s/train-{number:02d}.tar", {f"a/{number}.jpg": b""})

    def found(split: str, **options) -> list[str]:
        data = DataConfig(str(tmp_path / "s"), train_split=split, cache="none", **options)
        return list(open_split(data, "train").records(CLASSES).names)

    assert found("train-{00..01}.tar") == ["a/0.jpg", "a/1.jpg"] and found("train-0[12].tar") == ["a/1.jpg", "a/2.jpg"]
    assert found(".") == found("*.tar") == found(".", format="tar") == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    (tmp_path / "s/a").mkdir()
    (tmp_path / "s/a/x.jpg").touch()
    assert found(".") == ["a/x.jpg"]  # archives beside class folders are ignored
    assert found(".", format="tar") == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    with pytest.raises(ValueError, match="data.train_split: .*/val-[*].tar"):
        found("val-*.tar")
    with pytest.raises(ValueError, match="train-03.tar cannot be read: No such file"):
        found("train-{00..03}.tar")
    with pytest.raises(ValueError, match="data.train_split .*train-00.tar more than once"):
        found("train-{00,01,00}.tar")
    with pytest.raises(ValueError, match="data.format is 'folder', .*http://127.0.0.1:9/x.tar"):
        found("http://127.0.0.1:9/x.tar", format="folder")
    with pytest.raises(ValueError, match="nonsense://x.tar"):
        found("nonsense://x.tar")


@pytest.mark.parametrize("name", ["x[1]", "{a,b}", "what?", "*"])
def test_names_that_look_like_patterns(tmp_path, name):
    """An existing path is not a pattern, and patterns in data.train_split do not apply to data.root."""
    for number in range(2):
        formats.write_tar(tmp_path / f"{name}/train-{number}.tar", {f"a/{number}.jpg": b""})
        formats.write_tar(tmp_path / f"x1/train-{number}.tar", {f"b/{number}.jpg": b""})
    formats.write_tar(tmp_path / f"{name}.tar", {"a/2.jpg": b""})

    def found(root: Path, split: str) -> list[str]:
        data = DataConfig(str(root), train_split=split, cache="none")
        return list(open_split(data, "train").records(CLASSES).names)

    both = ["a/0.jpg", "a/1.jpg"]
    assert found(tmp_path, name) == both and found(tmp_path, f"{name}.tar") == ["a/2.jpg"]
    assert found(tmp_path / name, "train-*.tar") == found(tmp_path / name, "train-{0..1}.tar") == both
    assert found(tmp_path, f"{name}/train-*.tar") == found(tmp_path, f"{tmp_path}/{name}/train-?.tar") == both
    assert found(tmp_path / name, ".") == both and found(tmp_path / name, "train-1.tar") == ["a/1.jpg"]


def test_a_web_address_with_a_query_is_one_archive(tmp_path):
    """Object stores sign temporary addresses with a query."""
    formats.write_tar(tmp_path / "all.tar", {"a/0.jpg": b"0", "b/1.jpg": b"1"})
    with formats.serving(tmp_path) as url:
        address = f"{url}/all.tar?signature=a/b*c&expires=[60]"
        found = open_split(DataConfig(str(tmp_path), train_split=address, cache="none"), "train").records(CLASSES)
        assert list(found.names) == ["a/0.jpg", "b/1.jpg"] and found.read(1) == b"1"


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/x .*Install s3fs.*pip install s3fs"):
        fingerprint("s3://bucket/x")


def test_parquet_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "train-0.parquet").write_bytes(b"")
    data = DataConfig(str(tmp_path), cache="none")
    with pytest.raises(ValueError, match=f"data.train_split is 'train': {tmp_path} cannot be opened"):
        open_split(data, "train").records(CLASSES)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_split(data, "train").records(CLASSES)


def test_parquet_classes_are_matched_by_name(tmp_path):
    """Except the 1,000 descriptions in ImageNet on the Hub, which are matched by position."""
    synsets = imagenet_classes()
    described = [f"thing {i}" for i in range(1000)]
    files = {"thing 999/x.jpg": b"1", "thing 0/y.jpg": b"2"}

    def labels(names: list[str], classes: tuple[str, ...]) -> list[int]:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        chosen = {f"{name}/x.jpg": data for name, data in zip((names[-1], names[0]), files.values(), strict=True)}
        formats.write_parquet(tmp_path, "train", chosen, names)
        data = DataConfig(str(tmp_path), cache="none")
        return sorted(open_split(data, "train").records(classes).labels.tolist())

    assert labels(described, synsets) == [0, 999]
    assert labels(["cat", "ape"], ("ape", "bee", "cat")) == [0, 2]
    for names, classes, message in (
        (described[:999], synsets, "999 of its 999 classes .*1000 classes .*: thing 0, .*class_list"),
        ([*synsets[:999], "thing"], synsets, "1 of its 1000 classes .*: thing[.]"),
        (described, tuple(reversed(synsets)), "1000 of its 1000 classes"),
        (["ape", "dog", "eel"], ("ape", "bee", "cat"), "2 of its 3 classes .*3 classes .*: dog, eel"),
    ):
        with pytest.raises(ValueError, match=message):
            labels(names, classes)


def test_devkit_errors(tmp_path):
    names = ("ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG")
    val = formats.write_tar(tmp_path / "val.tar", dict.fromkeys(names, b""))
    kit = formats.write_devkit(tmp_path / formats.DEVKIT, list(CLASSES), ["a", "b"])
    with pytest.raises(ValueError, match="val_00000002.JPEG, .*ILSVRC2012_val_00000003"):
        records(val, labels_file=str(kit))
    val = formats.write_tar(tmp_path / "val.tar", {"ILSVRC2012_val_00000002.JPEG": b""})
    assert records(val, labels_file=str(kit)).labels.tolist() == [1]
    with tarfile.open(kit) as archive:
        archive.extractall(tmp_path / "kit", filter="data")
    assert records(val, labels_file=str(tmp_path / "kit")).labels.tolist() == [1]
    (tmp_path / "kit/ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="kit is not the development kit .*data/meta.mat"):
        records(val, labels_file=str(tmp_path / "kit"))
    (tmp_path / "kit/ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with pytest.raises(ValueError, match="kit has no data/meta.mat"):
        records(val, labels_file=str(tmp_path / "kit"))
    kit.write_bytes(kit.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        records(val, labels_file=str(kit))


def write_table(folder: Path, **columns) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    image = [{"bytes": b"1", "path": f"{i}.jpg"} for i in range(3)]
    table = {"image": image, "label": [0, 1, 0]} | columns
    folder.mkdir()
    table = pyarrow.table({name: values for name, values in table.items() if values is not None})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": None}, "no column label, only 'image'"),
        ({"label": [0, None, 1]}, "row 1 has the label None"),
        ({"label": [None] * 3}, "row 0 has the label None"),
        ({"label": [0.0, 1.0, 0.5]}, "row 0 has the label 0.0"),
        ({"label": [[0], [1], [0]]}, r"row 0 has the label \[0\]"),
    ],
)
def test_parquet_without_labels(tmp_path, monkeypatch, columns, message):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_table(tmp_path / "set", **columns)
    split = ParquetSplit(str(tmp_path / "set"), "train", "data.train_split", LabelsOption())
    with pytest.raises(ValueError, match=message) as info:
        split.records(tuple(split.found_classes()))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("image", [None, [None] * 3])
def test_parquet_without_images(tmp_path, monkeypatch, image):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_table(tmp_path / "set", image=image)
    found = ParquetSplit(str(tmp_path / "set"), "train", "data.train_split", LabelsOption()).records(("0", "1"))
    with pytest.raises(UnreadableImage, match=r"row 0: .* the row has no image"):
        found.read(0)


@pytest.mark.parametrize("name", ["a/z.jpg", "a/z.cls", "a.tar"])
@pytest.mark.parametrize("last", [True, False])
def test_a_size_beyond_the_end_of_the_archive(tmp_path, name, last):
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w") as archive:
        for one in ("a/x.jpg", name) if last else (name, "a/x.jpg"):
            member = tarfile.TarInfo(one)
            member.size = 7 << 40 if one == name else 0
            archive.addfile(member)
    with pytest.raises(ValueError, match=f"all.tar is damaged or truncated: {name} has 7,696,581,394,432 bytes"):
        records(path)


def test_a_sparse_member_is_refused_by_name(tmp_path):
    path = tmp_path / "all.tar"
    member = tarfile.TarInfo("a/x.jpg")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(7 << 40)}
    content = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
    member.size = len(content)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="all.tar: a/x.jpg is stored as a sparse file"):
        records(path)
