#!/usr/bin/env python
"""Measure the images per second of one core, side by side with the loaders that this package replaces.

    python scripts/benchmark/loader.py --images imagenet/val

The contenders run in this process on one thread, in turn over the same few images, so that whatever slows the machine
slows all of them; a ratio is the median of the rounds' own ratios. The clock counts CPU time, without waiting for a
busy machine or a slow disk, except in the table by number of workers, which has wall-clock time. Timing ends with a
uint8 batch on the host: normalisation and erasing follow on the device, as with timm's loader.

- ours: the batches of a training run; order published with labels from a packed store, order timm without labels.
- ours, Pillow: the same with augment.backend pillow.
- published way: the order of the published token-label loader in timm's and Pillow's own operations, with the label map
  of each image read from a .pt file, flipped and warped as published. The dense targets, which the published code
  also builds in the workers, are left out.
- timm: create_loader with the same augmentation, up to the collated batch.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volo.cli import parse_options


@dataclass(frozen=True)
class LoaderBenchmarkOptions:
    """What to measure.

    Args:
        images: Any folder of images, sorted into classes or not.
        num_images: Number of images to read.
        img_size: Side of the output in pixels.
        batch_size: Images per batch.
        rounds: Number of times that each contender loads the images.
        workers: Numbers of workers to try, as [1,2,4]; by default 1, 2, 4 ... cores.
        geometry: As token_label.geometry of the training.
        target: Images per second needed; the result says how many cores that takes.
        json: File to write the result to, too.
    """

    images: str
    num_images: int = 200
    img_size: int = 224
    batch_size: int = 20
    rounds: int = 5
    workers: list[int] | None = None
    geometry: Literal["published", "aligned"] = "published"
    target: float = 16000
    json: str | None = None

    def __post_init__(self):
        for name in ("num_images", "img_size", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it should be 1 or more")


def run_loader_benchmark(options: LoaderBenchmarkOptions) -> int:
    """Measure, print and save the result; return the exit code."""
    import torch
    from contenders import OURS, LoaderBench, find_images
    from loader_parts import by_workers, stages
    from output import cpu_name, print_table, save_json

    from volo.runtime.program import DONE, checking_usage

    torch.set_num_threads(1)
    with checking_usage():
        records = find_images(options.images, options.num_images)
    title = (
        f"loader: {len(records)} images of {options.images}, {options.img_size} px, batch {options.batch_size}, "
        f"one thread of {cpu_name()}"
    )
    print(title)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        bench = LoaderBench(records, options, Path(folder))
        for measure in (LoaderBench.compare, stages, by_workers):
            tables.append(measure(bench))
            print_table(tables[-1])
            print()
    notes = [cores_line(row, options.target) for row in tables[0] if row["who"] == OURS]
    print("\n".join(notes))
    save_json(options.json, title, sum(tables, []), notes)
    return DONE


def cores_line(row: dict, target: float) -> str:
    rate = row["images/s per core"]
    return f"{row['what']}: {target:,.0f} images/s would take {target / rate:.0f} cores like this one"


if __name__ == "__main__":
    options = parse_options(
        LoaderBenchmarkOptions,
        sys.argv[1:],
        prog="loader.py",
        usage="--images FOLDER [options]",
        description=__doc__.splitlines()[0],
    )

    # Slow imports come after the options are known to be valid.
    from volo.runtime.program import finish

    finish(lambda: run_loader_benchmark(options))
