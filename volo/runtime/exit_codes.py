"""Exit codes of the programs, how they get past torchrun, and what becomes of a program whose torchrun is killed.

torchrun turns every code but 0 into 1 and ends with a long report of its own. If distributed_train.sh has named a file,
the first process of a machine therefore writes its code there, and the first process to fail its reason beside it, by
attempt: torchrun starts everything again after a failure, up to MAX_RESTARTS times.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def leave_for_launcher(code: int, reason: str | None = None) -> None:
    """Write ``code`` and the last line ``reason`` to the files that distributed_train.sh reads, if it started us."""
    named = os.environ.get("VOLO_EXIT_FILE")
    if not named:
        return
    first_to_fail = False
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    reason_file = f"{named}.reason.{attempt:04d}"
    if code == STOPPED and os.path.exists(reason_file):
        return  # another process has failed, and this one was stopped because of it
    with contextlib.suppress(OSError):  # on a full disk the launcher falls back on torchrun's code
        if reason is not None:
            with contextlib.suppress(FileExistsError), open(reason_file, "x", encoding="utf-8") as file:
                file.write(reason)
                first_to_fail = True
        if first_to_fail or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(named).write_text(str(code))


def forgo_restarts() -> None:
    """Ask distributed_train.sh, if it started us, to end torchrun: another attempt would end as this one."""
    launcher = os.environ.get("VOLO_LAUNCHER")
    if launcher:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(launcher), signal.SIGUSR2)


def stop_with_launcher() -> None:
    """Have SIGTERM sent to this process if torchrun, its parent, is killed (on Linux).

    It would go on otherwise, out of the reach of whoever wants to stop or restart the run, with the run folder locked,
    or wait for a rendezvous that nobody serves. Call it first of all: a parent that is gone already sends nothing.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
