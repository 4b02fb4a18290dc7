#!/usr/bin/env python
"""Make the official files of ILSVRC2012 ready for training; nothing is downloaded.

    python scripts/prepare_imagenet.py verify --source /data/ilsvrc2012
    python scripts/prepare_imagenet.py index  --source /data/ilsvrc2012
    python scripts/prepare_imagenet.py unpack --source /data/ilsvrc2012 --output /data/imagenet
    python scripts/prepare_imagenet.py shard  --source /data/ilsvrc2012 --output /data/shards --max_side 512

The source is a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. After an
interruption, the same command resumes.
"""

import sys

from volo.cli import parse_command
from volo.prepare_imagenet.options import COMMANDS

if __name__ == "__main__":
    options = parse_command(COMMANDS, sys.argv[1:], prog="prepare_imagenet.py", description=__doc__.splitlines()[0])

    # Slow imports come after the options are known to be valid.
    from volo.prepare_imagenet.run import run_prepare
    from volo.runtime.program import finish

    finish(lambda: run_prepare(options))
