#!/usr/bin/env python
"""Evaluate a checkpoint: validate.py --config configs/volo_d1_224.yaml --checkpoint FILE --data.root /data/imagenet"""

import sys
from typing import Literal

from volo.cli import build_parser, parse

if __name__ == "__main__":
    parser = build_parser("validate.py", "Evaluate a checkpoint exactly, on one process or under torchrun.")
    parser.add_argument("--checkpoint", type=str, default=None, help="Published, timm's or our own weights.")
    parser.add_argument(
        "--weights",
        type=Literal["auto", "raw", "ema"],
        default="auto",
        help="Which weights of the file; auto takes what chose the best checkpoint for our files, raw for others.",
    )
    parser.add_argument("--real", type=bool, default=False, help="Count ImageNet-ReaL labels in the same pass.")
    parser.add_argument("--v2", type=str, nargs="+", default=[], help="Folders of ImageNet-V2, evaluated as well.")
    parser.add_argument("--random_weights", type=bool, default=False, help="Evaluate an untrained network.")
    parser.add_argument("--output", type=str, default=None, help="Folder for results.json and results.csv.")
    config, values = parse(parser, sys.argv[1:])

    from volo.runtime.program import finish
    from volo.validation import ValidationOptions, run_validation

    options = ValidationOptions(**{**values, "v2": tuple(values["v2"])})
    finish(lambda: run_validation(config, options))
