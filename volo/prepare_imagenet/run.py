"""Running one command of scripts/prepare_imagenet.py."""

import logging

from volo.prepare_imagenet.official import check_counts, open_splits
from volo.prepare_imagenet.options import IndexOptions, ShardOptions, UnpackOptions, VerifyOptions
from volo.prepare_imagenet.shard import run_shard
from volo.prepare_imagenet.unpack import run_unpack
from volo.prepare_imagenet.verify import run_verify
from volo.reporting import setup_logging
from volo.runtime.program import DONE, STOPPED, checking_usage

_logger = logging.getLogger("volo")


def run_prepare(options: VerifyOptions | IndexOptions) -> int:
    """Run the command that ``options`` belong to; return the exit code (see :mod:`volo.runtime.program`)."""
    setup_logging(None)
    try:
        if isinstance(options, VerifyOptions):
            return run_verify(options.source)
        if isinstance(options, ShardOptions):
            return run_shard(options)
        if isinstance(options, UnpackOptions):
            return run_unpack(options)
        return run_index(options)
    except KeyboardInterrupt:
        _logger.info("interrupted: complete files are kept, and the same command resumes from there")
        return STOPPED


def run_index(options: IndexOptions) -> int:
    """Index every split and check the counts; return the exit code."""
    with checking_usage():
        splits = open_splits(options)
    counts = check_counts(options, {split: len(records) for split, records in splits.items()})
    _logger.info("%s: %s; train on it directly: --data.root %s", options.source, counts, options.source)
    return DONE
