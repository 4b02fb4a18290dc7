"""Label generation whose reading processes die or hang: named within seconds, or replaced."""

import os
import signal
from pathlib import Path

import pytest
import timm
import torch

from volo.data import workers as reading
from volo.runtime import program
from volo.runtime.exit_codes import DONE, FAILED
from volo.token_labels.generation import teacher_input
from volo.token_labels.generation.options import GenerateOptions
from volo.token_labels.generation.run import run_generation
from volo.token_labels.store import TokenLabelStore


@pytest.fixture
def given(make_image_folder, tmp_path) -> dict:
    """Options of a run over three chunks of images."""
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
    return {
        "images": make_image_folder({"a": 20, "b": 20}),
        "output": str(tmp_path / "labels"),
        "teacher": "timm:test_resnet",
        "teacher_checkpoint": str(weights),
        "top_k": 2,
        "workers": 2,
        "device": "cpu",
        "cache": "none",
    }


def die_at(index: int, monkeypatch, before: Path | None = None) -> None:
    """Let the worker that comes to image ``index`` be killed; if ``before`` is given, only the first that does."""
    get = teacher_input._TeacherImages.__getitem__

    def die(self, key):
        if key == index and not (before and before.exists()):
            if before:
                before.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, key)

    monkeypatch.setattr(teacher_input._TeacherImages, "__getitem__", die)


def exit_code(given: dict, monkeypatch) -> int:
    """What the program would end with, without ending this process."""

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(program.os, "_exit", end)
    with pytest.raises(Ended) as ended:
        program.finish(lambda: run_generation(GenerateOptions(**given)))
    return ended.value.args[0]


def test_a_worker_that_dies_is_named_with_the_options_of_this_program(given, monkeypatch, capfd):
    die_at(25, monkeypatch)
    assert exit_code(given, monkeypatch) == FAILED
    last = capfd.readouterr().err.splitlines()[-1]
    assert "SIGKILL" in last and str(Path(given["images"], "b", "13.png")) in last  # the 26th, as names are sorted
    assert "--workers" in last and "data.workers" not in last
    assert not Path(given["output"]).exists()


def test_a_worker_that_dies_once_is_replaced_under_skip(given, monkeypatch, tmp_path):
    die_at(25, monkeypatch, before=tmp_path / "died")
    assert run_generation(GenerateOptions(**given, on_error="skip")) == DONE
    assert (tmp_path / "died").exists()
    assert TokenLabelStore(given["output"]).header.entries == 40


def test_a_worker_that_hangs_is_named_with_the_image(given, monkeypatch, capfd):
    monkeypatch.setattr(reading, "_POLL_SECONDS", 0.1)
    stuck = Path(given["images"]) / "b" / "7.png"
    stuck.unlink()
    os.mkfifo(stuck)  # opening it waits for a writer that never comes
    assert exit_code({**given, "timeout_seconds": 0.5}, monkeypatch) == FAILED
    last = capfd.readouterr().err.splitlines()[-1]
    assert str(stuck) in last and "0.5 s" in last
    assert "--timeout_seconds" in last and "data.timeout_seconds" not in last
    assert not Path(given["output"]).exists()
