"""Tests that need a CUDA device. Elsewhere they are skipped; VOLO_GPU_TESTS_DEVICE=cpu rehearses them on the CPU."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("VOLO_GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    if DEVICE == "cpu" or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this PyTorch finds none")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The device under test, with exact fp32 arithmetic."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
