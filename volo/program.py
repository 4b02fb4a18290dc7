"""How a program of ours ends: exit codes, and the reason on the last line.

0 done; 1 failed; 2 wrong usage or config, before any work; 75 stopped by a signal, with a checkpoint saved.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from volo import distributed
from volo.checkpoint import SaveError

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75

_logger = logging.getLogger("volo")


class UsageError(Exception):
    """The user asked for something that cannot be, and it was found before any work."""


@contextlib.contextmanager
def checking_usage():
    """Turn the ValueErrors of the block, all found before any work, into :class:`UsageError`.

    A file that is damaged is no wrong usage: its error stays what it is.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def finish(body: Callable[[], int]) -> None:
    """Run ``body`` and end the process with the exit code it returns or its failure stands for."""
    try:
        code = body()
    except distributed.OtherRankFailed:
        code = FAILED
    except UsageError as error:
        code = _fail(str(error), USAGE)
    except (ValueError, SaveError, ArithmeticError) as error:  # expected failures, which explain themselves
        code = _fail(str(error), FAILED)
    except KeyboardInterrupt:
        code = _fail("interrupted before there was anything to save", FAILED)
    except Exception as error:
        traceback.print_exc()
        code = _fail(f"{type(error).__name__}: {error}", FAILED)
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 and (exit_file := os.environ.get("VOLO_EXIT_FILE")):
        Path(exit_file).write_text(str(code))  # torchrun turns every code but 0 into 1; the launcher reads this
    if code in (DONE, STOPPED):
        distributed.shutdown()
        sys.exit(code)
    # Other processes may be gone: leaving the process group in order would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(reason: str, code: int) -> int:
    sys.stdout.flush()
    rank = int(os.environ.get("RANK", 0))
    prefix = f"[rank {rank}] " if rank else ""
    for handler in _logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(logging.LogRecord("volo", logging.ERROR, __file__, 0, reason, None, None))
    print(f"{prefix}error: {reason}", file=sys.stderr)
    return code
