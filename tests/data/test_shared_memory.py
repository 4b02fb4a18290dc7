"""A /dev/shm that is too small for the batches read ahead is reported before the first step, with the remedy."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volo.build import require_shared_memory
from volo.data import shared_memory
from volo.data.shared_memory import ReadAhead, lacking_room
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.records import ImageRecords
from volo.engine.batch_layout import BatchLayout

MB = 10**6


@pytest.fixture
def free(monkeypatch):
    """Return a function that sets the free bytes of /dev/shm."""
    monkeypatch.setattr(shared_memory.os.path, "isdir", lambda path: True)

    def set_free(count: int) -> None:
        usage = lambda path: SimpleNamespace(free=count) if path == "/dev/shm" else None  # noqa: E731
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", usage)

    return set_free


def test_the_limit_is_exact_to_the_byte(free):
    loaders = [ReadAhead(4, 10), ReadAhead(1, 7)]  # (2 * 4 + 2) * 10 + (2 * 1 + 2) * 7
    free(3 * 128)
    assert lacking_room(loaders, processes=3) is None
    free(3 * 128 - 1)
    assert "data.workers to at most 3" in lacking_room(loaders, processes=3)
    free(0)
    assert "data.workers to 0" in lacking_room(loaders, processes=1)
    assert lacking_room([ReadAhead(0, 10**12)], processes=8) is None


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 10**9), st.integers(0, 10**11))
def test_the_number_of_workers_named_is_the_largest_that_fits(workers, processes, size, available):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory.os.path, "isdir", lambda path: True)
        patch.setattr(shared_memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=available))
        problem = lacking_room([ReadAhead(workers, size)], processes)
        if problem is None:
            return
        named = int(re.search(r"data\.workers to (?:at most )?(\d+)", problem)[1])
        assert lacking_room([ReadAhead(named, size)], processes) is None
        assert lacking_room([ReadAhead(named + 1, size)], processes) is not None


def test_the_default_of_docker(free):
    """64 MB are too little for D1's batches, and enough for batches of small images."""
    free(64 * MB)
    problem = lacking_room([ReadAhead(8, 128 * 3 * 224 * 224)], processes=8)
    assert re.match(r"/dev/shm has 64 MB free, .*8 processes with 8 data.workers each .*up to 2.8 GB", problem)
    assert "--shm-size=6g or --ipc=host" in problem and "\n" not in problem
    assert lacking_room([ReadAhead(8, 256 * 3 * 32 * 32)], processes=2) is None


def test_without_dev_shm_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(shared_memory.os.path, "isdir", lambda path: False)
    assert lacking_room([ReadAhead(8, 10**15)], processes=8) is None


def test_it_is_reported_before_the_first_step(free, tiny_config):
    config = tiny_config(data={"workers": 3}, train={"batch_size": 4}, eval={"batch_size": 2})
    one = 3 * 32 * 32 + 64
    needed = 8 * 4 * one + (2 * 2 + 2) * 2 * one  # training with three workers; two evaluation batches, so two workers
    val = ImageRecords(
        FolderSource("", PackedNames.of(["a/1.png", "a/2.png", "a/3.png"])), np.zeros(3, dtype=np.int64), ("a", "b")
    )
    plan = BatchLayout.of(config, 1)
    free(needed)
    require_shared_memory(config, plan, val)
    free(needed - 1)
    with pytest.raises(ValueError, match="/dev/shm has 0 MB free, .* 3 data.workers .* up to 0 MB"):
        require_shared_memory(config, plan, val)
    require_shared_memory(config, plan, None)
    require_shared_memory(config, None, None)
