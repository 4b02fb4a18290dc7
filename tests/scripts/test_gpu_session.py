"""scripts/gpu_session.sh, rehearsed on the CPU."""

import importlib.util
import json
import sys

import programs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import ROOT, USAGE

SESSION = ROOT / "scripts" / "gpu_session.sh"


def test_a_part_that_is_not_there(tmp_path):
    process = programs.launch("bash", str(SESSION), "right", "fast", cwd=tmp_path, OUT=str(tmp_path / "out"))
    finished = programs.finish(process)
    assert finished.code == USAGE and "there is no part 'fast'" in finished.err
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    kept = tmp_path / "runs" / "mine.pt"
    kept.parent.mkdir()
    kept.touch()
    finished = programs.finish(programs.launch("bash", str(SESSION), "largest", cwd=tmp_path, OUT=str(tmp_path)))
    assert finished.code == USAGE and "is not of an earlier session" in finished.err
    assert kept.exists()


@pytest.mark.slow
def test_a_part_ends_in_the_table_and_the_json(tmp_path):
    process = programs.launch(
        "bash", str(SESSION), "largest", cwd=tmp_path, OUT=str(tmp_path / "out"), DEVICE="cpu", PYTHON=sys.executable
    )
    finished = programs.finish(process)
    assert finished.code == 0, finished.out + finished.err
    found = json.loads((tmp_path / "out/session.json").read_text())
    assert [(row["step"], row["exit code"]) for row in found["steps"]] == [("largest", "0")]
    (row,) = found["measured"]["largest"]["rows"]
    assert row["network"] == "volo_d1:32" and row["ours none, channels_last"] == 2
    assert "all of it:" in (tmp_path / "out/summary.txt").read_text()


@pytest.fixture(scope="module")
def largest():
    sys.path.insert(0, str(ROOT / "scripts" / "benchmark"))
    spec = importlib.util.spec_from_file_location("steps", ROOT / "scripts" / "benchmark" / "contending_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module.largest


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 10000))
def test_the_largest_batch_is_found_to_an_eighth(largest, limit, start, most):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest(fits, start, most)
    assert found <= limit and max(tried, default=0) <= most
    if start <= most:
        assert min(limit, most) - found <= max(limit / 8, 1)
