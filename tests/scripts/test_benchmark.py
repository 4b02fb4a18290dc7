"""The benchmarks run, and compare what their tables say; their numbers are not checked."""

import importlib.util
import json

import pytest
from PIL import Image
from programs import ROOT, USAGE, run
from sklearn.datasets import load_sample_images

FOLDER = ROOT / "scripts" / "benchmark"


def benchmark(tmp_path, program: str, *words) -> dict:
    ended = run(FOLDER / program, *words, "--json", tmp_path / "out.json", cwd=tmp_path).assert_done()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["title"] in ended.out
    return result


def measured(tmp_path, what: str, *words: str) -> list[dict]:
    words = ("--measure", what, *words, "--batch_size", "1", "--device", "cpu", "--threads", "1")
    return benchmark(tmp_path, "model.py", *words)["rows"]


@pytest.mark.slow
def test_op_times_both_sides(tmp_path):
    rows = measured(tmp_path, "op", "--rounds", "2", "--eager_only", "true")
    assert [(row["what"], row["who"]) for row in rows] == [
        (what, who) for what in ("forward", "forward + backward") for who in ("ours", "timm eager", "products alone")
    ]
    assert all(row["median, ms"] > 0 and row["time of ours"] > 0 for row in rows)
    assert {row["time of ours"] for row in rows if row["who"] == "ours"} == {1.0}


@pytest.mark.slow
def test_inference_at_another_resolution(tmp_path):
    rows = measured(tmp_path, "inference", "--rounds", "2", "--eager_only", "true", "--img_size", "64")
    assert [row["who"] for row in rows] == ["ours", "timm eager", "ViT-S (timm)", "products alone"]
    assert rows[0]["GMACs"] == rows[1]["GMACs"] < 6.9 * (64 / 224) ** 2  # 6.8 at 224, attention grows faster


@pytest.mark.slow
def test_profile_separates_the_kinds_of_work(tmp_path):
    rows = measured(tmp_path, "profile", "--rounds", "2", "--img_size", "64")
    both = {row["kind"]: row for row in rows if row["what"] == "forward + backward"}
    kinds = ("self-attention", "outlook attention", "convolutions", "linear layers", "norms", "activations")
    assert all(both[kind]["ours, ms"] > 0 for kind in kinds)
    # Time of operators is their own, and counts once: together they take no longer than the clock says.
    for who in ("ours, ms", "timm eager, ms"):
        assert sum(row[who] for kind, row in both.items() if kind != "wall clock") <= 1.1 * both["wall clock"][who]
    assert both["linear layers"]["ours, ms"] == max(both[kind]["ours, ms"] for kind in kinds)


@pytest.mark.slow
def test_whole_steps_beside_timm(tmp_path, make_photographs):
    words = ("--networks", "volo_d1:32:2", "--variants", "2", "--steps", "1", "--rounds", "2", "--device", "cpu")
    words += ("--images", make_photographs(5), "--workers", "0", "--profile", "true")
    rows = benchmark(tmp_path, "step.py", *words)["rows"]
    timed = [row for row in rows if row["what"] != "profile"]
    ours = "ours cheap, channels_last"
    assert [(row["what"], row["who"]) for row in timed] == [
        *((what, ours) for what in ("train", "forward, backward", "train, loader in front")),
        *(("train", "timm"), ("train", "timm, channels_last"), ("inference", "ours"), ("inference", "timm")),
    ]
    assert all(row["images/s"] > 0 and row["host, ms"] > 0 for row in timed)
    spent = {row["kind"]: row["ms"] for row in rows if row["what"] == "profile"}
    assert {"inputs", "outlook attention", "self-attention", "linear layers", "loss", "optimizer", "EMA"} < set(spent)
    assert sum(ms for kind, ms in spent.items() if kind != "wall clock") <= 1.1 * spent["wall clock"]


@pytest.mark.slow
def test_memory_counts_the_bytes_kept_for_backward(tmp_path):
    kept = {row["who"]: row["MB per image"] for row in measured(tmp_path, "memory")}
    # Counted by hand from the shapes: 57 MB; ViT-S as published: 59.
    assert kept["ours, recompute cheap"] == pytest.approx(57.0, abs=0.5)
    assert kept["ViT-S (timm)"] == pytest.approx(58.8, abs=0.3)
    assert kept["ours, recompute blocks"] < kept["ours, recompute cheap"] < kept["timm eager"] / 2


def test_batches_that_fit_follow_from_the_bytes():
    spec = importlib.util.spec_from_file_location("benchmark_memory", FOLDER / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # 100 million parameters are 2 GB of state, and 2 GB stay free: 20, 36 and 76 GB are left for images of 1 GB.
    assert module.batches(1e9, 100_000_000) == "20 / 36 / 76"
    assert module.batches(1e9, 1_200_000_000) == "0 / 14 / 54"


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("model.py", ["--measure", "train", "--model", "volo_nano"], "volo_d1 or volo_d2"),
        ("model.py", ["--measure", "train", "--rounds", "1"], "--rounds is 1"),
        ("model.py", ["--measure", "train", "--eager-only", "true"], "eager_only"),
        ("step.py", ["--variants", "5"], "--variants has '5'"),
        ("step.py", ["--networks", "volo_d1:224"], "--networks has 'volo_d1:224'"),
        ("step.py", ["--images", "FOLDER/none"], "--images is FOLDER/none"),
        ("loader.py", ["--images", "FOLDER/none"], "--images is FOLDER/none"),
        ("loader.py", ["--images", "FOLDER"], "--images is FOLDER"),
    ],
)
def test_wrong_usage(tmp_path, program, words, message):
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    run(FOLDER / program, *words, cwd=tmp_path).assert_failed(USAGE, message.replace("FOLDER", str(tmp_path)))


@pytest.mark.slow
def test_loader_times_every_contender(tmp_path, make_photographs):
    words = ("--img_size", 32, "--batch_size", 2, "--rounds", 1, "--workers", "[0,1]", "--target", 100)
    result = benchmark(tmp_path, "loader.py", "--images", make_photographs(5), *words)
    compared = [row for row in result["rows"] if "who" in row]
    assert {(row["what"], row["who"]) for row in compared} == {
        *(("token-label recipe", who) for who in ("ours", "ours, Pillow", "published way")),
        *((what, who) for what in ("no labels", "evaluation") for who in ("ours", "ours, Pillow", "timm")),
    }
    assert all(row["images/s per core"] > 0 and row["time of ours"] > 0 for row in compared)
    assert [row["workers"] for row in result["rows"] if "workers" in row] == [0, 1]
    stages = [row["stage"] for row in result["rows"] if "stage" in row]
    assert stages == ["read", "header", "draw", "decode", "apply", "labels", "collate"]
    assert len(result["notes"]) == 3 and "100 images/s would take" in result["notes"][0]


@pytest.fixture
def make_photographs(tmp_path):
    def make(count: int):
        for number in range(count):
            folder = tmp_path / "images" / f"c{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            photograph = Image.fromarray(load_sample_images().images[number % 2])
            photograph.crop((0, 0, 100 + number, 80)).save(folder / f"{number}.jpg")
        return tmp_path / "images"

    return make
