"""Every format gives the same names, order, labels, bytes and batches as the folder that it was made from."""

from collections.abc import Iterator
from pathlib import Path

import formats
import fsspec
import pytest
import torch
from programs import picture

from volo.config import AugmentConfig, DataConfig
from volo.data.dataset import Batch
from volo.data.loader import eval_loader, train_loader
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.formats import open_split
from volo.data.sources.records import ImageRecords, class_names

# The devkit numbers them in another order, and one name sorts between another folder and its files.
CLASSES = ["n01440764", "n01440764-b", "n02119789"]
COUNTS = {"train": 23, "val": 7}
TRANSFORM = TrainTransform(AugmentConfig(), (16, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for split, count in COUNTS.items():
        for i in range(count):
            one = CLASSES[i % 3 if i < 20 else 0]
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG" if split == "val" else f"{one}_{i}.JPEG"
            (root / split / one).mkdir(parents=True, exist_ok=True)
            picture("disc", i, (18 + i % 7, 15 + i % 5)).save(root / split / one / name, format="JPEG")
    return root


@pytest.fixture(scope="module")
def configs(folder, tmp_path_factory) -> Iterator[dict[str, DataConfig]]:
    """Yield the options that load the images of ``folder`` from every format."""
    root = tmp_path_factory.mktemp("formats")
    train, val = formats.files_of(folder / "train"), formats.files_of(folder / "val")

    formats.write_tar_of_tars(root / "official/ILSVRC2012_img_train.tar", train, root)
    formats.write_tar(
        root / "official/ILSVRC2012_img_val.tar", {name.split("/")[1]: val[name] for name in reversed(val)}
    )
    synset_of = {name.split("/")[1]: name.split("/")[0] for name in val}
    formats.write_devkit(root / "official" / formats.DEVKIT, CLASSES, [synset_of[name] for name in sorted(synset_of)])

    for split, files in (("train", train), ("val", val)):
        formats.write_tar(root / f"plain/{split}.tar", {f"./{name}": files[name] for name in reversed(files)})
        formats.write_shards(f"{root}/shards/{split}/%03d.tar", files, CLASSES)
        formats.write_shards(f"{root}/flat/my-{split}-%06d.tar", files, CLASSES, flat=True)
        hub_name = {"train": "train", "val": "validation"}[split]
        formats.write_parquet(root / "parquet", hub_name, files, CLASSES)
    memory = fsspec.filesystem("memory")
    for split in COUNTS:
        memory.put(f"{root}/shards/{split}/", f"/shards/{split}/", recursive=True)

    (root / "labels.txt").write_text("".join(f"{name} {synset}\n" for name, synset in synset_of.items()))
    shards = {"train_split": "train/{000..004}.tar", "val_split": "val/00{0..1}.tar"}
    with formats.serving(root) as url:
        yield {
            name: DataConfig(cache="none", **{"root": str(root / name), **options})
            for name, options in {
                "folder": {"root": str(folder)},
                "official": {},
                "official labels file": {
                    "root": str(root / "official"),
                    "val_labels": str(root / "labels.txt"),
                },
                "plain": {"train_split": "train.tar", "val_split": "val.tar"},
                "shards": {},
                "flat": {"train_split": "my-train-{000000..000004}.tar", "val_split": "my-val-*.tar"},
                "parquet": {},
                "file URL": {"root": f"file://{root}/shards", **shards},
                "memory": {"root": "memory://shards"},
                "http": {"root": f"{url}/shards", **shards},
            }.items()
        }


FORMATS = [
    "folder",
    "official",
    "official labels file",
    "plain",
    "shards",
    "flat",
    "parquet",
    "file URL",
    "memory",
    "http",
]


def load(data: DataConfig, split: str) -> ImageRecords:
    return open_split(data, split).records(tuple(CLASSES))


def known_as(name: str, data: DataConfig, split: str) -> str:
    """Return the name of an image of the folder in another format: without class folder if the archive has none."""
    flat = split == "val" and data.root.endswith("official")
    return name.split("/")[1] if flat else name


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("name", FORMATS)
def test_names_labels_and_bytes_are_those_of_the_folder(configs, folder, name, split):
    files = formats.files_of(folder / split)
    records = load(configs[name], split)
    path_of = {known_as(path, configs[name], split): path for path in files}
    assert list(records.names) == sorted(path_of) and len(records) == COUNTS[split]
    found = [path_of[n] for n in records.names]
    assert [records.read(i) for i in range(len(records))] == [files[path] for path in found]
    assert [CLASSES[label] for label in records.labels] == [path.split("/")[0] for path in found]


def same(a: Batch, b: Batch) -> bool:
    fields = ("images", "labels", "erase_boxes", "noise_seeds", "indices", "notes")
    return a.failures == b.failures and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


@pytest.mark.parametrize("name", FORMATS[1:])
def test_batches_are_those_of_the_folder(configs, name):
    """Training with a worker, from the start and the middle of an epoch; evaluation on one, two and three ranks."""
    plain, records = load(configs["folder"], "train"), load(configs[name], "train")
    options = dict(seed=5, global_batch=6, micro_batches=2)
    expected = train_loader(plain, TRANSFORM, **options)
    loader = train_loader(records, TRANSFORM, workers=1, **options)
    for epoch, start in ((0, 0), (1, 2)):
        batches = list(loader.epoch(epoch, start))
        assert len(batches) == 2 * (3 - start)
        assert all(map(same, batches, expected.epoch(epoch, start)))

    transform = EvalTransform((16, 24), 0.96, "bicubic")
    plain, records = load(configs["folder"], "val"), load(configs[name], "val")
    for ranks in (1, 2, 3):
        seen = []
        for rank in range(ranks):
            share = dict(batch_size=2, rank=rank, world_size=ranks)
            batches = list(eval_loader(records, transform, **share))
            if "official" not in name:  # its validation archive has no class folders, so another order
                assert all(map(same, batches, eval_loader(plain, transform, **share)))
            seen += [i for batch in batches for i in batch.indices.tolist()]
        assert sorted(seen) == list(range(COUNTS["val"]))


@pytest.mark.parametrize("name", FORMATS)
def test_classes_are_those_of_the_folder(configs, name):
    data = configs[name]
    assert class_names("folders", open_split(data, "train")) == (("0", "1", "2") if name == "flat" else tuple(CLASSES))


def test_a_flat_folder_takes_its_classes_from_the_devkit_beside_it(configs, folder, tmp_path):
    for name, content in formats.files_of(folder / "val").items():
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name.split("/")[1]).write_bytes(content)
    data = DataConfig(str(tmp_path), cache="none")
    with pytest.raises(ValueError, match="7 images of .*val_00000001.JPEG.*data.val_labels"):
        load(data, "val")
    (tmp_path / formats.DEVKIT).write_bytes((Path(configs["official"].root) / formats.DEVKIT).read_bytes())
    found, expected = load(data, "val"), load(configs["official"], "val")
    assert found.names == expected.names and found.labels.tolist() == expected.labels.tolist()
