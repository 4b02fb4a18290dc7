"""The loaders that scripts/benchmark/loader.py compares, on one thread of this process."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

import numpy as np
import torch
from output import show_progress
from timm.data import ImageDataset, create_loader

from volo.config import AugmentConfig
from volo.data.dataset import EvalImages, TrainImages
from volo.data.pixels.decode import read_header
from volo.data.pixels.transforms import EvalTransform, Plan, TrainTransform
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.records import ImageRecords, has_image_suffix
from volo.runtime.rng import generator
from volo.token_labels.published import warp
from volo.token_labels.source import LabelSource
from volo.token_labels.store import TokenLabelMap, label_key
from volo.token_labels.writer import StoreWriter

if TYPE_CHECKING:
    from loader import LoaderBenchmarkOptions

OURS, PILLOW, PUBLISHED, TIMM = "ours", "ours, Pillow", "published way", "timm"
CLASSES, MAP_SIDE, TOP_K = 1000, 18, 5  # of the published labels
CROP_PCT = 0.96

LoadBatch = Callable[[Sequence[int], int], object]  # from the indices of a batch and the epoch


def find_images(folder: str, most: int) -> ImageRecords:
    """List up to ``most`` images below a folder, evenly spread over all of them.

    Raises ValueError if it is not a folder, or has no image.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--images is {folder}, which is not a folder")
    names = sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, files in os.walk(folder, followlinks=True)
        for name in files
        if has_image_suffix(name)
    )
    if not names:
        raise ValueError(f"--images is {folder}, which holds no images")
    names = [names[i] for i in np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)]
    source = FolderSource(folder, PackedNames.of([name.replace(os.sep, "/") for name in names]))
    labels = np.zeros(len(names), dtype=np.int64)
    return ImageRecords(source, labels, tuple(f"class {i}" for i in range(CLASSES)))


