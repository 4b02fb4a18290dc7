"""What `scripts/benchmark/model.py loader` does: images a second a core, beside the loaders this one replaces.

The contenders run in this process on one thread, in turn over the same few images, so that what slows the machine
slows them all; a ratio is the median of the rounds' own. The clock counts the time of the core: what a busy machine or
a slow disk makes them wait is left out (but by workers, where it is the clock on the wall). What is timed ends with a
uint8 batch on the host: normalisation and erasing follow on the device, here as with timm's loader.

- ours: the batches of a training run; order published with labels from a packed store, order timm without.
- ours, Pillow: the same with augment.backend pillow.
- published way: the order of the published token-label loader in timm's and Pillow's own operations, the label map of
  each image from a .pt file, flipped and warped as there. Its dense targets, which it builds in the workers too, are
  left out.
- timm: create_loader with the same augmentation, up to the collated batch.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from output import cpu_name, print_table, show_progress
from timm.data import ImageDataset, create_loader

from volo.config import AugmentConfig
from volo.data.dataset import EvalImages, TrainImages
from volo.data.loader import train_loader
from volo.data.pixels.decode import read_image, read_pixels
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.records import ImageRecords, has_image_suffix
from volo.runtime.rng import generator, torch_seed
from volo.token_labels.published import warp
from volo.token_labels.source import LabelSource
from volo.token_labels.store import TokenLabelMap, label_key
from volo.token_labels.writer import StoreWriter

OURS, PILLOW, PUBLISHED, TIMM = "ours", "ours, Pillow", "published way", "timm"
CLASSES, MAP_SIDE, TOP_K = 1000, 18, 5  # of the published labels
CROP_PCT = 0.96

Run = Callable[[Sequence[int], int], None]  # of the places of a batch and the epoch


def main(words: list[str]) -> None:
    """Measure what the command line ``words`` asks for, print it and write it to the file of --json."""
    args = parse(words)
    torch.set_num_threads(1)
    records = find_images(args.data, args.images)
    machine = f"one thread of {cpu_name()}"
    title = f"loader: {len(records)} images of {args.data}, {args.img_size} px, batch {args.batch}, {machine}"
    print(title)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(records, args, Path(folder))
        rows = bench.compare()
        print_table(rows)
        stages = bench.stages()
        print()
        print_table(stages)
        by_workers = bench.by_workers()
    print()
    print_table(by_workers)
    notes = [cores_line(row, args.target) for row in rows if row["who"] == OURS]
    print("\n" + "\n".join(notes))
    if args.json:
        result = {"title": title, "rows": rows + stages + by_workers, "notes": notes}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="model.py loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="any folder of images, with or without folders in it")
    parser.add_argument("--images", type=int, default=200, help="how many of them are read (default: 200)")
    parser.add_argument("--img-size", type=int, default=224, help="side of the output in pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=20, help="images a batch (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="times each goes through the images (default: 5)")
    parser.add_argument("--workers", type=int, nargs="*", help="numbers of workers to try (default: 1, 2, 4 ... cores)")
    parser.add_argument("--geometry", choices=["published", "aligned"], default="published", help="of the label maps")
    parser.add_argument("--target", type=float, default=16000, help="images a second to feed (default: 16000)")
    parser.add_argument("--json", help="write the result to this file too")
    args = parser.parse_args(words)
    if not os.path.isdir(args.data):
        parser.error(f"--data {args.data} is not a folder")
    for name in ("images", "img_size", "batch", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    return args


def find_images(folder: str, most: int) -> ImageRecords:
    """List up to ``most`` images below a folder, spread over all that are there."""
    names = sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, files in os.walk(folder, followlinks=True)
        for name in files
        if has_image_suffix(name)
    )
    if not names:
        raise SystemExit(f"--data {folder} holds no image")
    names = [names[i] for i in np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)]
    source = FolderSource(folder, PackedNames.of([name.replace(os.sep, "/") for name in names]))
    labels = np.zeros(len(names), dtype=np.int64)
    return ImageRecords(source, labels, tuple(f"class {i}" for i in range(CLASSES)))


@dataclass
class Bench:
    """The contenders, and the clock."""

    records: ImageRecords
    args: argparse.Namespace
    folder: Path

    def __post_init__(self):
        self.image_hw = (self.args.img_size,) * 2
        self.recipe = AugmentConfig(order="published")
        self.labels = write_labels(self.records, self.folder)
        self.source = LabelSource(
            str(self.folder / "store"),
            self.records.names,
            self.records.classes,
            (self.args.img_size // 16,) * 2,
            self.args.geometry,
        )

    # ---- side by side

    def compare(self) -> list[dict]:
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
        for number in range(self.args.rounds + 1):  # the first is warmup
            spent = dict.fromkeys(contenders, 0.0)
            for start in range(0, len(self.records), self.args.batch):
                batch = range(start, min(start + self.args.batch, len(self.records)))
                for key, run in contenders.items():
                    begin = time.thread_time()
                    run(batch, number)
                    spent[key] += time.thread_time() - begin
            for key in contenders if number else ():
                seconds[key].append(spent[key] / len(self.records))
            show_progress(number + 1, self.args.rounds + 1)
        return [row(what, who, seconds[what, who], seconds[what, OURS]) for what, who in contenders]

    def training(self, config: AugmentConfig, labels: LabelSource | None = None) -> Run:
        images = TrainImages(self.records, TrainTransform(config, self.image_hw), 0, "fail", "ignore", labels)
        return lambda batch, epoch: images.collate([images[epoch, index] for index in batch])

    def evaluation(self, backend: str) -> Run:
        transform = EvalTransform(self.image_hw, CROP_PCT, "bicubic", backend)
        images = EvalImages(self.records, transform, "ignore")
        return lambda batch, epoch: images.collate([images[index] for index in batch])

    def published(self, batch: Sequence[int], epoch: int) -> None:
        transform = TrainTransform(replace(self.recipe, backend="pillow"), self.image_hw)
        samples = []
        for index in batch:
            image, _ = read_image(self.records.read(index), self.records.location(index))
            label = torch.load(self.labels[index]).float()  # [2, 5, H, W]
            plan = transform.draw(generator(0, "augment", epoch, index), *image.size)
            samples.append((transform.apply(image, plan), warped(label, plan)))
        torch.stack([torch.from_numpy(pixels) for pixels, _ in samples])
        torch.stack([label for _, label in samples])

    def timm(self, **options) -> Run:
        files = [self.records.location(index) for index in range(len(self.records))]
        dataset = ImageDataset("", reader=Files(files))
        loader = create_loader(
            dataset,
            (3, *self.image_hw),
            self.args.batch,
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
            re_prob=self.recipe.erase_prob if options["is_training"] else 0.0,
            **options,
        )
        # What its workers do; what PrefetchLoader adds is done on the device.
        collate_batch = loader.loader.collate_fn
        return lambda batch, epoch: collate_batch([drawn_again(dataset, index) for index in batch])

    # ---- ours, in parts

    def stages(self) -> list[dict]:
        """Milliseconds an image of each part of the token-label recipe."""
        transform, grid = TrainTransform(self.recipe, self.image_hw), self.image_hw
        decode = read_pixels if transform.backend.native else read_image
        spent: dict[str, list[float]] = {}
        for epoch in range(self.args.rounds + 1):
            times = dict.fromkeys(("read", "header", "draw", "decode and pixels", "labels", "collate"), 0.0)
            images = TrainImages(self.records, transform, 0, "fail", "ignore", self.source)
            for index in range(len(self.records)):
                marks = [time.thread_time()]
                data, name = self.records.read(index), self.records.location(index)
                marks.append(time.thread_time())
                image, _ = decode(data, name)
                marks.append(time.thread_time())
                size = (image.height, image.width)
                torch_seed(0, "erase", epoch, index)
                plan = transform.draw(generator(0, "augment", epoch, index), size[1], size[0])
                marks.append(time.thread_time())
                transform.apply(image, plan)
                marks.append(time.thread_time())
                self.source.transformed(index, plan, size, grid)
                marks.append(time.thread_time())
                for stage, begin, end in zip(times, marks, marks[1:], strict=False):
                    times[stage] += end - begin
            for start in range(0, len(self.records), self.args.batch):
                some = range(start, min(start + self.args.batch, len(self.records)))
                samples = [images[epoch, index] for index in some]
                begin = time.thread_time()
                images.collate(samples)
                times["collate"] += time.thread_time() - begin
            for stage, value in times.items():
                spent.setdefault(stage, []).append(value / len(self.records))
        return [
            {"what": "token-label recipe, ours", "stage": stage, "ms an image": round(1000 * median(values[1:]), 3)}
            for stage, values in spent.items()
        ]

    def by_workers(self) -> list[dict]:
        """Images a second of the token-label recipe as a run has them, by the number of workers."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        tried = self.args.workers
        if tried is None:
            tried = sorted({min(2**i, cores) for i in range(cores.bit_length() + 1)})
        rows = []
        for workers in tried:
            loader = train_loader(
                self.records,
                TrainTransform(self.recipe, self.image_hw),
                seed=0,
                global_batch=min(self.args.batch, len(self.records)),
                workers=workers,
                sidecar=self.source,
            )
            for _ in loader.epoch(0):  # the workers start, and the files come into memory
                pass
            rates = [self._rate(loader, epoch) for epoch in range(1, self.args.rounds + 1)]
            rows.append({"what": "token-label recipe, ours", "workers": workers, "images/s": round(median(rates), 1)})
        return rows

    def _rate(self, loader, epoch: int) -> float:
        begin = time.perf_counter()
        count = sum(len(batch) for batch in loader.epoch(epoch))
        return count / (time.perf_counter() - begin)


