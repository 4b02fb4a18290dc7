#!/usr/bin/env python
"""Draw a training batch as the network gets it, with its token labels: whether labels and pixels agree.

    python scripts/show_batch.py --config configs/volo_d1_224.yaml --data.root /data/imagenet \\
        --token_label.root /data/imagenet-labels --output batch.png
"""

import sys
from pathlib import Path

from volo.cli import build_parser, parse


def main() -> None:
    parser = build_parser("show_batch.py", "Draw a training batch of a recipe, with its token labels.")
    parser.add_argument("--output", type=str, default="batch.png", help="The picture.")
    parser.add_argument("--images", type=int, default=8, help="How many images.")
    parser.add_argument("--epoch", type=int, default=0, help="Of which epoch (from 0).")
    parser.add_argument("--step", type=int, default=0, help="Of which step of it (from 0).")
    config, values = parse(parser, sys.argv[1:])

    import torch

    from volo.build import load_splits, make_network, make_train_loader, open_token_labels
    from volo.engine.batch_layout import BatchLayout
    from volo.engine.learner import Learner
    from volo.engine.preview import batch_picture
    from volo.runtime.distributed import World
    from volo.runtime.program import DONE, UsageError, checking_usage, finish

    def body() -> int:
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        with checking_usage():
            layout = BatchLayout.of(config, world.size)
            splits = load_splits(config)
            learner = Learner(config, world, layout, make_network(config, world))
            labels = open_token_labels(config, splits, learner.grid)
            loader = make_train_loader(config, splits.train, world, layout, labels)
            if not 0 <= values["step"] < loader.steps_per_epoch:
                raise UsageError(f"--step is {values['step']}; an epoch has steps 0 ... {loader.steps_per_epoch - 1}")
        png = batch_picture(learner, loader, splits.classes, values["epoch"], values["step"], values["images"])
        if png is None:
            raise ValueError("none of these images can be read; try another --step")
        Path(values["output"]).write_bytes(png)
        print(f"{values['output']}: epoch {values['epoch']}, step {values['step']}")
        return DONE

    finish(body)


if __name__ == "__main__":
    main()
