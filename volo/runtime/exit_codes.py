"""Exit codes of the programs, and how they get past torchrun.

torchrun makes 1 of every code but 0 and ends with a screen of its own words. So, where distributed_train.sh has
named a file, the first process of a machine leaves its code there, and the first to fail its reason beside it.
"""

import contextlib
import os
from pathlib import Path

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75


def leave_for_launcher(code: int, reason: str | None = None) -> None:
    """Leave ``code``, and the last line that goes with it, where distributed_train.sh looks for them."""
    named = os.environ.get("VOLO_EXIT_FILE")
    if not named:
        return
    first_to_fail = False
    with contextlib.suppress(OSError):  # on a full disk the launcher makes do with torchrun's code
        if reason is not None:
            with contextlib.suppress(FileExistsError), open(f"{named}.reason", "x", encoding="utf-8") as file:
                file.write(reason)
                first_to_fail = True
        if first_to_fail or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(named).write_text(str(code))
