"""Optimizer steps and inference of ours and of timm, on one device: how each is built and timed."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import timm
import torch
from cards import card_of
from contenders import find_images
from kinds_of_work import profiled, ranges_of
from networks import Network, networks_of, variants_of
from our_steps import OurSteps, whole_step
from output import cpu_name, print_table, save_json
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from volo.data.sources.records import ImageRecords
from volo.models import create_model
from volo.runtime.host_memory import keep_freed_memory
from volo.runtime.program import checking_usage

if TYPE_CHECKING:
    from step import StepOptions

MOST_IMAGES = 20_000  # of a folder
# recompute, channels_last, compile
VARIANTS = {
    "none": ("none", False, False),
    "none, channels_last": ("none", True, False),
    "cheap, channels_last": ("cheap", True, False),
    "blocks, channels_last": ("blocks", True, False),
    "none, channels_last, compile": ("none", True, True),
}


def run_benchmark(options: "StepOptions") -> int:
    """Time what the options ask for, print and save the table; return the exit code."""
    cuda = options.device == "cuda" or options.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu":
        keep_freed_memory()  # as the programs do; for the peer, too
    rows, profiles = [], []
    with checking_usage():
        networks, _ = networks_of(options.networks), variants_of(options.variants, VARIANTS)
        records = find_images(options.images, MOST_IMAGES) if options.images else None
    for network in networks:
        if options.largest:
            rows.append(largest_batches(options, network, device))
            print(*rows[-1].values(), sep="  ", flush=True)
            continue
        flops = forward_flops(network)
        for what, who, step in contenders(options, network, device, records):
            row = {"network": str(network), "what": what, "who": who} | timed(options, step, network.batch, device)
            if card := card_of(card_name(device)):
                passes = 1 if what == "inference" else 3
                row["of peak, %"] = round(100 * passes * flops * row.get("images/s", 0) / card.flops, 1)
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
            if options.profile and what == "train" and who.startswith("ours") and row["images/s"]:
                profiles += profile_rows(row, step, device)
    title = f"optimizer steps and inference: {card_name(device)}, torch {torch.__version__}, timm {timm.__version__}"
    print(title)
    print_table(rows)
    if profiles:
        print("\nwhere the time of a step goes (kernels on CUDA; the profiler's own time included)")
        print_table(profiles)
    save_json(options.json, title, rows + profiles, [])
    return 0


def contenders(
    options: "StepOptions", network: Network, device: torch.device, records: ImageRecords | None
) -> Iterator[tuple[str, str, Callable]]:
    """Yield (what is timed, name, step); each is built when its turn comes, and freed after it."""
    compiled = (False, True) if options.compile else (False,)
    if options.training:
        for who in variants_of(options.variants, VARIANTS):
            ours = OurSteps(network, device, *VARIANTS[who], workers=options.workers)
            yield "train", f"ours {who}", ours.whole
            yield "forward, backward", f"ours {who}", ours.passes
            if records is not None:
                yield "train, loader in front", f"ours {who}", ours.loaded(records)
            del ours
        for last in (False, True):
            for fast in compiled if last else (False,):
                name = "timm" + ", channels_last" * last + ", compile" * fast
                yield "train", name, timm_step(network, device, last, fast)
    if options.inference:
        for fast in compiled:
            for who, build in (("ours", our_network), ("timm", timm_network)):
                model = build(network, device).eval()
                if fast:
                    model.compile()
                yield "inference", who + ", compile" * fast, forward(model, noise(network, device))


def timm_step(network: Network, device: torch.device, channels_last: bool, compile: bool) -> Callable:
    model = timm_network(network, device, drop_path_rate=0.1).train()
    images = noise(network, device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.9999)
    target = torch.randint(1000, (network.batch,), device=device)
    forward_train = torch.compile(model.forward_train) if compile else model.forward_train

    def step(number: int) -> None:
        with autocast(device):
            features, tokens, _ = forward_train(images)
            cls = model.head(features)  # timm's forward_train leaves it out
        loss = cross_entropy(cls.float(), target)
        loss = loss + 0.5 * cross_entropy(tokens.float().flatten(0, 1), target.repeat_interleave(tokens.shape[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    return step


def forward(model: nn.Module, images: Tensor) -> Callable:
    def step(number: int) -> None:
        with torch.inference_mode(), autocast(images.device):
            model(images)

    return step


def autocast(device: torch.device) -> torch.autocast:
    """Return what train.precision auto gives: bf16 on CUDA, fp32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def our_network(network: Network, device: torch.device) -> nn.Module:
    return create_model(network.name, img_size=network.side).to(device)


