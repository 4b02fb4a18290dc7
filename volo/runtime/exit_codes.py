"""Exit codes of the programs, and how they get past torchrun.

torchrun turns every code but 0 into 1 and ends with a long report of its own. If distributed_train.sh has named a file,
the first process of a machine therefore writes its code there, and the first process to fail its reason beside it.
"""

import contextlib
import os
from pathlib import Path

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75


def leave_for_launcher(code: int, reason: str | None = None) -> None:
    """Write ``code`` and the last line ``reason`` to the files that distributed_train.sh reads, if it started us."""
    named = os.environ.get("VOLO_EXIT_FILE")
    if not named:
        return
    first_to_fail = False
    with contextlib.suppress(OSError):  # on a full disk the launcher falls back on torchrun's code
        if reason is not None:
            with contextlib.suppress(FileExistsError), open(f"{named}.reason", "x", encoding="utf-8") as file:
                file.write(reason)
                first_to_fail = True
        if first_to_fail or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(named).write_text(str(code))
