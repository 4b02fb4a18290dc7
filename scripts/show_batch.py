#!/usr/bin/env python
"""Draw a training batch as the network sees it, with its token labels, to check that labels and pixels agree.

    python scripts/show_batch.py --config configs/volo_d1_224.yaml --data.root /data/imagenet \\
        --token_label.root /data/imagenet-labels --output batch.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from volo.cli import build_parser, parse
from volo.config import Config


@dataclass(frozen=True)
class ShowBatchOptions:
    """What to draw.

    Args:
        output: PNG file to write.
        num_images: Number of images to draw.
        epoch: Epoch of the batch, from 0.
        step: Step of the batch within its epoch, from 0.
    """

    output: str = "batch.png"
    num_images: int = 8
    epoch: int = 0
    step: int = 0


def run(config: Config, options: ShowBatchOptions) -> int:
    """Draw the batch; return the exit code."""
    import torch

    from volo.build import load_splits, make_network, make_train_loader, open_token_labels
    from volo.engine.batch_layout import BatchLayout
    from volo.engine.learner import Learner
    from volo.engine.preview import batch_picture
    from volo.runtime.distributed import World
    from volo.runtime.files import write_atomic
    from volo.runtime.program import DONE, UsageError, checking_usage

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with checking_usage():
        layout = BatchLayout.of(config, world.size)
        splits = load_splits(config)
        learner = Learner(config, world, layout, make_network(config, world))
        labels = open_token_labels(config, splits, learner.grid)
        loader = make_train_loader(config, splits.train, world, layout, labels)
        if not 0 <= options.step < loader.steps_per_epoch:
            raise UsageError(
                f"--step is {options.step}; it should be 0 ... {loader.steps_per_epoch - 1}, the steps of an epoch"
            )
    png = batch_picture(learner, loader, splits.classes, options.epoch, options.step, options.num_images)
    if png is None:
        raise ValueError("all images of this step are unreadable; try another --step")
    write_atomic(Path(options.output), png)
    print(f"{options.output}: epoch {options.epoch}, step {options.step}")
    return DONE


if __name__ == "__main__":
    parser = build_parser("show_batch.py", "Draw a training batch of a recipe, with its token labels.")
    parser.add_class_arguments(ShowBatchOptions)
    config, values = parse(parser, sys.argv[1:])

    from volo.runtime.program import finish

    finish(lambda: run(config, ShowBatchOptions(**values)))
