"""README: its Python is run as it stands, the files it links to exist, and its options have today's names."""

import re
from pathlib import Path

import pytest

from volo.config import RENAMED_VALUES, Config

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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_options_have_names_of_today():
    named = re.findall(r"`(?:--)?([a-z_]+)\.([a-z_]+) ([a-z_0-9.]+)`", README)
    assert len(named) > 10
    config = Config()
    for section, field, value in named:
        if hasattr(config, section):
            assert hasattr(getattr(config, section), field), f"{section}.{field}"
            assert value not in RENAMED_VALUES.get((section, field), {})
