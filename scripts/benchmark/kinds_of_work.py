"""The time of a pass by kind of work: sums of the self time of each operator in torch.profiler."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# An operator counts as the first kind that has a word in its name.
KINDS = {
    "self-attention": ("attention_for_cpu", "flash_attention", "efficient_attention", "fmha", "scaled_dot_product"),
    "outlook attention": ("outlook",),
    "convolutions": ("conv",),
    "linear layers": ("mm", "linear", "gemm"),
    "norms": ("norm",),
    "activations": ("gelu", "relu", "clamp_min", "threshold"),
    "copies, sums, zeros": ("copy", "add", "cat", "sum", "zero", "fill", "mul", "div", "pool"),
}
REST = "everything else"


def kind_of(operator: str) -> str:
    """Return the kind of work of an operator or CUDA kernel, by its name."""
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def profiled(step: Callable[[], object], device: str) -> dict[str, float]:
    """Return the milliseconds of each kind of work in one ``step``, and of the "wall clock".

    On CUDA they are the time of the kernels; on the CPU the time of each operator without the operators it calls.
    """
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for event in found.key_averages():
        spent[kind_of(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    return spent | {"wall clock": 1000 * wall}