def drawn_again(dataset: ImageDataset, index: int):
    """Return a sample; one draw in a thousand, to posterize to no bits, this Pillow refuses."""
    try:
        return dataset[index]
    except ValueError:
        return drawn_again(dataset, index)


class Files:
    """Image files as timm's datasets read them."""

    def __init__(self, files: list[str]):
        self.files = files

    def __getitem__(self, index: int):
        return open(self.files[index], "rb"), 0

    def __len__(self) -> int:
        return len(self.files)


def write_labels(records: ImageRecords, folder: Path) -> list[Path]:
    """Write a label map an image, drawn at random, into a store and as .pt files; return the latter's paths."""
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


def warped(label: torch.Tensor, plan) -> torch.Tensor:
    """Flip and warp a label map [2, 5, H, W] as the published loader does, and give it the plane of the crop."""
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
        "images/s a core": round(median(rates), 1),
        "quartiles": f"{low:.1f} - {high:.1f}",
        "ms an image": round(1000 * median(seconds), 3),
        "time of ours": round(median(a / b for a, b in zip(seconds, ours, strict=True)), 2),
    }


def cores_line(row: dict, target: float) -> str:
    rate = row["images/s a core"]
    return f"{row['what']}: {target:,.0f} images/s would take {target / rate:.0f} cores like this one"
