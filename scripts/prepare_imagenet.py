#!/usr/bin/env python
"""Make the official files of ILSVRC2012 ready for training; nothing is fetched.

    python scripts/prepare_imagenet.py verify --source /data/ilsvrc2012
    python scripts/prepare_imagenet.py index  --source /data/ilsvrc2012
    python scripts/prepare_imagenet.py unpack --source /data/ilsvrc2012 --output /data/imagenet
    python scripts/prepare_imagenet.py shard  --source /data/ilsvrc2012 --output /data/shards --max-side 512

The source is a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Each
command can be interrupted; the same command goes on where it was.
"""

import argparse
import logging
import sys
from pathlib import Path

EPILOG = """exit codes: 0 done, and the counts are right; 1 failed, the last line says why; 2 wrong usage, before any
work; 75 interrupted, what is complete is kept"""


def parse(words: list[str]) -> argparse.Namespace:
    shaped = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, allow_abbrev=False, formatter_class=shaped)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, told: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=told, description=told, epilog=EPILOG, allow_abbrev=False)
        one.add_argument("--source", required=True, help="folder of the official archives")
        one.add_argument(
            "--cache",
            default="auto",
            help="folder that keeps checksums and indices, as data.cache of train.py (default: that of the user)",
        )
        if name != "verify":
            one.add_argument(
                "--splits", nargs="+", choices=("train", "val"), default=["train", "val"], help="which to take"
            )
            one.add_argument(
                "--expect",
                nargs="+",
                type=int,
                metavar="IMAGES",
                help="images that each of the splits is to have (default: 1281167 and 50000)",
            )
            one.add_argument("--devkit", help="development kit, or a labels file (default: the kit in the source)")
        return one

    verify = command("verify", "compare the archives with their MD5 checksums")
    verify.add_argument(
        "--md5",
        action="append",
        default=[],
        metavar="NAME=MD5",
        help="a file of the source and its checksum; those of the official archives are known",
    )
    command("index", "index the archives, for training that reads them in place (--data.root SOURCE)")
    unpack = command("unpack", "write one folder a class, OUTPUT/train/<synset> and OUTPUT/val/<synset>")
    unpack.add_argument("--output", required=True, help="folder to write")
    shard = command("shard", "write WebDataset shards of smaller images, and say what that changes")
    shard.add_argument("--output", required=True, help="folder to write")
    shard.add_argument(
        "--max-side", type=int, default=512, help="longest side in pixels; images beyond are resized (default: 512)"
    )
    shard.add_argument("--quality", type=int, default=90, help="JPEG quality of resized images (default: 90)")
    shard.add_argument("--images", type=int, default=1000, help="images of a shard (default: 1000)")
    shard.add_argument("--workers", type=int, help="processes (default: one a core, up to 8)")

    values = parser.parse_args(words)
    if values.command == "verify":
        wrong = [text for text in values.md5 if "=" not in text]
        if wrong:
            parser.error(f"--md5 is {wrong[0]!r}; it takes NAME=MD5")
    else:
        official = {"train": 1281167, "val": 50000}
        values.splits = list(dict.fromkeys(values.splits))
        values.expect = values.expect or [official[split] for split in values.splits]
        if len(values.expect) != len(values.splits):
            parser.error(f"--expect has {len(values.expect)} counts for {len(values.splits)} splits")
    if values.command in ("unpack", "shard") and Path(values.output).resolve() == Path(values.source).resolve():
        # Half of what is written there would be taken for the images themselves when it is run again.
        parser.error(f"--output {values.output} is --source; name another folder")
    return values


def main(values: argparse.Namespace) -> int:
    # What takes seconds to import comes after the options are known to be right.
    from volo.prepare_imagenet.index import run_index
    from volo.prepare_imagenet.official import ImageNetFiles
    from volo.prepare_imagenet.shard import ShardOptions, run_shard
    from volo.prepare_imagenet.unpack import run_unpack
    from volo.prepare_imagenet.verify import run_verify
    from volo.reporting import setup_logging
    from volo.runtime.distributed import worker_count
    from volo.runtime.program import STOPPED, checking_usage

    setup_logging(None)
    try:
        if values.command == "verify":
            return run_verify(values.source, dict(text.split("=", 1) for text in values.md5), values.cache)
        source = ImageNetFiles(values.source, tuple(values.splits), tuple(values.expect), values.cache, values.devkit)
        if values.command == "index":
            return run_index(source)
        if values.command == "unpack":
            return run_unpack(source, values.output)
        with checking_usage():
            options = ShardOptions(values.max_side, values.quality, values.images, worker_count(values.workers))
        return run_shard(source, values.output, options)
    except KeyboardInterrupt:
        logging.getLogger("volo").info("interrupted; what is complete is kept: the same command goes on from there")
        return STOPPED


if __name__ == "__main__":
    options = parse(sys.argv[1:])

    from volo.runtime.program import finish

    finish(lambda: main(options))
