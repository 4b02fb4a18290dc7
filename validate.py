#!/usr/bin/env python
"""Evaluate a checkpoint: validate.py --config configs/volo_d1_224.yaml --checkpoint FILE --data.root /data/imagenet"""

import sys

from volo.runtime.exit_codes import stop_with_launcher

stop_with_launcher()  # before the other imports, which take time

from volo.cli import build_parser, parse  # noqa: E402
from volo.config import ValidationOptions  # noqa: E402

if __name__ == "__main__":
    parser = build_parser("validate.py", "Evaluate a checkpoint exactly, on one process or under torchrun.")
    parser.add_class_arguments(ValidationOptions, skip={"v2"})
    parser.add_argument("--v2", nargs="+", default=[], help="Folders of ImageNet-V2 variants, evaluated as well.")
    config, values = parse(parser, sys.argv[1:])
    options = ValidationOptions(**{**values, "v2": tuple(values["v2"])})

    # Imported once the options are known to be right: it takes seconds.
    from volo.runtime.program import finish
    from volo.validation import run_validation

    finish(lambda: run_validation(config, options))
