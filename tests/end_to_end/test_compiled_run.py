"""train.py and validate.py with train.compile: the numbers of the run without the compiler."""

import csv
from pathlib import Path

import programs
import pytest
from programs import TRAIN, VALIDATE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]


def numbers(run: Path) -> list[dict[str, float]]:
    """Every loss, norm and accuracy of metrics.csv, by row."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    left_out = {"train/images_per_s", "train/data_wait"}
    return [{name: float(cell) for name, cell in row.items() if cell and name not in left_out} for row in rows]


def test_compiled_run_has_the_numbers_of_the_eager_run(tmp_path):
    """Batches of one size, so that the compiler makes as few graphs as it can: training, and evaluation."""
    recipe = programs.write_recipe(
        tmp_path / "recipe.yaml",
        programs.make_images(tmp_path / "images"),
        schedule={"epochs": 1},
        eval={"batch_size": 12},
        train={"recompute": "none", "output": "runs"},
    )
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # nothing that another run compiled
    words = ("--config", recipe, "--train.compile", "true", "--train.name", "compiled")
    done = programs.run(TRAIN, *words, cwd=tmp_path, **cache).assert_done()
    assert "compiling took" in done.out + done.err
    assert list((tmp_path / "cache").rglob("*.py")), "nothing was compiled"
    programs.run(TRAIN, "--config", recipe, "--train.name", "eager", cwd=tmp_path).assert_done()

    compiled, eager = (numbers(tmp_path / "runs" / name) for name in ("compiled", "eager"))
    assert [row.keys() for row in compiled] == [row.keys() for row in eager]
    for one, other in zip(compiled, eager, strict=True):
        assert one == pytest.approx(other, rel=1e-3)

    words = (*words, "--checkpoint", "runs/compiled/last.pt", "--output", "out")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "validate_cache")}
    programs.run(VALIDATE, *words, cwd=tmp_path, **cache).assert_done()
    assert list((tmp_path / "validate_cache").rglob("*.py")), "nothing was compiled"
    with open(tmp_path / "out/results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["top1"]) == eager[-1]["val/top1"]
    assert float(row["loss"]) == pytest.approx(eager[-1]["val/loss"], rel=1e-3)


def test_run_goes_on_without_a_compiler_that_fails(tmp_path):
    recipe = programs.write_recipe(
        tmp_path / "recipe.yaml", programs.make_images(tmp_path / "images"), train={"compile": True, "output": "runs"}
    )
    (tmp_path / "file").touch()
    broken = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file/cache")}  # cannot be made
    message = "train.compile is true, but nothing is compiled: "
    done = programs.run(TRAIN, "--config", recipe, cwd=tmp_path, **broken).assert_done()
    assert done.out.count(message) + done.err.count(message) == 1
    words = ("--config", recipe, "--checkpoint", next(tmp_path.glob("runs/*/last.pt")))
    done = programs.run(VALIDATE, *words, cwd=tmp_path, **broken).assert_done()
    assert message in done.out + done.err
