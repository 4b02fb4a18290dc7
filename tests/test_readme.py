"""The front page and the page of the Python API: their code runs as it stands, the map and the picture are true."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import picture

import volo
from volo.config import AugmentConfig
from volo.data.pixels.transforms import EvalTransform

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_python_of_the_page_runs():
    (code,) = PYTHON.findall(README)
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (2, 1000)
    assert names["tokens"].shape == (2, 197, 384)
    assert [tuple(x.shape) for x in (names["fine"], names["coarse"])] == [(2, 192, 28, 28), (2, 384, 14, 14)]
    assert names["output"].tokens.shape == (2, 196, 1000)
    assert names["model"].head.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_python_of_the_api_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": volo.create_model("volo_d1").state_dict()}, "d1_224_84.2.pth.tar")
    picture("disc", 0, (300, 250)).save("cat.jpg")
    names: dict = {}
    for code in PYTHON.findall((ROOT / "docs/python.md").read_text(encoding="utf-8")):
        exec(code, names)
    assert names["probabilities"].shape == (1, 1000)
    assert names["probabilities"].sum().item() == pytest.approx(1, abs=1e-4)
    seen = EvalTransform((224, 224), 0.96, "bicubic")(Image.open("cat.jpg"))
    mean, std = (torch.tensor(x)[:, None, None] for x in (AugmentConfig().mean, AugmentConfig().std))
    torch.testing.assert_close(names["image"], (torch.from_numpy(seen) / 255 - mean) / std)  # as validate.py sees it
    assert names["tokens"].shape == (2, 197, 384)
    assert [tuple(names[name].shape) for name in ("stride8", "stride16")] == [(2, 192, 28, 28), (2, 384, 14, 14)]
    assert [tuple(x.shape) for x in names["output"]] == [(2, 37), (2, 196, 37)]
    assert names["model"].head.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_picture_can_be_made_again(tmp_path):
    spec = importlib.util.spec_from_file_location("token_labels_picture", ROOT / "docs/token_labels_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as made, Image.open(ROOT / "docs/token_labels.png") as shown:
        assert made.size == shown.size


def test_it_can_be_read_in_a_few_minutes():
    assert len(README.split()) <= 1600


def test_the_map_names_every_room():
    (tree,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"[\w]+(?:\.\w+)+|[\w]+/", tree))
    package = {path.name + "/" * path.is_dir() for path in (ROOT / "volo").iterdir() if not path.name.startswith("__")}
    here = {"train.py", "validate.py", "distributed_train.sh", "configs/", "scripts/", "docs/", "tests/", "volo/"}
    assert package | here <= named
    for name in named:
        assert list(ROOT.glob(name)) or list(ROOT.rglob(f"volo/**/{name}")) or list(ROOT.glob(f"tests/{name}")), name
