#!/usr/bin/env python
"""Time VOLO side by side with timm: alternating in one process, medians and spread.

    python scripts/benchmark.py op      one outlook attention layer, with its projections
    python scripts/benchmark.py model   the forward pass of inference, and ViT-S for what its arithmetic costs
    python scripts/benchmark.py train   forward and backward pass of a training step
    python scripts/benchmark.py memory  bytes kept between forward and backward, an image
    python scripts/benchmark.py loader --data FOLDER   images/s a core, beside timm's loader (loader --help)

Every round times each of them once, one right after the other; a ratio is the median of the rounds' own ratios, so
what slows the machine for a while slows both sides of it. A ratio above 1 says that ours is faster.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from volo.models import create_model, list_models  # noqa: E402
from volo.models.blocks import OutlookAttention  # noqa: E402
from volo.models.recompute import Recompute  # noqa: E402

OURS, TIMM, TIMM_COMPILED, VIT = "ours", "timm eager", "timm compiled", "ViT-S (timm)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Step = Callable[[], object]


def main() -> None:
    if sys.argv[1:2] == ["loader"]:
        import benchmark_loader  # with options of its own

        return benchmark_loader.main(sys.argv[2:], cpu_name(), print_table, show_progress)
    args = parse()
    torch.manual_seed(0)
    bench = Bench(args)
    rows, notes = {"op": op, "model": model, "train": train, "memory": memory}[args.what](bench)
    title = f"{args.what}: {args.model} {args.img_size} px, batch {args.batch}, {args.precision}, {bench.machine()}"
    print(title)
    print_table(rows)
    for note in notes:
        print(note)
    if args.json:
        Path(args.json).write_text(json.dumps({"title": title, "rows": rows, "notes": notes}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["op", "model", "train", "memory"])
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
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


class Bench:
    """What is compared, on which device and data, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=self.device)

    def machine(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} threads of {cpu_name()}"

    def ours(self) -> nn.Module:
        return create_model(self.args.model, img_size=self.args.img_size).to(self.device)

    def timm(self, name: str | None = None, **options) -> nn.Module:
        name = name or f"{self.args.model}_{224 if self.args.img_size == 224 else ''}".rstrip("_")
        return timm.create_model(name, img_size=self.args.img_size, **options).to(self.device)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.args.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=True)

    def compiled(self, module: Callable) -> dict[str, Callable]:
        return {} if self.args.eager_only else {TIMM_COMPILED: torch.compile(module)}

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
    layers = {OURS: layer, TIMM: theirs} | bench.compiled(theirs)
    forward = bench.time({name: lambda m=m: run(bench, m, x) for name, m in layers.items()})
    both = bench.time({name: lambda m=m: run_back(bench, m, x) for name, m in layers.items()})
    return table("forward", forward) + table("forward + backward", both), []


def model(bench: Bench) -> tuple[list[dict], list[str]]:
    """Inference, and how much of the multiply-adds a second of ViT-S each of them reaches."""
    ours, theirs = bench.ours().eval(), bench.timm().eval()
    vit = bench.timm("vit_small_patch16_224").eval()
    networks = {OURS: ours, TIMM: theirs} | bench.compiled(theirs) | {VIT: vit}
    macs = {name: count_macs(vit if name == VIT else theirs, bench.images) for name in networks}
    seconds = bench.time({name: lambda m=m: run(bench, m, bench.images) for name, m in networks.items()})
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
    ours, theirs = bench.ours().train(), bench.timm().train()
    networks = {OURS: ours, TIMM: TrainForward(theirs)}
    networks |= bench.compiled(TrainForward(theirs))
    seconds = bench.time({name: lambda m=m: run_back(bench, m, bench.images) for name, m in networks.items()})
    return table("forward + backward", seconds), []


def memory(bench: Bench) -> tuple[list[dict], list[str]]:
    """Bytes that autograd keeps between forward and backward, storages counted once, parameters left out."""
    networks = {}
    for mode in get_args(Recompute):
        networks[f"ours, recompute {mode}"] = bench.ours()
        networks[f"ours, recompute {mode}"].set_recompute(mode)
    networks |= {TIMM: TrainForward(bench.timm()), VIT: bench.timm("vit_small_patch16_224")}
    rows = []
    for name, network in networks.items():
        kept = kept_bytes(bench, network.train())
        rows.append({"what": "kept for backward", "who": name, "MB an image": round(kept / bench.args.batch / 1e6, 1)})
    return rows, []


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


def summed(output: Tensor | tuple) -> Tensor:
    return output.float().sum() if isinstance(output, Tensor) else sum(x.float().sum() for x in output)


def kept_bytes(bench: Bench, network: nn.Module) -> int:
    own = {p.untyped_storage().data_ptr() for p in network.parameters()} | {bench.images.untyped_storage().data_ptr()}
    kept = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), bench.autocast():
        output = summed(network(bench.images))  # held, so that no storage is freed and counted twice
    assert output.requires_grad
    return sum(kept.values())


def count_macs(network: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
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


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