def timm_network(network: Network, device: torch.device, **options) -> nn.Module:
    return timm.create_model(f"{network.name}_224", img_size=network.side, **options).to(device)


def noise(network: Network, device: torch.device) -> Tensor:
    return torch.randn(network.batch, 3, network.side, network.side, device=device)


def largest_batches(options: "StepOptions", network: Network, device: torch.device) -> dict:
    """Return the largest batch that each of the variants, and timm, can take two training steps with."""
    row: dict[str, str | int] = {"network": f"{network.name}:{network.side}"}
    builders = {
        f"ours {who}": partial(
            whole_step,
            device=device,
            recompute=VARIANTS[who][0],
            channels_last=VARIANTS[who][1],
            compile=VARIANTS[who][2],
        )
        for who in variants_of(options.variants, VARIANTS)
    }
    builders["timm, channels_last"] = partial(timm_step, device=device, channels_last=True, compile=False)

    def fits(build: Callable, batch: int) -> bool:
        try:
            step = build(replace(network, batch=batch))
            for number in range(2):
                step(number)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    most = network.batch if device.type == "cpu" else 2**20  # where no batch is refused
    for who, build in builders.items():
        row[who] = largest(partial(fits, build), network.batch, most)
    return row


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Return a batch size that fits, at most an eighth below the largest that does; 0 if none does.

    Args:
        fits: Tells whether a batch fits; if one does, so do all that are smaller.
        start: Where to begin to look.
        most: No larger one is tried.
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(low // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def profile_rows(row: dict, step: Callable, device: torch.device) -> list[dict]:
    """Return the milliseconds of each kind of work in one step, which has been warmed up."""
    with ranges_of(step.__self__.learner):
        spent = profiled(partial(step, 0), device.type)
    return [
        {"network": row["network"], "what": "profile", "who": row["who"], "kind": kind, "ms": round(ms, 2)}
        for kind, ms in spent.items()
        if ms
    ]


def timed(options: "StepOptions", step: Callable, batch: int, device: torch.device) -> dict:
    """Return images/s, milliseconds a step, those of the host, and the peak of memory; or what went wrong."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    whole, host = [], []
    try:
        begin = time.perf_counter()
        for number in range(3):
            step(number)
        wait()
        first = time.perf_counter() - begin
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(options.rounds):
            begin = time.perf_counter()
            for number in range(options.steps):
                step(number)
                if number == 0:  # later ones may wait for room in the device's queue
                    host.append(time.perf_counter() - begin)
            wait()
            whole.append((time.perf_counter() - begin) / options.steps)
    except torch.OutOfMemoryError:
        return {"images/s": 0, "ms": "out of memory"}
    finally:
        peak = torch.cuda.max_memory_allocated() if cuda else 0
    seconds = statistics.median(whole)
    return {
        "images/s": round(batch / seconds),
        "ms": round(1000 * seconds, 1),
        "spread": f"{1000 * min(whole):.1f} - {1000 * max(whole):.1f}",
        "host, ms": round(1000 * statistics.median(host), 1),
        "first 3, s": round(first, 1),
        "GB": round(peak / 1e9, 1),
    }


def forward_flops(network: Network) -> int:
    """Return the floating-point operations per image of timm's forward pass, a multiply-add counted as two."""
    model = timm_network(network, torch.device("cpu")).eval()
    # The counter knows products, and not every fused attention that is made of them.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, network.side, network.side))
    return counter.get_total_flops()


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
