"""volo as an installed package: what wheel and sdist hold, and that it works where its folder cannot be written."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("volo/**/*.cpp"), ROOT / "volo/published.json"]}
MODULES = {str(path.relative_to(ROOT)) for path in ROOT.glob("volo/**/*.py")}

TRAINING_STEP = """
import torch, volo
assert volo.__file__.startswith({folder!r}), volo.__file__
assert volo.create_model("volo_d1").eval() is not None
model = volo.create_model("volo_nano", img_size=32, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = volo.losses.TokenLabelLoss()(model(torch.randn(2, 3, 32, 32)), torch.eye(10)[:2])
loss.backward()
optimizer.step()
print("outlook attention:", model.set_kernel("auto"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist, built without the network from a copy of what git would give."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("volo", "scripts", "configs"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements.txt"):
        subprocess.run(["cp", ROOT / name, source / name], check=True)
    for name in ("train.py", "validate.py", "distributed_train.sh"):
        subprocess.run(["cp", ROOT / name, source / name], check=True)
    for what in ("wheel", "sdist"):
        code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, out], cwd=source, check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_wheel_and_sdist_hold_all_modules_and_their_data(built):
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert len(DATA) >= 4
    assert in_wheel >= (DATA | MODULES)
    assert (
        DATA | MODULES | {"train.py", "validate.py", "distributed_train.sh", "configs/volo_d1_224.yaml"}
    ) <= in_sdist
    assert not [name for name in in_wheel if name.startswith(("tests/", "scripts/"))]


@pytest.mark.slow
def test_an_installed_wheel_trains_in_a_folder_that_cannot_be_written(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    folder = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    code = TRAINING_STEP.format(folder=str(folder))
    try:
        before = sorted(folder.rglob("*"))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "native, for cpu" in done.stdout
        assert sorted(folder.rglob("*")) == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
