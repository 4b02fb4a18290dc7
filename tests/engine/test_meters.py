"""What is measured between two log lines."""

import pytest
import torch
from processes import run_group
from torch.utils._python_dispatch import TorchDispatchMode

from volo.engine.meters import Throughput, Window, _CudaMark
from volo.losses import LossTerms

CPU = torch.device("cpu")


def terms(total: float, cls: float = 1.0, dense: float = 1.0) -> LossTerms:
    return LossTerms(*(torch.tensor(value, requires_grad=True) for value in (total, cls, dense)))


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("volo.engine.meters.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def started(clock) -> Window:
    """A window that has its first wait behind it."""
    window = Window(CPU)
    with window.waiting():
        clock.now += 60.0  # of workers that start
    return window


def test_means_and_rates_by_hand(clock, started):
    window = started
    for total in (1.0, 2.0, 6.0):
        with window.waiting():
            clock.now += 0.5
        clock.now += 1.5
        window.add_losses(terms(total, total / 2, 10 * total), step=0)
        window.count_images(8)
    window.grad_norm = torch.tensor(0.25)
    expected = {"loss": 3.0, "loss_cls": 1.5, "loss_dense": 30.0, "grad_norm": 0.25}
    assert window.close() == pytest.approx(expected | {"images_per_s": 4.0, "data_wait": 0.25})
    assert window.pace == Throughput(images=24, seconds=6.0, waited=1.5)

    clock.now += 1.0
    window.add_losses(terms(7.0), step=1)
    window.count_images(5)
    assert window.close() == pytest.approx(
        {"loss": 7.0, "loss_cls": 1.0, "loss_dense": 1.0, "grad_norm": 0.25, "images_per_s": 5.0, "data_wait": 0.0}
    ), "nothing is left of the window before"


class Stream:
    """A CUDA stream with one clock of the host and one of the device, and the events of torch.cuda."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def event(self, enable_timing: bool):
        assert enable_timing
        stream = self

        class Event:
            def record(self):
                self.at = max(stream.device, stream.host)

            def elapsed_time(self, other):
                return 1000 * (other.at - self.at)

        return Event()


@pytest.mark.parametrize(
    ("reading", "computing", "waited"),
    [
        (0.0, 3.0, 0.0),
        (2.0, 3.0, 0.0),  # hidden behind what is queued
        (4.0, 3.0, 2.0),  # one second in each of two steps
    ],
)
def test_on_cuda_only_an_idle_device_waits(monkeypatch, clock, reading, computing, waited):
    """The host is free at once after it launched a step, and waits for images while the device computes."""
    stream = Stream()
    monkeypatch.setattr("torch.cuda.Event", stream.event)
    window = Window(CPU)
    window._mark = _CudaMark
    for step in range(3):
        with window.waiting():
            stream.host += reading
        stream.launch(computing)
        window.add_losses(terms(1.0), step)
    clock.now += 12.0
    window.count_images(6)
    assert window.close()["data_wait"] == pytest.approx(waited / 12)


def test_what_is_no_training_is_left_out_of_the_rates(clock, started):
    window = started
    clock.now += 1000.0  # an evaluation
    window.restart_clock()
    clock.now += 2.0
    window.add_losses(terms(1.0), step=0)
    window.count_images(4)
    assert window.close()["images_per_s"] == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_loss_that_is_not_finite_is_named(clock, bad):
    window = Window(CPU)
    assert window.first_non_finite() is None
    window.add_losses(terms(1.0), step=4)
    window.add_losses(terms(bad, 1.0, bad), step=5)
    window.add_losses(terms(bad, bad, bad), step=6)
    window.add_losses(terms(1.0), step=7)
    assert window.first_non_finite() == (5, ["loss", "loss_dense"])
    clock.now += 1
    window.close()
    assert window.first_non_finite() == (5, ["loss", "loss_dense"]), "a new window does not forget it"


def test_adding_never_waits_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), function
            return function(*args, **(kwargs or {}))

    window = Window(CPU)
    with NoWaiting(), window.waiting():
        window.add_losses(terms(torch.nan), step=0)
        window.count_images(3)


def of_ranks(rank: int, size: int) -> tuple:
    """Rank r adds losses r and 2r; the last rank meets a loss that is not finite at step 3, in one term."""
    window = Window(CPU)
    for value in (rank, 2 * rank):
        window.add_losses(terms(float(value)), step=2)
    window.count_images(10)
    first = window.first_non_finite()
    means = window.close()
    if rank == size - 1:
        window.add_losses(terms(torch.inf, torch.inf), step=3)
    else:
        window.add_losses(terms(torch.nan), step=4)
    return first, means["loss"], means["images_per_s"] > 0, 0 <= means["data_wait"] <= 1, window.first_non_finite()


def test_means_are_over_all_ranks_and_every_rank_hears_of_a_bad_loss():
    for size, results in run_group(of_ranks, sizes=(3, 2)).items():
        expected = (None, 1.5 * sum(range(size)) / size, True, True, (3, ["loss", "loss_cls"]))
        assert results == [expected] * size
