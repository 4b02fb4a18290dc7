"""The front page: its Python is run as it stands, it is short, and its map of the repository is true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (2, 1000)
    assert names["tokens"].shape == (2, 197, 384)
    assert [tuple(x.shape) for x in (names["fine"], names["coarse"])] == [(2, 192, 28, 28), (2, 384, 14, 14)]
    assert names["output"].tokens.shape == (2, 196, 1000)
    assert names["model"].head.weight.grad.abs().sum() > 0


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
