"""The kinds of work that operators are: by the range of the program around them, else by their name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from unittest.mock import patch

from torch.profiler import record_function

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


def kind_of(operator: str, ranges: Sequence[str] = ()) -> str:
    """Return the kind of work of an operator or CUDA kernel: of the innermost range around it, else by its name."""
    if ranges:
        return ranges[-1].removeprefix(RANGE)
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


@contextmanager
def ranges_of(learner: Learner) -> Iterator[None]:
    """Let a learner's steps say what they work on, where names of operators do not: in ranges that begin with RANGE."""
    with (
        patch.multiple(
            learner,
            inputs=in_range("inputs", learner.inputs),
            loss_terms=in_range("loss", learner.loss_terms),
            optimizer_step=in_range("optimizer", learner.optimizer_step),
        ),
        patch.object(OutlookAttention, "mix", in_range("outlook attention", OutlookAttention.mix)),
    ):
        if learner.ema is None:
            yield
        else:
            with patch.object(learner.ema, "update", in_range("EMA", learner.ema.update)):
                yield


def in_range(kind: str, function: Callable) -> Callable:
    """Return the function in a range that says what kind of work it is."""

    @wraps(function)
    def ranged(*args, **kwargs):
        with record_function(RANGE + kind):
            return function(*args, **kwargs)

    return ranged
