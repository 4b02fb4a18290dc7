"""Indexing archives, so that training reads them in place and need not do so first."""

import logging

from volo.prepare_imagenet.official import ImageNetFiles
from volo.runtime.program import DONE, checking_usage

_logger = logging.getLogger("volo")


def run_index(source: ImageNetFiles) -> int:
    """Index every split, and count; return the exit code."""
    with checking_usage():
        splits = source.open()
    counts = source.check({split: len(records) for split, records in splits.items()})
    _logger.info("%s: %s; train on it as it is: --data.root %s", source.folder, counts, source.folder)
    return DONE
