#!/usr/bin/env python
"""Estimate, without a GPU, how long the operators of a training step would take a card that ran each at its peak.

    python scripts/benchmark/roofline.py --networks volo_d1:224:128 --card H100

A step of train.py in bf16 autocast (network, token-labeling loss without label maps, AdamW, EMA) runs on tensors that
have shapes and no values, and every operator is counted: its floating-point operations (matrix products, convolutions
and attention; a multiply-add is two) and the bytes of the tensors that it reads and writes. Its time is the larger of
operations / peak and bytes / bandwidth; the table sums it by kind of work. That is a lower bound for these operators,
one kernel each: it leaves out what it takes to launch them, the host, the loader, the copy and normalisation of images,
the card's cache, and how far each kernel stays below the peak. Nothing is measured.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from volo.cli import parse_options


@dataclass(frozen=True)
class RooflineOptions:
    """What to count.

    Args:
        networks: Comma-separated NAME:IMAGE_SIDE:BATCH.
        variants: Comma-separated positions in VARIANTS of counted_step.py, counted from 0: ways to run a step.
        card: The card, in its SXM version: H100 has 989 dense bf16 TFLOP/s and 3.35 TB/s, H200 989 and 4.8, A100 312
            and 2.039 (NVIDIA's data sheets).
        tflops: Dense bf16 TFLOP/s, instead of the card's.
        terabytes_per_second: Memory bandwidth in TB/s, instead of the card's.
        json: File to write the result to, too: operators, TFLOP, GB and ms of every kind of work.
    """

    networks: str = "volo_d1:224:128"
    variants: str = "0,1,2,3,4"
    card: Literal["H100", "H200", "A100"] = "H100"
    tflops: float | None = None
    terabytes_per_second: float | None = None
    json: str | None = None

    def __post_init__(self):
        for name in ("tflops", "terabytes_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} is {value}; it should be above 0")


if __name__ == "__main__":
    options = parse_options(
        RooflineOptions, sys.argv[1:], prog="roofline.py", usage="[options]", description=__doc__.splitlines()[0]
    )

    # What takes seconds to import comes after the options are known to be right.
    from counted_step import run_benchmark

    from volo.runtime.program import finish

    finish(lambda: run_benchmark(options))
