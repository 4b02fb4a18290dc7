"""The device of a process, and whether those of all ranks fit together."""

import itertools
import logging
import sys
from pathlib import Path

import programs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from volo.runtime.device import Place, require_fitting_places, resolve_device

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this a machine with so many working CUDA devices, of so many cards."""

    def make(devices: int, cards: int, built_for: str | None = "13.0"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr("glob.glob", lambda pattern: [f"/dev/nvidia{i}" for i in range(cards)])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_each_local_rank_has_its_own(machine):
    machine(devices=2, cards=2)
    assert [resolve_device("auto", rank).index for rank in range(2)] == [0, 1]
    assert resolve_device("cpu", 7) == torch.device("cpu")
    with pytest.raises(ValueError, match="3 or more processes were started on this machine, which has 2 CUDA devices"):
        resolve_device("auto", 2)


def test_a_process_that_sees_one_device_takes_it(machine):
    machine(devices=1, cards=8)
    assert resolve_device("cuda", 5) == resolve_device("auto", 0) == torch.device("cuda", 0)


def test_broken_cuda_is_not_passed_over_in_silence(machine, caplog, monkeypatch):
    machine(devices=0, cards=2)
    with caplog.at_level(logging.WARNING):
        assert resolve_device("auto") == torch.device("cpu")
    assert "NVIDIA cards" in caplog.text and "CUDA 13.0" in caplog.text and "nvidia-smi" in caplog.text
    with pytest.raises(ValueError, match="train.device is 'cuda', but this machine has NVIDIA cards"):
        resolve_device("cuda")
    caplog.clear()
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert resolve_device("auto") == torch.device("cpu")
    for devices, cards, built_for in ((0, 0, "13.0"), (0, 2, None)):
        machine(devices, cards, built_for)
        assert resolve_device("auto") == torch.device("cpu")
    assert not caplog.records
    with pytest.raises(ValueError, match="is built without CUDA"):
        resolve_device("cuda")


@given(st.lists(st.sampled_from(["cpu a", "cuda a 0", "cuda a 1", "cuda b 0"]), min_size=1, max_size=6))
def test_places_fit_if_alike_and_apart(words):
    places = [Place(*(word.split() + [""])[:3]) for word in words]
    alike = len({place.kind for place in places}) == 1
    apart = all(one != other for one, other in itertools.combinations(places, 2) if one.card)
    if alike and apart:
        require_fitting_places(places)
    else:
        with pytest.raises(
            ValueError, match="same CUDA device" if alike else r"rank \d on [ab] computes on (cpu|cuda)"
        ):
            require_fitting_places(places)


_RANK = """
import os, torch
from volo.runtime import distributed
from volo.runtime.device import Place

kind = os.environ["KIND"]
distributed.place_of = lambda device: Place(kind, "here", os.environ["CARD"])
try:
    distributed.initialise("cpu")
    distributed.shutdown()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((("cuda", "x"), ("cpu", "")), "rank 0 on here computes on cuda, rank 1 on here on cpu."),
        ((("cuda", "x"), ("cuda", "x")), "ranks 0 and 1 on here were given the same CUDA device."),
        ((("cuda", "x"), ("cuda", "y")), ""),
    ],
)
def test_every_rank_learns_that_the_devices_do_not_fit(places, message):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(programs.free_port()), "WORLD_SIZE": "2"}
    ranks = [
        programs.launch(sys.executable, "-c", _RANK, cwd=ROOT, RANK=str(rank), KIND=kind, CARD=card, **address)
        for rank, (kind, card) in enumerate(places)
    ]
    for rank in ranks:
        assert programs.finish(rank).out.startswith(message) and rank.returncode == 0