@dataclass
class LoaderBench:
    """The images, their labels, and the loaders to compare.

    Args:
        records: The images.
        options: The command line.
        folder: Temporary folder for the labels.
    """

    records: ImageRecords
    options: "LoaderBenchmarkOptions"
    folder: Path

    def __post_init__(self):
        self.image_hw = (self.options.img_size, self.options.img_size)
        self.recipe = AugmentConfig(order="published")
        self.labels = write_labels(self.records, self.folder)
        self.source = LabelSource(
            str(self.folder / "store"),
            self.records.names,
            self.records.classes,
            (self.options.img_size // 16, self.options.img_size // 16),
            self.options.geometry,
        )

    def compare(self) -> list[dict]:
        """Time every contender; return the rows of the table."""
        plain = AugmentConfig()
        groups = {
            "token-label recipe": {
                OURS: self.training(self.recipe, self.source),
                PILLOW: self.training(replace(self.recipe, backend="pillow"), self.source),
                PUBLISHED: self.published,
            },
            "no labels": {
                OURS: self.training(plain),
                PILLOW: self.training(replace(plain, backend="pillow")),
                TIMM: self.timm(is_training=True, auto_augment=plain.rand_augment, interpolation="random"),
            },
            "evaluation": {
                OURS: self.evaluation("auto"),
                PILLOW: self.evaluation("pillow"),
                TIMM: self.timm(is_training=False, interpolation="bicubic", crop_pct=CROP_PCT),
            },
        }
        contenders = {(what, who): run for what, group in groups.items() for who, run in group.items()}
        seconds = {key: [] for key in contenders}
        for number in range(self.options.rounds + 1):  # the first is warmup
            spent = dict.fromkeys(contenders, 0.0)
            for start in range(0, len(self.records), self.options.batch_size):
                batch = range(start, min(start + self.options.batch_size, len(self.records)))
                for key, run in contenders.items():
                    begin = time.thread_time()
                    run(batch, number)
                    spent[key] += time.thread_time() - begin
            for key in contenders if number else ():
                seconds[key].append(spent[key] / len(self.records))
            show_progress(number + 1, self.options.rounds + 1)
        return [row(what, who, seconds[what, who], seconds[what, OURS]) for what, who in contenders]

    def training(self, config: AugmentConfig, labels: LabelSource | None = None) -> LoadBatch:
        images = TrainImages(self.records, TrainTransform(config, self.image_hw), 0, "fail", "ignore", labels)
        return lambda batch, epoch: images.collate([images[epoch, index] for index in batch])

    def evaluation(self, backend: str) -> LoadBatch:
        transform = EvalTransform(self.image_hw, CROP_PCT, "bicubic", backend)
        images = EvalImages(self.records, transform, "ignore")
        return lambda batch, epoch: images.collate([images[index] for index in batch])

    def published(self, batch: Sequence[int], epoch: int) -> None:
        transform = TrainTransform(replace(self.recipe, backend="pillow"), self.image_hw)
        samples = []
        for index in batch:
            image = read_header(self.records.read(index), self.records.location(index))
            label = torch.load(self.labels[index]).float()  # [2, 5, H, W]
            plan = transform.draw(generator(0, "augment", epoch, index), image.width, image.height)
            samples.append((transform.apply(image.decode(None), plan), warped(label, plan)))
        torch.stack([torch.from_numpy(pixels) for pixels, _ in samples])
        torch.stack([label for _, label in samples])

    def timm(self, **options) -> LoadBatch:
        files = [self.records.location(index) for index in range(len(self.records))]
        dataset = ImageDataset("", reader=Files(files))
        loader = create_loader(
            dataset,
            (3, *self.image_hw),
            self.options.batch_size,
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
            re_prob=self.recipe.erase_prob if options["is_training"] else 0.0,
            **options,
        )
        # The work of its workers; PrefetchLoader adds what is done on the device.
        collate_batch = loader.loader.collate_fn
        return lambda batch, epoch: collate_batch([drawn_again(dataset, index) for index in batch])


def drawn_again(dataset: ImageDataset, index: int):
    """Return a sample, drawn again if Pillow refuses it: one draw in a thousand posterizes to 0 bits."""
    try:
        return dataset[index]
    except ValueError:
        return drawn_again(dataset, index)


class Files:
    """Image files, in the form that timm's datasets read them."""

    def __init__(self, files: list[str]):
        self.files = files

    def __getitem__(self, index: int):
        return open(self.files[index], "rb"), 0

    def __len__(self) -> int:
        return len(self.files)


def write_labels(records: ImageRecords, folder: Path) -> list[Path]:
    """Write a random label map per image, into a store and as .pt files; return the paths of the latter."""
    rng, paths, shape = np.random.default_rng(0), [], (TOP_K, MAP_SIDE, MAP_SIDE)
    header = {"teacher": "random", "covers": "center_crop", "top_k": TOP_K, "num_classes": CLASSES}
    with StoreWriter(folder / "store", **header) as store:
        for index, name in enumerate(records.names):
            scores = rng.normal(8, 2, shape).astype(np.float16)
            classes = rng.integers(0, CLASSES, shape).astype(np.int16)
            store.add(label_key(name), TokenLabelMap(scores, classes))
            paths.append(folder / f"{index}.pt")
            torch.save(torch.from_numpy(np.stack([scores, classes.astype(np.float16)])), paths[-1])
    return paths


def warped(label: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Flip and warp a label map [2, 5, H, W] as the published loader does, and append the plane of the crop."""
    label = label.flip(3) if plan.hflip else label
    planes = label.numpy()
    for op in plan.ops:
        if op.resample is not None:
            planes = np.stack(warp(*planes, op))
    return torch.from_numpy(np.concatenate([planes, np.zeros_like(planes[:1])]))


def row(what: str, who: str, seconds: list[float], ours: list[float]) -> dict:
    rates = [1 / s for s in seconds]
    low, _, high = quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
    return {
        "what": what,
        "who": who,
        "images/s per core": round(median(rates), 1),
        "quartiles": f"{low:.1f} - {high:.1f}",
        "ms per image": round(1000 * median(seconds), 3),
        "time of ours": round(median(a / b for a, b in zip(seconds, ours, strict=True)), 2),
    }
