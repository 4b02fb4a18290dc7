"""The loader of a training run: the time of its parts, and its speed by number of workers."""

import time
from statistics import median

from contenders import LoaderBench

from volo.data.dataset import TrainImages
from volo.data.loader import TrainLoader, train_loader
from volo.data.pixels.decode import read_header
from volo.data.pixels.transforms import TrainTransform
from volo.runtime.distributed import usable_cores
from volo.runtime.rng import generator, torch_seed


def stages(bench: LoaderBench) -> list[dict]:
    """Return the milliseconds per image of each part of the token-label recipe."""
    transform = TrainTransform(bench.recipe, bench.image_hw)
    spent: dict[str, list[float]] = {}
    for epoch in range(bench.options.rounds + 1):  # the first is warmup
        times = dict.fromkeys(("read", "header", "draw", "decode", "apply", "labels", "collate"), 0.0)
        images = TrainImages(bench.records, transform, 0, "fail", "ignore", bench.source)
        for index in range(len(bench.records)):
            marks = [time.thread_time()]
            data, name = bench.records.read(index), bench.records.location(index)
            marks.append(time.thread_time())
            image = read_header(data, name)
            marks.append(time.thread_time())
            torch_seed(0, "erase", epoch, index)
            plan = transform.draw(generator(0, "augment", epoch, index), image.width, image.height)
            marks.append(time.thread_time())
            pixels = image.decode(transform.box_needed(plan, image.hw))
            marks.append(time.thread_time())
            transform.apply(pixels, plan)
            marks.append(time.thread_time())
            bench.source.transformed(index, plan, image.hw, bench.image_hw)
            marks.append(time.thread_time())
            for stage, begin, end in zip(times, marks, marks[1:], strict=False):
                times[stage] += end - begin
        for start in range(0, len(bench.records), bench.options.batch_size):
            some = range(start, min(start + bench.options.batch_size, len(bench.records)))
            samples = [images[epoch, index] for index in some]
            begin = time.thread_time()
            images.collate(samples)
            times["collate"] += time.thread_time() - begin
        for stage, value in times.items():
            spent.setdefault(stage, []).append(value / len(bench.records))
    return [
        {"what": "token-label recipe, ours", "stage": stage, "ms per image": round(1000 * median(values[1:]), 3)}
        for stage, values in spent.items()
    ]


def by_workers(bench: LoaderBench) -> list[dict]:
    """Return the images per second of the token-label recipe in a run, by the number of workers."""
    cores = usable_cores()
    tried = bench.options.workers
    if tried is None:
        tried = sorted({min(2**i, cores) for i in range(cores.bit_length() + 1)})
    rows = []
    for workers in tried:
        loader = train_loader(
            bench.records,
            TrainTransform(bench.recipe, bench.image_hw),
            seed=0,
            global_batch=min(bench.options.batch_size, len(bench.records)),
            workers=workers,
            sidecar=bench.source,
        )
        for _ in loader.epoch(0):  # starts the workers and caches the files
            pass
        rates = [_rate(loader, epoch) for epoch in range(1, bench.options.rounds + 1)]
        rows.append({"what": "token-label recipe, ours", "workers": workers, "images/s": round(median(rates), 1)})
    return rows


def _rate(loader: TrainLoader, epoch: int) -> float:
    begin = time.perf_counter()
    count = sum(len(batch) for batch in loader.epoch(epoch))
    return count / (time.perf_counter() - begin)
