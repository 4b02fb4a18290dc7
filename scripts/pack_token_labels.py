#!/usr/bin/env python
"""Pack a folder of token labels, one .pt file per image, into one store that all workers and ranks read in place.

    python scripts/pack_token_labels.py --source label_top5_train_nfnet --output labels/nfnet --images imagenet/train

takes the published labels (<source>/<class>/<image>.pt, float16 [2, k, H, W]: scores and class indices) or any
folder of such files. The store gets its name once it is whole; after an interruption, run the same command again.
"""

import sys

from volo.cli import RecipeParser
from volo.token_labels.pack_options import PackOptions


def parse(words: list[str]) -> PackOptions:
    parser = RecipeParser(
        prog="pack_token_labels.py",
        description=__doc__.splitlines()[0],
        usage="pack_token_labels.py --source FOLDER --output STORE [options]",
        allow_abbrev=False,
    )
    parser.add_class_arguments(PackOptions)
    return PackOptions(**vars(parser.parse_args(words)))


if __name__ == "__main__":
    options = parse(sys.argv[1:])

    # What takes seconds to import comes after the options are known to be right.
    from volo.runtime.program import finish
    from volo.token_labels.pack import run_packing

    finish(lambda: run_packing(options))
