#!/usr/bin/env python
"""Label every cell of every image in a folder with a teacher, as in TokenLabeling (arXiv 2104.10858).

    python scripts/generate_token_labels.py --images imagenet/train --class_list imagenet \
        --teacher timm:dm_nfnet_f6 --output labels/nfnet_f6
    torchrun --nproc_per_node=8 scripts/generate_token_labels.py ...

The teacher may be any model of timm, or any VOLO of this package. The labels are written as one store, which training
reads directly. After a stop or a kill, the same command resumes.
"""

import sys

from volo.cli import parse_options
from volo.token_labels.generation.options import GenerateOptions

if __name__ == "__main__":
    options = parse_options(
        GenerateOptions,
        sys.argv[1:],
        prog="generate_token_labels.py",
        usage="--images FOLDER --teacher TEACHER --output STORE [options]",
        description=__doc__.splitlines()[0],
    )

    # Slow imports come after the options are known to be valid.
    from volo.runtime.program import finish
    from volo.token_labels.generation.run import run_generation

    finish(lambda: run_generation(options))
