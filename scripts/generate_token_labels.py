#!/usr/bin/env python
"""Let a teacher label every cell of every image of a folder, as TokenLabeling does (arXiv 2104.10858).

    python scripts/generate_token_labels.py --images imagenet/train --class_list imagenet \
        --teacher timm:dm_nfnet_f6 --output labels/nfnet_f6
    torchrun --nproc_per_node=8 scripts/generate_token_labels.py ...

Any model of timm is a teacher, and any VOLO of ours. The labels become one store, which training reads as it is;
after a stop or a kill, the same command resumes.
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

    # What takes seconds to import comes after the options are known to be right.
    from volo.runtime.program import finish
    from volo.token_labels.generation.run import run_generation

    finish(lambda: run_generation(options))
