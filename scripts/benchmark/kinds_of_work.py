"""The kinds of work that operators are: by the range of the program around them, else by their name."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from volo.engine.learner import Learner
from volo.models.blocks import OutlookAttention

RANGE = "kind of work: "  # and the kind; such a range overrules the names of the operators in it
# An operator counts as the first kind that has a word in its name.
KINDS = {
    "optimizer": ("optimizer.", "adam", "sgd", "lamb"),
    "self-attention": ("attention_for_cpu", "flash_attention", "efficient_attention", "fmha", "scaled_dot_product"),
    "outlook attention": ("outlook",),
    "convolutions": ("conv",),
    "linear layers": ("mm", "matmul", "linear", "gemm", "nvjet"),  # the last two are cuBLAS's kernels
    "norms": ("norm",),
    "activations": ("gelu", "relu", "clamp_min", "threshold"),
    "casts, copies": ("copy", "clone", "memcpy", "aten::to", "cat", "stack", "flip", "select", "slice", "where"),
    "sums, products, zeros": ("add", "sum", "zero", "fill", "mul", "div", "pool", "memset"),
}
OF_RANGES = ("inputs", "loss", "EMA")  # that no name tells
REST = "everything else"
_NODE = "autograd::engine::evaluate_function"  # begins the name of the event around a node of the backward pass


def kind_of(operator: str, ranges: Sequence[str] = ()) -> str:
    """Return the kind of work of an operator or CUDA kernel: of the innermost range around it, else by its name."""
    if ranges:
        return ranges[-1].removeprefix(RANGE)
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def profiled(step: Callable[[], object], device: str) -> dict[str, float]:
    """Return the milliseconds of each kind of work in one ``step``, and of the "wall clock".

    On CUDA they are the time of the kernels; on the CPU the time of each operator without the operators it calls.
    """
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + cuda * [ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    return times_of_kinds(found.events(), cuda) | {"wall clock": 1000 * wall}


def times_of_kinds(events: Sequence[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Return the milliseconds of each kind of work in a profile.

    A kernel's name says little (cuBLAS and PyTorch's elementwise kernels are the same for every layer), so a kernel is
    of the kind of the operator that launched it.

    Args:
        events: Those of a torch.profiler profile, of the CPU and, if there is one, of CUDA.
        cuda: Sum the time of kernels instead of the operators' own.
    """
    spent = dict.fromkeys((*KINDS, *OF_RANGES, REST), 0.0)
    operators = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    forward = {}  # the range around the operator that made each node of autograd, the last one of its number
    for event in operators:
        if event.sequence_nr >= 0 and not (event.name.startswith(_NODE) or event.scope == 1):  # 1 is the node itself
            forward[event.sequence_nr] = _range_around(event, {})
    launched = Counter()
    for event in operators:
        # A range has a "kernel" of its own name, from its first kernel to its last.
        kernels = [kernel for kernel in event.kernels if kernel.name != event.name]
        launched.update(
            {name: sum(k.duration for k in kernels if k.name == name) for name in {k.name for k in kernels}}
        )
        own = sum(kernel.duration for kernel in kernels) if cuda else event.self_cpu_time_total
        spent[_kind_of_event(event, forward)] += own / 1000
    if cuda:  # what no operator launched, or is not known to have launched
        ranges = {event.name for event in operators}
        for event in events:
            if event.device_type != DeviceType.CPU and event.name not in ranges:
                launched[event.name] -= event.time_range.elapsed_us()
        for name, left in launched.items():
            spent[kind_of(name)] += max(-left, 0) / 1000
    return spent


def _kind_of_event(event: FunctionEvent, forward: dict[int, str | None]) -> str:
    if around := _range_around(event, forward):
        return kind_of(event.name, [around])
    kinds = (kind_of(outer.name) for outer in _outwards(event))
    return next((kind for kind in kinds if kind != REST), REST)


def _range_around(event: FunctionEvent, forward: dict[int, str | None]) -> str | None:
    """Return the innermost range around an event or, in the backward pass, around what it is the gradient of."""
    for outer in _outwards(event):
        if outer.name.startswith(RANGE):
            return outer.name
        if outer.name.startswith(_NODE) and forward.get(outer.sequence_nr):
            return forward[outer.sequence_nr]
    return None


def _outwards(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


@contextmanager
def ranges_of(learner: Learner) -> Iterator[None]:
    """Let a learner's steps say what they work on, where names of operators do not: in ranges that begin with RANGE."""
    ranged = {
        (learner, "inputs"): "inputs",
        (learner, "loss_terms"): "loss",
        (learner, "optimizer_step"): "optimizer",
    }
    if learner.ema is not None:
        ranged[learner.ema, "update"] = "EMA"
    if not learner.compiles:  # a changed method would be compiled again
        ranged[OutlookAttention, "mix"] = "outlook attention"
    with ExitStack() as stack:
        for (owner, name), kind in ranged.items():
            stack.enter_context(patch.object(owner, name, in_range(kind, getattr(owner, name))))
        yield


def in_range(kind: str, function: Callable) -> Callable:
    """Return the function in a range that says what kind of work it is."""

    @wraps(function)
    def ranged(*args, **kwargs):
        with record_function(RANGE + kind):
            return function(*args, **kwargs)

    return ranged
