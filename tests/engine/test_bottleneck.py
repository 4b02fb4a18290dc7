"""The one sentence about a loader that is the bottleneck: when, how much, and what may help."""

import pytest

from volo.engine.bottleneck import LoaderVerdict
from volo.engine.meters import Throughput


def said_by(verdict: LoaderVerdict, *paces: Throughput) -> list[int]:
    """At which log lines, counted from 0, something is said."""
    return [line for line, pace in enumerate(paces) if verdict(pace) is not None]


def verdict(workers: int = 8, processes: int = 1, cores: int = 16) -> LoaderVerdict:
    return LoaderVerdict(workers, processes, cores)


SLOW, FAST = Throughput(8120, 10.0, 3.7), Throughput(8120, 10.0, 0.99)


def test_it_is_said_once_after_half_a_minute_and_not_by_the_first_line():
    assert said_by(verdict(), *[SLOW] * 20) == [3]
    assert said_by(verdict(), *[FAST] * 20) == []
    assert said_by(verdict(), Throughput(1, 1000.0, 900.0), *[FAST] * 20) == [], "the warm-up counts for nothing"
    assert said_by(verdict(), *[FAST] * 7, *[SLOW] * 7) == [9], "a loader that becomes slow later is found, too"
    assert said_by(verdict(), FAST, Throughput(9, 29.0, 29.0), Throughput(9, 0.5, 0.5), Throughput(9, 0.5, 0.5)) == [3]


@pytest.mark.parametrize(("waited", "says"), [(2.99, False), (3.0, True), (30.0, True)])
def test_from_a_tenth_of_the_time_on(waited, says):
    judge = verdict()
    judge(FAST)
    assert (judge(Throughput(100, 30.0, waited)) is not None) == says


@pytest.mark.parametrize(
    ("workers", "processes", "cores", "told"),
    [
        (8, 1, 16, "8 data.workers read, 812 images/s are trained on, the network could take 1,289. More data.workers"),
        (8, 1, 16, "may help (they and the training take 9 of 16 cores)"),
        (8, 4, 64, "32 data.workers of this machine read, "),
        (8, 4, 36, "All 36 cores are taken: more cores, or images that are stored smaller or nearer"),
        (0, 1, 16, "the training process itself reads, 812 images/s"),
        (0, 2, 16, "Set data.workers to read ahead"),
    ],
)
def test_how_much_and_what_may_help(workers, processes, cores, told):
    judge = verdict(workers, processes, cores)
    judge(FAST)
    words = judge(Throughput(812 * 40, 40.0, 14.8))
    assert words.startswith("the loader is the bottleneck: the network waits 37 % of the time for images.")
    assert told in words
    assert words.endswith("scripts/benchmark/loader.py tells where the time goes") and "\n" not in words
