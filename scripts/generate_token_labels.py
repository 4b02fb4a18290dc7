#!/usr/bin/env python
"""Let a teacher label every cell of every image of a folder, as TokenLabeling does (arXiv 2104.10858).

    python scripts/generate_token_labels.py --images imagenet/train --class_list imagenet \
        --teacher timm:dm_nfnet_f6 --output labels/nfnet_f6
    torchrun --nproc_per_node=8 scripts/generate_token_labels.py ...

Any model of timm is a teacher, and any VOLO of ours. The labels become one store, which training reads as it is;
after a stop or a kill, the same command resumes.
"""

import sys

from volo.cli import RecipeParser
from volo.token_labels.generation.options import GenerateOptions


def parse(words: list[str]) -> GenerateOptions:
    parser = RecipeParser(
        prog="generate_token_labels.py",
        description=__doc__.splitlines()[0],
        usage="generate_token_labels.py --images FOLDER --teacher TEACHER --output STORE [options]",
        allow_abbrev=False,
    )
    parser.add_class_arguments(GenerateOptions)
    try:
        return GenerateOptions(**vars(parser.parse_args(words)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    options = parse(sys.argv[1:])

    # What takes seconds to import comes after the options are known to be right.
    from volo.runtime.program import finish
    from volo.token_labels.generation.run import run_generation

    finish(lambda: run_generation(options))
