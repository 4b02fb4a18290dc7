"""What scripts/benchmark/model.py measures. Each measure returns the rows of a table and notes to print below it."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, get_args

import memory as counting
import timm
import torch
from kinds_of_work import profiled
from output import cpu_name, print_table, save_json, show_progress
from passes import TrainForward, count_macs, forward, forward_backward, products
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import Tensor, nn

from volo.models import VOLO, create_model
from volo.models.blocks import OutlookAttention
from volo.models.checkpointing import Recompute
from volo.models.memory import kept_bytes
from volo.published_results import all_published
from volo.runtime.exit_codes import DONE
from volo.runtime.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from model import ModelBenchmarkOptions

OURS, OURS_COMPILED, TIMM, TIMM_COMPILED = "ours", "ours compiled", "timm eager", "timm compiled"
VIT, PRODUCTS = "ViT-S (timm)", "products alone"
VIT_NAME = "vit_small_patch16_224"
RECOMPUTED = ("cheap", "blocks")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_benchmark(options: "ModelBenchmarkOptions") -> int:
    """Measure what ``options`` ask for, print it and save it; return the exit code."""
    torch.manual_seed(0)
    keep_freed_memory()  # as the programs do on the CPU; for the peers, too
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = ModelBench(options)
    rows, notes = MEASURES[options.measure](bench)
    subject = {"fit": "published networks", "growth": options.model}.get(
        options.measure, f"{options.model} {options.img_size} px"
    )
    title = f"{options.measure}: {subject}, batch {options.batch_size}, {options.precision}, {bench.machine()}"
    print(title)
    print_table(rows)
    for note in notes:
        print(note)
    save_json(options.json, title, rows, notes)
    return DONE


class ModelBench:
    """Networks, device, data and the clock."""

    def __init__(self, options: "ModelBenchmarkOptions"):
        self.options = options
        name = options.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        self.images = self.noise(options.img_size)
        dtype = DTYPES[options.precision]
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=True)

    def noise(self, side: int, batch: int | None = None) -> Tensor:
        return torch.randn(batch or self.options.batch_size, 3, side, side, device=self.device)

    def machine(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} threads of {cpu_name()}"

    def ours(self, side: int | None = None, recompute: Recompute = "cheap", name: str | None = None) -> VOLO:
        with self.device:
            network = create_model(name or self.options.model, img_size=side or self.options.img_size)
        network.set_recompute(recompute)
        return network

    def timm(self, name: str | None = None) -> nn.Module:
        with self.device:  # timm has each network at 224 px, which can be made for another size
            return timm.create_model(name or f"{self.options.model}_224", img_size=self.options.img_size)

    def kept_mb(self, network: nn.Module, images: Tensor) -> float:
        """MB per image that ``network`` keeps for its backward pass."""
        shape = (len(images), 3, *images.shape[2:])
        return round(kept_bytes(network, shape, self.device, lambda: self.autocast) / len(images) / 1e6, 1)

    def compiled(self, ours: nn.Module, theirs: nn.Module) -> dict[str, nn.Module]:
        if self.options.eager_only:
            return {}
        return {OURS_COMPILED: torch.compile(ours), TIMM_COMPILED: torch.compile(theirs)}

    def time(self, steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each step, round by round, after two rounds of warmup, in which networks compile."""
        seconds = {name: [] for name in steps}
        for number in range(self.options.rounds + 2):
            for name, step in steps.items():
                self.wait()
                begin = time.perf_counter()
                step()
                self.wait()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - begin)
            show_progress(number + 1, self.options.rounds + 2)
        return seconds

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def op(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """One outlook attention layer of the first stage, projections included, on one input."""
    network = bench.ours()
    layer = next(m for m in network.modules() if isinstance(m, OutlookAttention)).train()
    grid = [side // network.architecture.patch_size for side in network.img_size]
    dim, heads = network.architecture.embed_dims[0], layer.num_heads
    x = torch.randn(bench.options.batch_size, *grid, dim, device=bench.device)
    theirs = TimmOutlookAttention(dim, heads, kernel_size=3, padding=1, stride=2).to(bench.device).train()
    theirs.load_state_dict(layer.state_dict())
    layers = {OURS: layer, TIMM: theirs} | bench.compiled(layer, theirs)
    rows = []
    for what, one_pass in (("forward", forward), ("forward + backward", forward_backward)):
        steps = {name: partial(one_pass, m, x, bench.autocast) for name, m in layers.items()}
        steps[PRODUCTS] = products(layer, x, bench.autocast, backward=one_pass is forward_backward)
        rows += table(what, bench.time(steps))
    return rows, []


def inference(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """The forward pass, and each network's rate of multiply-adds relative to that of ViT-S."""
    ours, theirs = bench.ours().eval(), bench.timm().eval()
    vit = bench.timm(VIT_NAME).eval()
    networks = {OURS: ours, TIMM: theirs} | bench.compiled(ours, theirs) | {VIT: vit}
    steps = {name: partial(forward, m, bench.images, bench.autocast) for name, m in networks.items()}
    steps[PRODUCTS] = products(ours, bench.images, bench.autocast, backward=False)
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


def train(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """Forward and backward of class and token logits, without loss and optimizer, which are the same for both."""
    networks = {f"ours, recompute {mode}": bench.ours(recompute=mode).train() for mode in get_args(Recompute)}
    ours, theirs = networks.pop("ours, recompute cheap"), TrainForward(bench.timm().train())
    networks = {OURS: ours, **networks, TIMM: theirs} | bench.compiled(ours, theirs)
    steps = {name: partial(forward_backward, m, bench.images, bench.autocast) for name, m in networks.items()}
    steps[PRODUCTS] = products(ours, bench.images, bench.autocast, backward=True)
    return table("forward + backward", bench.time(steps)), ["ours is with train.recompute cheap, the CPU's default"]


def profile(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """Milliseconds of each kind of work, without compilation, in inference and in both passes of training."""
    rows = []
    for what, one_pass in (("forward", forward), ("forward + backward", forward_backward)):
        training = one_pass is forward_backward
        networks = {OURS: bench.ours(), TIMM: TrainForward(bench.timm()) if training else bench.timm()}
        steps = {n: partial(one_pass, m.train(training), bench.images, bench.autocast) for n, m in networks.items()}
        for step in steps.values():
            step()  # warmup
        spent = [
            {name: profiled(step, bench.device.type) for name, step in steps.items()}
            for _ in range(bench.options.rounds)
        ]
        for kind in spent[0][OURS]:
            median = {f"{name}, ms": statistics.median(found[name][kind] for found in spent) for name in steps}
            if any(median.values()):
                rows.append({"what": what, "kind": kind} | {column: round(ms, 1) for column, ms in median.items()})
    return rows, ["these numbers include the time of the profiler itself"]


def memory(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """Bytes that autograd keeps between forward and backward, each storage once, without parameters."""
    networks = {f"ours, recompute {mode}": bench.ours(recompute=mode) for mode in get_args(Recompute)}
    networks |= {TIMM: TrainForward(bench.timm()), VIT: bench.timm(VIT_NAME)}
    return [
        {"what": "kept for backward", "who": name, "MB per image": bench.kept_mb(network, bench.images)}
        for name, network in networks.items()
    ], []


def growth(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """Time and memory against resolution at one batch size, and against batch size at one resolution."""
    rows = []
    batch_size = bench.options.batch_size
    points = [(side, batch_size) for side in (224, 384, 448, 512)]
    for side, batch in points + [(224, batch) for batch in (1, 2, 4, 8, 16, 32) if batch != batch_size]:
        network, images = bench.ours(side), bench.noise(side, batch)
        steps = {
            "forward": lambda n=network, x=images: forward(n.eval(), x, bench.autocast),
            "forward + backward": lambda n=network, x=images: forward_backward(n.train(), x, bench.autocast),
        }
        times = {what: statistics.median(seconds) for what, seconds in bench.time(steps).items()}
        row = {"image side": side, "batch": batch}
        row |= {f"{what}, ms per image": round(1000 * time / batch, 1) for what, time in times.items()}
        row |= {f"{mode}, MB per image": bench.kept_mb(bench.ours(side, mode), images) for mode in RECOMPUTED}
        rows.append(row)
    return rows, []


def fit(bench: ModelBench) -> tuple[list[dict], list[str]]:
    """The largest batch on GPUs of three sizes, for every published network."""
    rows = []
    for network in all_published():
        row, side = {"network": network.key}, network.resolution
        for mode in RECOMPUTED:
            mb = bench.kept_mb(bench.ours(side, mode, network.name), bench.noise(side))
            row |= {f"{mode}, MB per image": mb, f"{mode}, batch": counting.batches(mb * 1e6, network.params)}
        rows.append(row)
    return rows, [" ".join((counting.__doc__ or "").split())]


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


MEASURES = {
    "op": op,
    "inference": inference,
    "train": train,
    "profile": profile,
    "memory": memory,
    "growth": growth,
    "fit": fit,
}
