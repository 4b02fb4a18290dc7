#!/usr/bin/env python
"""Pack a folder of token labels, one .pt file per image, into one store that all workers and ranks share.

    python scripts/pack_token_labels.py --source label_top5_train_nfnet --output labels/nfnet --images imagenet/train

takes the published labels (<source>/<class>/<image>.pt, float16 [2, k, H, W]: scores and class indices) or any
folder of such files. The store gets its name once it is complete; after an interruption, run the same command again.
"""

import sys

from volo.cli import parse_options
from volo.token_labels.pack_options import PackOptions

if __name__ == "__main__":
    options = parse_options(
        PackOptions,
        sys.argv[1:],
        prog="pack_token_labels.py",
        usage="--source FOLDER --output STORE [options]",
        description=__doc__.splitlines()[0],
    )

    # Slow imports come after the options are known to be valid.
    from volo.runtime.program import finish
    from volo.token_labels.pack import run_packing

    finish(lambda: run_packing(options))
