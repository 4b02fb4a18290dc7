"""What is measured between two log lines."""

import pytest
import torch
from processes import run_group
from torch.utils._python_dispatch import TorchDispatchMode

from volo.engine.meters import BottleneckHint, Throughput, TrainMeters, _CudaMark
from volo.losses import LossTerms
from volo.runtime.distributed import World


def make_meters() -> TrainMeters:
    return TrainMeters(torch.device("cpu"), BottleneckHint(workers=8, processes=1, cores=16))


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


@pytest.mark.parametrize("ranks_before, ranks_after", [(1, 1), (2, 2), (3, 2), (1, 3)])
def test_sums_of_a_divided_window_add_up(ranks_before, ranks_after):
    """Every rank saves its part; as many ranks as there are afterwards take all of the parts."""
    parts = []
    for rank in range(ranks_before):
        meters = make_meters()
        meters.add_pass(terms(1.0 + rank, 2.0, 3.0), step=0)
        parts += meters.state()
    after = [make_meters() for _ in range(ranks_after)]
    for rank, meters in enumerate(after):
        meters.load_state(parts, World(rank, ranks_after, rank, torch.device("cpu")))
    sums = torch.tensor([part for meters in after for part in meters.state()]).sum(0)
    assert sums.tolist() == [
        sum(1.0 + rank for rank in range(ranks_before)),
        2.0 * ranks_before,
        3.0 * ranks_before,
        ranks_before,
    ]


def test_means_and_rates_by_hand(clock):
    def batches():
        clock.now += 60.0  # workers start, which no rate should show
        yield 0.0
        for total in (1.0, 2.0, 6.0):
            clock.now += 0.5
            yield total

    meters = make_meters()
    timed = meters.timed(batches())
    assert next(timed) == 0.0
    for total in timed:
        clock.now += 1.5
        meters.add_pass(terms(total, total / 2, 10 * total), step=0)
        meters.add_step(8, torch.tensor(total / 4))
    expected = {"loss": 3.0, "loss_cls": 1.5, "loss_dense": 30.0, "grad_norm": 1.5}
    assert meters.close() == pytest.approx(expected | {"images_per_s": 4.0, "data_wait": 0.25})
    assert meters.throughput == Throughput(images=24, seconds=6.0, waited=1.5)

    clock.now += 1000.0  # an evaluation
    meters.restart_clock()
    clock.now += 1.0
    meters.add_pass(terms(7.0), step=1)
    meters.add_step(5, torch.tensor(0.25))
    assert meters.close() == pytest.approx(
        {"loss": 7.0, "loss_cls": 1.0, "loss_dense": 1.0, "grad_norm": 0.25, "images_per_s": 5.0, "data_wait": 0.0}
    ), "nothing is left of the time before"


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
    """The host is free as soon as it has launched a step, and waits for images while the device computes."""
    stream = Stream()
    monkeypatch.setattr("torch.cuda.Event", stream.event)

    def batches():
        for step in range(3):
            stream.host += reading
            yield step

    meters = make_meters()
    meters._mark = _CudaMark
    for step in meters.timed(batches()):
        stream.launch(computing)
        meters.add_pass(terms(1.0), step)
    clock.now += 12.0
    assert meters.close()["data_wait"] == pytest.approx(waited / 12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_loss_that_is_not_finite_is_named(clock, bad):
    meters = make_meters()
    assert meters.first_non_finite() is None
    meters.add_pass(terms(1.0), step=4)
    meters.add_pass(terms(bad, 1.0, bad), step=5)
    meters.add_pass(terms(bad, bad, bad), step=6)
    meters.add_pass(terms(1.0), step=7)
    assert meters.first_non_finite() == (5, ["loss", "loss_dense"])
    clock.now += 1
    meters.close()
    assert meters.first_non_finite() == (5, ["loss", "loss_dense"]), "closing does not forget it"


def test_adding_never_waits_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), function
            return function(*args, **(kwargs or {}))

    meters = make_meters()
    with NoWaiting():
        for _ in meters.timed([None]):
            meters.add_pass(terms(torch.nan), step=0)
            meters.add_step(3, torch.tensor(1.0))


def of_ranks(rank: int, size: int) -> tuple:
    """Rank r adds losses r and 2r; on the last rank one term of step 3 is not finite."""
    meters = make_meters()
    for value in (rank, 2 * rank):
        meters.add_pass(terms(float(value)), step=2)
    meters.add_step(10, torch.tensor(1.0))
    first = meters.first_non_finite()
    means = meters.close()
    if rank == size - 1:
        meters.add_pass(terms(torch.inf, torch.inf), step=3)
    else:
        meters.add_pass(terms(torch.nan), step=4)
    return first, means["loss"], means["images_per_s"] > 0, 0 <= means["data_wait"] <= 1, meters.first_non_finite()


def test_means_are_over_all_ranks_and_every_rank_learns_of_a_bad_loss():
    for size, results in run_group(of_ranks, sizes=(3, 2)).items():
        expected = (None, 1.5 * sum(range(size)) / size, True, True, (3, ["loss", "loss_cls"]))
        assert results == [expected] * size


SLOW, FAST = Throughput(8120, 10.0, 3.7), Throughput(8120, 10.0, 0.99)


def lines_with_hint(*lines: Throughput) -> list[int]:
    hint = BottleneckHint(8, 1, 16)
    return [number for number, throughput in enumerate(lines) if hint(throughput) is not None]


def test_hint_comes_once_after_half_a_minute_and_not_from_the_first_line():
    assert lines_with_hint(*[SLOW] * 20) == [3]
    assert lines_with_hint(*[FAST] * 20) == []
    assert lines_with_hint(Throughput(1, 1000.0, 900.0), *[FAST] * 20) == [], "start-up is left out"
    assert lines_with_hint(*[FAST] * 7, *[SLOW] * 7) == [9], "a loader that becomes slow later is found, too"
    assert lines_with_hint(FAST, Throughput(9, 29.0, 29.0), Throughput(9, 0.5, 0.5), Throughput(9, 0.5, 0.5)) == [3]


@pytest.mark.parametrize(("waited", "given"), [(2.99, False), (3.0, True), (30.0, True)])
def test_hint_is_given_above_a_tenth_of_the_time(waited, given):
    assert lines_with_hint(FAST, Throughput(100, 30.0, waited)) == [1] * given


@pytest.mark.parametrize(
    ("workers", "processes", "cores", "words"),
    [
        (8, 1, 16, ["8 data workers, 812 images/s", "1,289", "More data.workers", "9 of 16 cores"]),
        (8, 4, 64, ["32 data workers on this machine"]),
        (8, 4, 36, ["All 36 cores"]),
        (0, 1, 16, ["reads the images itself, 812 images/s", "Set data.workers"]),
    ],
)
def test_hint_says_how_much_and_what_may_help(workers, processes, cores, words):
    hint = BottleneckHint(workers, processes, cores)
    hint(FAST)
    text = hint(Throughput(812 * 40, 40.0, 14.8))
    assert text is not None and "\n" not in text
    assert all(word in text for word in ["37 %", "scripts/benchmark/loader.py", *words]), text
