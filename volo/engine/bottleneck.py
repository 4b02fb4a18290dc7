"""Says, once a run, that the network waits for images, by how much, and what may help."""

from volo.engine.meters import Throughput

_LEAST_SHARE = 0.1
_LEAST_SECONDS, _LEAST_LINES = 30.0, 2


class LoaderVerdict:
    """Judges by half a minute at a time, from the second log line on: with the first the queues are still full.

    Args:
        workers: Processes that read images, for each process that trains.
        processes: Processes that train on this machine.
        cores: Cores that they may use.
    """

    def __init__(self, workers: int, processes: int, cores: int):
        self._workers, self._processes, self._cores = workers, processes, cores
        self._lines = 0
        self._pace = Throughput()
        self._said = False

    def __call__(self, pace: Throughput) -> str | None:
        """Take the pace of one log line; return what is to be said, once, where images are waited for."""
        self._lines += 1
        if self._said or self._lines < _LEAST_LINES:
            return None
        self._pace += pace
        if self._pace.seconds < _LEAST_SECONDS:
            return None
        judged, self._pace = self._pace, Throughput()
        if judged.waited < _LEAST_SHARE * judged.seconds:
            return None
        self._said = True
        return self._words(judged)

    def _words(self, pace: Throughput) -> str:
        share, rate = pace.waited / pace.seconds, pace.images / pace.seconds
        could = f", the network could take {rate / (1 - share):,.0f}" if share < 0.99 else ""
        readers = self._processes * self._workers
        if readers == 0:
            who, advice = "the training process itself reads", "set data.workers to read ahead"
        else:
            who = f"{readers} data.workers{' of this machine' if self._processes > 1 else ''} read"
            idle = self._cores - readers - self._processes
            advice = (
                f"more data.workers may help (they and the training take {readers + self._processes} of "
                f"{self._cores} cores)"
                if idle > 0
                else f"all {self._cores} cores are taken: more cores, or images that are stored smaller or nearer"
            )
        return (
            f"the loader is the bottleneck: the network waits {100 * share:.0f} % of the time for images. {who}, "
            f"{rate:,.0f} images/s are trained on{could}. {advice[0].upper()}{advice[1:]}; "
            "scripts/benchmark/loader.py tells where the time goes"
        )
