"""Which endings of a program another attempt could change."""

import errno
import sys

import pytest
import torch

from volo.runtime import program
from volo.runtime.distributed import OtherRankFailed, RendezvousFailed
from volo.runtime.errors import DataError, Failure
from volo.runtime.program import DONE, FAILED, STOPPED, USAGE, UsageError, finish

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:525] Read error [::1]:1234: Connection reset by peer")


@pytest.mark.parametrize(
    ("ending", "code", "again"),
    [
        (DONE, DONE, True),  # if another rank fails afterwards, it is for that one to say
        (STOPPED, STOPPED, False),
        (UsageError("no such option"), USAGE, False),
        (DataError("an image cannot be read"), FAILED, False),
        (Failure("not finite"), FAILED, False),
        (OtherRankFailed(), FAILED, False),
        (KeyboardInterrupt(), FAILED, False),
        (OSError(errno.ENOSPC, "No space left on device"), FAILED, False),
        (torch.OutOfMemoryError("CUDA out of memory"), FAILED, False),
        (LOST, FAILED, True),
        (RendezvousFailed("nobody came"), FAILED, True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), FAILED, True),
    ],
    ids=repr,
)
def test_the_launcher_is_told_what_would_come_again(monkeypatch, ending, code, again):
    forgone = []
    monkeypatch.setattr(program, "forgo_restarts", lambda: forgone.append(True))
    monkeypatch.setattr(program, "_exit", sys.exit)

    def body() -> int:
        if isinstance(ending, int):
            return ending
        raise ending

    with pytest.raises(SystemExit) as ended:
        finish(body)
    assert ended.value.code == code
    assert forgone == ([] if again else [True])


def test_all_codes_are_left_before_the_first_process_ends(monkeypatch, tmp_path):
    """Otherwise torchrun would end rank 0 before it has left the code of a stop."""
    order = []
    monkeypatch.setenv("VOLO_EXIT_FILE", str(tmp_path / "code"))
    monkeypatch.setattr(program.distributed, "barrier", lambda: order.append((tmp_path / "code").read_text()))
    monkeypatch.setattr(program, "forgo_restarts", lambda: order.append("told"))
    with pytest.raises(SystemExit):
        finish(lambda: STOPPED)
    assert order == ["75", "told"]
