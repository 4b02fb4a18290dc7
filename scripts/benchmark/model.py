#!/usr/bin/env python
"""Time VOLO side by side with timm: alternating in one process, medians and spread.

    python scripts/benchmark/model.py op      one outlook attention layer, with its projections
    python scripts/benchmark/model.py model   the forward pass of inference, and ViT-S for what its arithmetic costs
    python scripts/benchmark/model.py train   forward and backward pass of a training step
    python scripts/benchmark/model.py profile where the time of ours and timm's goes, by kind of work
    python scripts/benchmark/model.py memory  bytes kept between forward and backward, an image
    python scripts/benchmark/model.py growth  time and memory against resolution and batch
    python scripts/benchmark/model.py fit     the batch that 24, 40 and 80 GB have room for, for every published network
    python scripts/benchmark/model.py loader --data FOLDER   images/s a core, beside timm's loader (loader --help)

Every round times each of them once, one right after the other; a ratio is the median of the rounds' own ratios, so
what slows the machine for a while slows both sides of it. A ratio above 1 says that ours is faster. "products alone" is
the time of the same network's matrix products and convolutions and nothing else, which no kernel of ours can shorten.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import memory as memory_of
import timm
import torch
import torch.nn.functional as F
from memory import batches, kept_bytes, summed
from output import cpu_name, print_table, show_progress
from profiling import profiled
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from volo.models import create_model, list_models
from volo.models.blocks import OutlookAttention
from volo.models.checkpointing import Recompute
from volo.published_results import all_published

OURS, OURS_COMPILED, TIMM, TIMM_COMPILED = "ours", "ours compiled", "timm eager", "timm compiled"
VIT, PRODUCTS = "ViT-S (timm)", "products alone"
VIT_NAME = "vit_small_patch16_224"
RECOMPUTED = ("cheap", "blocks")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Step = Callable[[], object]


def main() -> None:
    if sys.argv[1:2] == ["loader"]:
        import loader  # with options of its own

        return loader.main(sys.argv[2:])
    args = parse()
    torch.manual_seed(0)
    bench = Bench(args)
    rows, notes = WHAT[args.what](bench)
    subject = {"fit": "published networks", "growth": args.model}.get(args.what, f"{args.model} {args.img_size} px")
    title = f"{args.what}: {subject}, batch {args.batch}, {args.precision}, {bench.machine()}"
    print(title)
    print_table(rows)
    for note in notes:
        print(note)
    if args.json:
        Path(args.json).write_text(json.dumps({"title": title, "rows": rows, "notes": notes}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--model", default="volo_d1", choices=list_models(), help="the network (default: volo_d1)")
    parser.add_argument("--img-size", type=int, default=224, help="image side in pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="fp32, or autocast to bf16 or fp16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is timed (default: 9)")
    parser.add_argument("--eager-only", action="store_true", help="leave out what is compiled (a minute or more)")
    parser.add_argument("--json", help="write the result to this file too")
    args = parser.parse_args()
    if not args.model.startswith("volo_d"):
        parser.error(f"--model {args.model}: timm has volo_d1 ... volo_d5 to compare with")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2, for the spread")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


class Bench:
    """What is compared, on which device and data, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.images = self.noise(args.img_size)

    def noise(self, side: int, batch: int | None = None) -> Tensor:
        return torch.randn(batch or self.args.batch, 3, side, side, device=self.device)

    def machine(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} threads of {cpu_name()}"

    def ours(self, side: int | None = None, recompute: Recompute = "cheap", name: str | None = None) -> nn.Module:
        with self.device:
            network = create_model(name or self.args.model, img_size=side or self.args.img_size)
        network.set_recompute(recompute)
        return network

    def timm(self, name: str | None = None, **options) -> nn.Module:
        with self.device:  # timm has each network at 224, and takes another side for it
            return timm.create_model(name or f"{self.args.model}_224", img_size=self.args.img_size, **options)

    def kept_mb(self, network: nn.Module, images: Tensor) -> float:
        """MB an image that ``network`` keeps for its backward pass."""
        return round(kept_bytes(network, images, self.autocast()) / len(images) / 1e6, 1)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.args.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=True)

    def compiled(self, ours: Callable, theirs: Callable) -> dict[str, Callable]:
        if self.args.eager_only:
            return {}
        return {OURS_COMPILED: torch.compile(ours), TIMM_COMPILED: torch.compile(theirs)}

    def time(self, steps: dict[str, Step]) -> dict[str, list[float]]:
        """Seconds of each step, round by round; two rounds of warmup, which compile what is compiled."""
        seconds = {name: [] for name in steps}
        for number in range(self.args.rounds + 2):
            for name, step in steps.items():
                self.wait()
                begin = time.perf_counter()
                step()
                self.wait()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - begin)
            show_progress(number + 1, self.args.rounds + 2)
        return seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def op(bench: Bench) -> tuple[list[dict], list[str]]:
    """One outlook attention layer of the first stage, projections included, on one input."""
    from timm.models.volo import OutlookAttention as TimmOutlookAttention

    network = bench.ours()
    layer = next(m for m in network.modules() if isinstance(m, OutlookAttention)).train()
    grid = [side // network.architecture.patch_size for side in network.img_size]
    dim, heads = network.architecture.embed_dims[0], layer.num_heads
    x = torch.randn(bench.args.batch, *grid, dim, device=bench.device)
    theirs = TimmOutlookAttention(dim, heads, kernel_size=3, padding=1, stride=2).to(bench.device).train()
    theirs.load_state_dict(layer.state_dict())
    layers = {OURS: layer, TIMM: theirs} | bench.compiled(layer, theirs)
    steps = {name: lambda m=m: run(bench, m, x) for name, m in layers.items()}
    forward = bench.time(steps | {PRODUCTS: products(bench, layer, x, backward=False)})
    steps = {name: lambda m=m: run_back(bench, m, x) for name, m in layers.items()}
    both = bench.time(steps | {PRODUCTS: products(bench, layer, x, backward=True)})
    return table("forward", forward) + table("forward + backward", both), []


def model(bench: Bench) -> tuple[list[dict], list[str]]:
    """Inference, and how much of the multiply-adds a second of ViT-S each of them reaches."""
    ours, theirs = bench.ours().eval(), bench.timm().eval()
    vit = bench.timm(VIT_NAME).eval()
    networks = {OURS: ours, TIMM: theirs} | bench.compiled(ours, theirs) | {VIT: vit}
    steps = {name: lambda m=m: run(bench, m, bench.images) for name, m in networks.items()}
    steps[PRODUCTS] = products(bench, ours, bench.images, backward=False)
    macs = {name: count_macs(vit if name == VIT else theirs, bench.images) for name in steps}
    seconds = bench.time(steps)
    rows = table("forward", seconds)
    for row in rows:
        row["GMACs"] = round(macs[row["who"]] / 1e9, 2)
        rate = [
            (macs[row["who"]] / s) / (macs[VIT] / v) for s, v in zip(seconds[row["who"]], seconds[VIT], strict=True)
        ]
        row["MACs/s of ViT-S, %"] = round(100 * statistics.median(rate), 1)
    return rows, []


def train(bench: Bench) -> tuple[list[dict], list[str]]:
    """Forward and backward of class and token logits; neither loss nor optimizer, which are the same for both."""
    networks = {f"ours, recompute {mode}": bench.ours(recompute=mode).train() for mode in get_args(Recompute)}
    ours, theirs = networks.pop("ours, recompute cheap"), TrainForward(bench.timm().train())
    networks = {OURS: ours, **networks, TIMM: theirs} | bench.compiled(ours, theirs)
    steps = {name: lambda m=m: run_back(bench, m, bench.images) for name, m in networks.items()}
    seconds = bench.time(steps | {PRODUCTS: products(bench, ours, bench.images, backward=True)})
    return table("forward + backward", seconds), ["ours recomputes what is cheap, as by default (train.recompute)"]


def profile(bench: Bench) -> tuple[list[dict], list[str]]:
    """Milliseconds of each kind of work, eager: in a forward pass of inference, and in both passes of training."""
    rows = []
    for what, step in (("forward", run), ("forward + backward", run_back)):
        networks = {OURS: bench.ours(), TIMM: bench.timm() if step is run else TrainForward(bench.timm())}
        once = {name: partial(step, bench, m.train(step is run_back), bench.images) for name, m in networks.items()}
        for first in once.values():
            first()
        spent = [{who: profiled(one, bench.device.type) for who, one in once.items()} for _ in range(bench.args.rounds)]
        for kind in spent[0][OURS]:
            median = {f"{who}, ms": statistics.median(found[who][kind] for found in spent) for who in once}
            rows.append({"what": what, "kind": kind} | {who: round(ms, 1) for who, ms in median.items()})
    return rows, ["the profiler itself takes time, which is in these numbers"]


def memory(bench: Bench) -> tuple[list[dict], list[str]]:
    """Bytes that autograd keeps between forward and backward, storages counted once, parameters left out."""
    networks = {f"ours, recompute {mode}": bench.ours(recompute=mode) for mode in get_args(Recompute)}
    networks |= {TIMM: TrainForward(bench.timm()), VIT: bench.timm(VIT_NAME)}
    return [
        {"what": "kept for backward", "who": name, "MB an image": bench.kept_mb(network, bench.images)}
        for name, network in networks.items()
    ], []


def growth(bench: Bench) -> tuple[list[dict], list[str]]:
    """What resolution costs in time and memory, at one batch, and what the batch does, at one resolution."""
    rows = []
    batches_apart = [batch for batch in (1, 2, 4, 8, 16, 32) if batch != bench.args.batch]
    points = [(side, bench.args.batch) for side in (224, 384, 448, 512)]
    for side, batch in points + [(224, batch) for batch in batches_apart]:
        network, images = bench.ours(side), bench.noise(side, batch)
        steps = {
            "forward": lambda n=network, x=images: run(bench, n.eval(), x),
            "forward + backward": lambda n=network, x=images: run_back(bench, n.train(), x),
        }
        times = {what: statistics.median(seconds) for what, seconds in bench.time(steps).items()}
        row = {"image side": side, "batch": batch}
        row |= {f"{what}, ms an image": round(1000 * time / batch, 1) for what, time in times.items()}
        row |= {f"{mode}, MB an image": bench.kept_mb(bench.ours(side, mode), images) for mode in RECOMPUTED}
        rows.append(row)
    return rows, []


def fit(bench: Bench) -> tuple[list[dict], list[str]]:
    """The batch that GPUs have room for, for every published network."""
    rows = []
    for network in all_published():
        row, side = {"network": network.key}, network.resolution
        for mode in RECOMPUTED:
            mb = bench.kept_mb(bench.ours(side, mode, network.name), bench.noise(side))
            row |= {f"{mode}, MB an image": mb, f"{mode}, batch": batches(mb * 1e6, network.params)}
        rows.append(row)
    return rows, [memory_of.__doc__.replace("\n", " ").strip()]


class TrainForward(nn.Module):
    """timm's VOLO as it is trained: class and token logits (its own forward leaves the token head to evaluation)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        forward = getattr(self.network, "forward_train", self.network)
        return forward(images)[:2]


@torch.no_grad()
def run(bench: Bench, network: nn.Module, x: Tensor) -> None:
    with bench.autocast():
        network(x)


def run_back(bench: Bench, network: nn.Module, x: Tensor) -> None:
    with bench.autocast():
        total = summed(network(x.detach().requires_grad_(x.shape[1] != 3)))
    total.backward()
    network.zero_grad()


def products(bench: Bench, network: nn.Module, x: Tensor, backward: bool) -> Step:
    """Return a step of the linear layers and convolutions of ``network`` alone, on inputs of the shapes they get."""
    calls = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        data, grad = torch.randn_like(inputs[0]), torch.randn_like(output)
        if not backward and data.ndim == 4 and isinstance(module, nn.Conv2d):
            data = data.contiguous(memory_format=torch.channels_last)  # the faster order, which ours has there
        calls.append((module, data.requires_grad_(backward), grad))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    was_training = network.training
    with torch.no_grad():
        network.train()(x)  # in training every layer is called by itself
    network.train(was_training)
    for hook in hooks:
        hook.remove()

    def step() -> None:
        with torch.set_grad_enabled(backward):
            for module, data, grad in calls:
                with bench.autocast():
                    if isinstance(module, nn.Linear):
                        y = F.linear(data, module.weight)
                    else:
                        y = F.conv2d(data, module.weight, None, module.stride, module.padding)
                if backward:
                    torch.autograd.grad(y, (data, module.weight), grad.to(y.dtype))

    return step


def count_macs(network: nn.Module, images: Tensor) -> int:
    # The counter knows products, and not every fused attention that is made of them.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(images)
    return counter.get_total_flops() // 2


def table(what: str, seconds: dict[str, list[float]]) -> list[dict]:
    rows = []
    for name, values in seconds.items():
        ratios = [other / ours for other, ours in zip(values, seconds[OURS], strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "what": what,
                "who": name,
                "median, ms": round(1000 * statistics.median(values), 2),
                "quartiles": f"{1000 * low:.2f} - {1000 * high:.2f}",
                "time of ours": round(statistics.median(ratios), 2),
            }
        )
    return rows


WHAT = {"op": op, "model": model, "train": train, "profile": profile, "memory": memory, "growth": growth, "fit": fit}

if __name__ == "__main__":
    main()
