"""Fixtures of token label tests."""

from pathlib import Path

import pytest
from label_maps import LABELS, write_store


@pytest.fixture
def packed(tmp_path) -> Path:
    return write_store(tmp_path / "labels", LABELS)
