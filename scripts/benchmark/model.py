#!/usr/bin/env python
"""Time VOLO side by side with timm, in turn in one process: medians and quartiles.

    python scripts/benchmark/model.py --measure op         one outlook attention layer, with its projections
    python scripts/benchmark/model.py --measure inference  the forward pass, and the rate of ViT-S for comparison
    python scripts/benchmark/model.py --measure train      forward and backward pass of a training step
    python scripts/benchmark/model.py --measure profile    where the time of both goes, by kind of work
    python scripts/benchmark/model.py --measure memory     bytes per image kept between forward and backward
    python scripts/benchmark/model.py --measure growth     time and memory against resolution and batch size
    python scripts/benchmark/model.py --measure fit        the largest batch on 24, 40 and 80 GB, per model

Every round times each contender once, one after the other. A ratio is the median of the rounds' own ratios, so
whatever slows the machine for a while slows both sides. A ratio above 1 means that ours is faster. "products
alone" is the time of only the network's matrix products and convolutions, which no kernel of this package can shorten.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from volo.cli import parse_options


@dataclass(frozen=True)
class ModelBenchmarkOptions:
    """What to measure.

    Args:
        measure: "op" is one outlook attention layer, "inference" the forward pass, "train" the forward and backward
            pass, "profile" the kinds of work in both, "memory" the bytes kept for the backward pass, "growth" time and
            memory against resolution and batch size, "fit" the largest batch on 24, 40 and 80 GB.
        model: The network; "fit" takes all published ones.
        img_size: Side of the images in pixels.
        batch_size: Images per step.
        precision: fp32, or autocast to bf16 or fp16.
        device: auto takes CUDA if there is a GPU.
        threads: CPU threads; by default PyTorch's.
        rounds: Number of times that each contender is timed.
        eager_only: Leave out the compiled networks, which take a minute or more.
        json: File to write the result to, too.
    """

    measure: Literal["op", "inference", "train", "profile", "memory", "growth", "fit"]
    model: Literal["volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"] = "volo_d1"
    img_size: int = 224
    batch_size: int = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    rounds: int = 9
    eager_only: bool = False
    json: str | None = None

    def __post_init__(self):
        if self.rounds < 2:
            raise ValueError(f"--rounds is {self.rounds}; it should be 2 or more, for quartiles")
        for name in ("img_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it should be 1 or more")


if __name__ == "__main__":
    options = parse_options(
        ModelBenchmarkOptions,
        sys.argv[1:],
        prog="model.py",
        usage="--measure WHAT [options]",
        description=__doc__.splitlines()[0],
    )

    # Slow imports come after the options are known to be valid.
    from measures import run_benchmark

    from volo.runtime.program import finish

    finish(lambda: run_benchmark(options))
