"""scripts/benchmark.py runs and compares what it says; the numbers are for people."""

import importlib.util
import json
import subprocess
import sys

import pytest
from programs import ROOT

SCRIPT = ROOT / "scripts" / "benchmark.py"


def benchmark(tmp_path, *words: str) -> list[dict]:
    words = (*words, "--batch", "1", "--device", "cpu", "--threads", "1", "--json", tmp_path / "out.json")
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["title"] in done.stdout
    return result["rows"]


def test_op_times_both_sides(tmp_path):
    rows = benchmark(tmp_path, "op", "--rounds", "2", "--eager-only")
    assert [(row["what"], row["who"]) for row in rows] == [
        (what, who) for what in ("forward", "forward + backward") for who in ("ours", "timm eager", "products alone")
    ]
    assert all(row["median, ms"] > 0 and row["time of ours"] > 0 for row in rows)
    assert {row["time of ours"] for row in rows if row["who"] == "ours"} == {1.0}


def test_memory_counts_what_each_keeps(tmp_path):
    kept = {row["who"]: row["MB an image"] for row in benchmark(tmp_path, "memory")}
    # Counted by hand from the shapes, see the commits that brought recomputation: 57 MB; ViT-S as published: 59.
    assert kept["ours, recompute cheap"] == pytest.approx(57.0, abs=0.5)
    assert kept["ViT-S (timm)"] == pytest.approx(58.8, abs=0.3)
    assert kept["ours, recompute blocks"] < kept["ours, recompute cheap"] < kept["timm eager"] / 2


def test_batches_that_fit_follow_from_the_bytes():
    spec = importlib.util.spec_from_file_location("benchmark_memory", SCRIPT.with_name("benchmark_memory.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # 100 million parameters are 2 GB of state, and 2 GB stay free: 20, 36 and 76 GB are left for images of 1 GB.
    assert module.batches(1e9, 100_000_000) == "20 / 36 / 76"
    assert module.batches(1e9, 1_200_000_000) == "0 / 14 / 54"


def test_models_that_timm_lacks_are_refused():
    words = [sys.executable, SCRIPT, "model", "--model", "volo_nano"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "timm has volo_d1 ... volo_d5" in done.stderr
