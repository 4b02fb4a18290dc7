"""Reporting on a terminal: log lines and progress are laid out as meant."""

import io
import logging
import os
import subprocess
import sys

import pytest
from programs import ROOT

from volo.reporting import LINES, ProgressBar, setup_logging


@pytest.fixture(autouse=True)
def fresh_logger():
    """Leave the logger "volo" as it was found: setup_logging changes it for the whole process."""
    logger = logging.getLogger("volo")
    level = logger.level
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)


def test_progress_prints_plain_lines_off_a_terminal(tmp_path, capsys):
    setup_logging(tmp_path)
    progress = ProgressBar(7, "epoch 3/310", log_every=3)
    for step in range(7):
        progress.update(1, loss=6.9 - step, lr=1.6e-3, images_per_s=1234.5)
    progress.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("  ETA ")[0] for line in lines] == [
        "epoch 3/310  step 3/7  loss 4.9  lr 0.0016  images/s 1,234",
        "epoch 3/310  step 6/7  loss 1.9  lr 0.0016  images/s 1,234",
        "epoch 3/310  step 7/7  loss 0.9  lr 0.0016  images/s 1,234",
    ]
    assert lines[-1].endswith("ETA 00:00")
    assert err == ""
    assert (tmp_path / "log.txt").read_text().count("epoch 3/310") == 3


def test_progress_counts_steps_made_before_and_strides(capsys):
    setup_logging(None)
    progress = ProgressBar(100, "train", log_every=10, done=45)
    for n in (4, 4, 20, 27):
        progress.update(n)
    steps = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["53/100", "73/100", "100/100"]


def test_progress_is_a_bar_on_a_terminal_and_log_lines_do_not_break_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    setup_logging(None)
    progress = ProgressBar(4, "epoch 1/2")
    progress.update(1, loss=6.5)
    logging.getLogger("volo").info("a line")  # makes the bar draw itself again, with what it knows by now
    progress.update(3, loss=5.25)
    progress.close()
    text = terminal.getvalue()
    assert "epoch 1/2:" in text and "1/4" in text and "loss=6.5" in text
    # The line starts where the bar has been wiped off, and no plain progress lines are mixed in.
    assert text.split("a line")[0].endswith("\r")
    assert "ETA" not in text


def test_disabled_progress_says_nothing(capsys):
    setup_logging(None)
    progress = ProgressBar(2, "train", enabled=False, log_every=1)
    progress.update(2, loss=1.0)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_main_process_logs_to_stdout_and_to_the_file(tmp_path, capsys):
    setup_logging(tmp_path / "run")
    logging.getLogger("volo").info("effective batch %d", 1024)
    setup_logging(tmp_path / "run")  # a resumed run: nothing is printed twice, and the file grows
    logging.getLogger("volo").warning("one image skipped")
    assert capsys.readouterr().out.splitlines() == ["effective batch 1024", "one image skipped"]
    first, second = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert first[:2] == "20" and first.endswith("INFO effective batch 1024")
    assert second.endswith("WARNING one image skipped")


def test_other_processes_print_errors_with_their_rank(tmp_path, capsys):
    setup_logging(tmp_path, main_process=False, rank=3)
    logging.getLogger("volo").info("not shown")
    logging.getLogger("volo").warning("not shown either")
    logging.getLogger("volo").error("lost disk")
    assert capsys.readouterr().out == "[rank 3] lost disk\n"
    assert not list(tmp_path.iterdir())


HOSTILE = "a/\x1b[2J\udce9ü\nerror: x.jpg"
SHOWN = r"a/\x1b[2J\udce9ü\nerror: x.jpg"


def test_names_reach_the_log_escaped(tmp_path, capsys, monkeypatch):
    """Undecodable bytes included, which no encoding has."""
    monkeypatch.setattr(logging.getLogger("volo"), "propagate", False)  # pytest's own handler cannot pass them on
    setup_logging(tmp_path)
    logging.getLogger("volo").warning("cannot read %s", HOSTILE)
    logging.getLogger("volo").info("%s", f"one\ntwo\x1b[2J {SHOWN}", extra=LINES)
    assert capsys.readouterr().out == f"cannot read {SHOWN}\none\ntwo\\x1b[2J {SHOWN}\n"
    assert f"WARNING cannot read {SHOWN}\n" in (tmp_path / "log.txt").read_text()
    setup_logging(None, main_process=False, rank=3)
    logging.getLogger("volo").error("cannot read %s", HOSTILE)
    assert capsys.readouterr().out == f"[rank 3] cannot read {SHOWN}\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_names_in_progress_are_escaped(monkeypatch, is_terminal):
    class Terminal(io.StringIO):
        def isatty(self):
            return is_terminal

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    setup_logging(None)
    progress = ProgressBar(2, f"listing {HOSTILE}", log_every=1)
    progress.update(1, file=HOSTILE)
    logging.getLogger("volo").info("a line")  # makes a bar draw itself again
    progress.close()
    assert terminal.getvalue().count(SHOWN) >= 2 and HOSTILE not in terminal.getvalue()


_SPEAKER = """
import sys
from volo.reporting import ProgressBar, setup_logging
from volo.runtime.program import finish

def body():
    setup_logging(sys.argv[1])
    bar = ProgressBar(30, "train", log_every=1)
    for _ in range(30):
        bar.update(1)
    return 0

finish(body)
"""


@pytest.mark.parametrize("stream", ["closed", "a full disk", "a pipe nobody reads"])
def test_a_lost_standard_output_costs_one_line(tmp_path, stream):
    command = [sys.executable, "-c", _SPEAKER, str(tmp_path)]
    options: dict = {"stderr": subprocess.PIPE, "text": True, "timeout": 60, "cwd": ROOT}
    if stream == "closed":
        ended = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], **options)
    elif stream == "a full disk":
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, stdout=full, **options)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(command, stdout=writer, **options)
        os.close(writer)
    warnings = 0 if stream == "closed" else 1
    assert ended.returncode == 0 and len(ended.stderr.splitlines()) == warnings, ended.stderr
    text = (tmp_path / "log.txt").read_text()
    assert text.count("train  step ") == 30 and text.count("nothing more is printed") == warnings
