"""How a program ends: its last line, which may hold names from files, and whether another attempt could change it."""

import errno
import sys

import pytest
import torch

from volo.runtime import program
from volo.runtime.distributed import OtherRankFailed, RendezvousFailed
from volo.runtime.errors import DataError, Failure
from volo.runtime.exit_codes import leave_for_launcher
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


NAME = "a\nerror: all is well\x1b[2J\udce9.jpg"
SHOWN = r"a\nerror: all is well\x1b[2J\udce9.jpg"


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Return what a program with this body prints to stderr, and the reason that it leaves for the launcher."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(program, "_exit", leave)

    def run(error: Exception) -> tuple[str, str]:
        def body():
            raise error

        monkeypatch.setenv("VOLO_EXIT_FILE", str(tmp_path / type(error).__name__))
        with pytest.raises(SystemExit):
            program.finish(body)
        return capsys.readouterr().err, (tmp_path / f"{type(error).__name__}.reason.0000").read_text()

    return run


@pytest.mark.parametrize("kind", [ValueError, Failure, program.UsageError])
def test_names_in_the_last_line_are_escaped(ended, kind):
    assert ended(kind(f"cannot read {NAME}")) == (f"error: cannot read {SHOWN}\n", f"cannot read {SHOWN}")


def test_names_in_a_traceback_are_escaped(ended):
    printed, reason = ended(RuntimeError(f"cannot read {NAME}"))
    assert "Traceback (most recent call last):\n" in printed and "\x1b" not in printed and "\udce9" not in printed
    assert printed.splitlines()[-1] == f"error: {reason}" and reason.startswith("RuntimeError: cannot read a")


def test_a_process_stopped_because_another_failed_does_not_cover_its_code(monkeypatch, tmp_path):
    named = tmp_path / "code"
    monkeypatch.setenv("VOLO_EXIT_FILE", str(named))
    monkeypatch.setenv("LOCAL_RANK", "1")
    leave_for_launcher(USAGE, "no such option")
    monkeypatch.setenv("LOCAL_RANK", "0")
    leave_for_launcher(STOPPED)
    assert named.read_text() == "2"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the next attempt speaks for itself
    leave_for_launcher(STOPPED)
    assert named.read_text() == "75"
