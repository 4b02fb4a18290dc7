#!/usr/bin/env python
"""Train a VOLO from a recipe: train.py --config configs/volo_d1_224.yaml --data.root /data/imagenet"""

import sys

from volo.runtime.exit_codes import stop_with_launcher

stop_with_launcher()  # before the other imports, which take time

from volo.cli import build_parser, parse  # noqa: E402

if __name__ == "__main__":
    parser = build_parser("train.py", "Train a VOLO from a recipe, on one process or under torchrun.")
    config, _ = parse(parser, sys.argv[1:])

    # Imported once the options are known to be right: it takes seconds.
    from volo.runtime.program import finish
    from volo.training import run_training

    finish(lambda: run_training(config))
