"""The soak: kills, restarts, and a comparison that sees a difference."""

import csv
import subprocess
import sys

import programs
import pytest
import torch
from programs import ROOT

SOAK = ROOT / "scripts/soak.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_run_killed_now_and_then_ends_as_if_nothing_had_happened(tmp_path):
    recipe = programs.write_recipe(tmp_path / "recipe.yaml", programs.make_images(tmp_path / "images", train=16))
    words = ["--config", recipe, "--images", tmp_path / "images", "--output", tmp_path / "soak"]
    words += ["--kills", 2, "--epochs", 3, "--longest_seconds", 6, "--give_up_minutes", 8]
    ended = subprocess.run([sys.executable, SOAK, *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert ["differences", "0"] in lines and sum(int(line[-1]) for line in lines[-7:-3]) >= 2

    tampered = tmp_path / "soak/run-1"
    state = torch.load(tampered / "last.pt", weights_only=True)
    next(iter(state["state_dict"].values())).view(-1)[0] += 1e-6
    torch.save(state, tampered / "last.pt")
    with open(tampered / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    (tampered / "metrics.csv").write_text("\n".join(map(",".join, rows[:-1])) + "\n")
    compare = "import soak, sys, pathlib; print(soak.compare(*map(pathlib.Path, sys.argv[1:])))"
    command = [sys.executable, "-c", compare, tmp_path / "soak/undisturbed", tampered]
    found = subprocess.run(
        command, capture_output=True, text=True, env=programs.environment(PYTHONPATH=str(SOAK.parent))
    )
    assert found.stdout.strip() == "['state_dict', 'metrics.csv']", found.stderr
