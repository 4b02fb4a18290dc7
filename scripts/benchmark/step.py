#!/usr/bin/env python
"""Time whole optimizer steps and inference on the device, beside timm's VOLO in the same process.

    python scripts/benchmark/step.py --networks volo_d1:224:128,volo_d5:512:30 --json step.json

A step of ours is what train.py does once a batch is read: copy to the device, normalise, erase, MixToken, network,
token-labeling loss, AdamW, EMA. "forward, backward" is the network alone; with --images there is "train, loader in
front", too, where data workers read and augment each batch first. A step of timm's is its network with the same
optimizer, a cross-entropy on both heads and its EMA, on images that are already normalised on the device. "host" is how
long it takes to queue a step on an idle device: if that is close to the whole step, the device waits for the host. "of
peak" compares the matrix products of a step, three times those of a forward pass, with the card's dense peak in bf16.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from volo.cli import parse_options


@dataclass(frozen=True)
class StepOptions:
    """What to time.

    Args:
        networks: Comma-separated NAME:IMAGE_SIDE:BATCH.
        variants: Comma-separated positions in VARIANTS of contending_steps.py, counted from 0: ways to run ours.
        training: Time optimizer steps.
        inference: Time forward passes in evaluation mode.
        compile: Also time timm compiled, and our inference compiled.
        images: Folder of images, sorted into classes or not: also time training with the loader in front.
        workers: Data workers of that loader; by default one per core, up to 16.
        profile: Also list the time of each kind of work in one step of ours: on CUDA that of the kernels, by the
            operators that launched them.
        largest: Instead of timing, find the largest batch that trains, from the network's batch up, to an eighth.
        steps: Steps per round.
        rounds: Rounds; the median is reported.
        device: Where to run; "auto" takes CUDA if it is there.
        json: Also write the rows to this file.
    """

    networks: str = "volo_d1:224:128"
    variants: str = "0,1,2,3"
    training: bool = True
    inference: bool = True
    compile: bool = False
    images: str | None = None
    workers: int | None = None
    profile: bool = False
    largest: bool = False
    steps: int = 10
    rounds: int = 5
    device: Literal["auto", "cuda", "cpu"] = "auto"
    json: str | None = None


if __name__ == "__main__":
    options = parse_options(
        StepOptions, sys.argv[1:], prog="step.py", usage="[options]", description=__doc__.splitlines()[0]
    )

    # What takes seconds to import comes after the options are known to be right.
    from contending_steps import run_benchmark

    from volo.runtime.program import finish

    finish(lambda: run_benchmark(options))
