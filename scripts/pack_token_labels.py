#!/usr/bin/env python
"""Pack a folder of token labels, one .pt file an image, into one store that all workers and ranks read in place.

    python scripts/pack_token_labels.py --source label_top5_train_nfnet --output labels/nfnet --images imagenet/train

takes the published labels (<source>/<class>/<image>.pt, float16 [2, k, H, W]: scores and class indices) or any
folder of such files. The store appears under its name when it is whole; an interrupted packing is started again.
"""

import argparse
import sys


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", required=True, help="folder of the label files")
    parser.add_argument("--output", required=True, help="store to write (a folder)")
    parser.add_argument("--teacher", default="published", help="name of the network that gave the labels")
    parser.add_argument(
        "--covers",
        choices=("center_crop", "whole_image"),
        default="center_crop",
        help="what a map covers: a centre crop, as in the published labels, or the whole image",
    )
    parser.add_argument(
        "--exif",
        choices=("ignore", "apply"),
        default="ignore",
        help="whether the teacher saw images turned by their EXIF orientation; as data.exif of the training",
    )
    parser.add_argument("--num_classes", type=int, help="classes of the teacher (default: those of --class_list)")
    parser.add_argument(
        "--class_list",
        help='"imagenet" (default without --num_classes), or a text file with one class name a line',
    )
    parser.add_argument(
        "--images", help="the images, as data.root and data.train_split together; check that each has a label"
    )
    parser.add_argument("--labels", help="labels of images not sorted into classes, as data.train_labels")
    parser.add_argument("--cache", default="auto", help="folder that keeps listings, as data.cache")
    parser.add_argument(
        "--overwrite", choices=("true", "false"), default="false", help="replace a store that is there already"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    values = vars(parse(sys.argv[1:]))

    # What takes seconds to import comes after the options are known to be right.
    from volo.runtime.program import finish
    from volo.token_labels.pack import PackOptions, run_packing

    options = PackOptions(**{**values, "overwrite": values["overwrite"] == "true"})
    finish(lambda: run_packing(options))
