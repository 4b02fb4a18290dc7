"""How a program of ours ends: exit codes, and the reason on the last line.

0 done; 1 failed; 2 wrong usage or config, before any work; 75 stopped by a signal, with a checkpoint saved.
"""

import contextlib
import errno
import logging
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from volo.runtime import distributed
from volo.runtime.errors import Failure, UnusableFile
from volo.runtime.exit_codes import DONE, FAILED, STOPPED, USAGE, forgo_restarts, leave_for_launcher
from volo.runtime.text import printable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_logger = logging.getLogger("volo")


class UsageError(Exception):
    """The options are wrong, which was found before any work."""


@contextlib.contextmanager
def checking_usage():
    """Turn the ValueErrors of the block, all found before any work, into :class:`UsageError`.

    What is wrong with a file or the network rather than with the options has exceptions of its own.
    """
    try:
        yield
    except UnusableFile:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_options_of(program: dict[str, str], message: str) -> str:
    """Return ``message`` with options of train.py, which it names, as another program calls them.

    Args:
        program: What each is called there.
        message: Of functions that the programs share.
    """
    for name, here in program.items():
        message = message.replace(name, here)
    return message


def finish(body: Callable[[], int]) -> None:
    """Run ``body`` and end the process with the exit code it returns or its failure stands for.

    Under distributed_train.sh another attempt follows only if a process is gone, or an error was not foreseen (a GPU
    that fell off the bus, say): whatever else ended the run would end it again.
    """
    threading.excepthook = _report_thread
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for good
    again = False
    try:
        code = body()
    except distributed.OtherRankFailed:
        code = FAILED
    except UsageError as error:
        code = _fail(str(error), USAGE)
    except distributed.RendezvousFailed as error:
        code, again = _fail(str(error), FAILED), True
    except (ValueError, Failure, ArithmeticError) as error:
        code = _fail(str(error), FAILED)  # expected failures, which explain themselves
    except KeyboardInterrupt:
        code = _fail("interrupted before a checkpoint could be saved", FAILED)
    except Exception as error:
        again = not _out_of_room(error)
        code = _fail(_unexpected(error), FAILED)
    leave_for_launcher(code)
    if code == STOPPED:
        with contextlib.suppress(RuntimeError):  # of a process that is gone
            distributed.barrier()  # as soon as one has left, torchrun ends those that have not left their code yet
    if code != DONE and not again:
        _flush()
        forgo_restarts()
    if code in (DONE, STOPPED):
        distributed.shutdown()
        sys.exit(code)
    _exit(code)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Report a disk that is full in one line (a library's thread writes there); anything else with a traceback."""
    if isinstance(failed.exc_value, OSError):
        _logger.warning("thread %s ended: %s", failed.thread and failed.thread.name, failed.exc_value)
    else:
        threading.__excepthook__(failed)


def end_at_once(reason: str) -> NoReturn:
    """End the process, from any thread, with exit code 1 and ``reason`` on the last line."""
    _fail(reason, FAILED)
    _exit(FAILED)


def stop_at_once() -> NoReturn:
    """End the process, from any thread, with exit code 75: a signal asked for it before there was anything to save."""
    _logger.info("stopped by a signal before the first step; nothing had to be saved")
    leave_for_launcher(STOPPED)
    forgo_restarts()
    _exit(STOPPED)


def _flush() -> None:
    """Write out what was printed; a stream whose reader has gone, or whose disk is full, is no failure."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _exit(code: int) -> NoReturn:
    # Other processes may be gone: leaving the process group in order would wait for them.
    for worker in multiprocessing.active_children():
        worker.kill()
    _flush()
    os._exit(code)


def _out_of_room(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and error.errno in _NO_ROOM)


def _unexpected(error: Exception) -> str:
    """Return the last line for an unexpected error, after printing its traceback."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{error}: the disk is full. Free some space and start again with the same command"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU is out of memory ({str(error).split('. ')[0]}). In training a smaller "
            "train.device_batch_size (the rest of the batch is accumulated) or train.recompute blocks needs less, in "
            "evaluation a smaller eval.batch_size"
        )
    if transport := distributed.lost_peer(error):
        who = distributed.silent_ranks() or "all still give signs of life"
        return (
            f"another process of the run is gone or silent ({transport}): {who}. If it failed, its own message says why"
        )
    print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" + (" ... (whole above)" if len(lines) > 1 else "")


def _fail(reason: str, code: int) -> int:
    sys.stdout.flush()
    reason = printable(reason)  # with names out of files; it is one line
    rank = int(os.environ.get("RANK", 0))
    prefix = f"[rank {rank}] " if rank else ""
    if code != USAGE:  # a refused command is no part of the run in that folder
        for handler in _logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.emit(logging.LogRecord("volo", logging.ERROR, __file__, 0, reason, None, None))
    print(f"{prefix}error: {reason}", file=sys.stderr)
    leave_for_launcher(code, prefix + reason)
    return code
