"""torch.compile where it works: found out before a run depends on it, and how long it took."""

import functools
import sys
import warnings

import torch
from torch import Tensor, nn


@functools.cache
def compile_problem(device_type: str) -> str | None:
    """Return why torch.compile cannot be used on devices of this type, or None.

    Compiles and runs a forward and backward pass of a few numbers: nothing short of it finds a missing C++ compiler or
    header, a Triton that does not know the driver, or a damaged cache. Takes some six seconds on a CPU with nothing
    cached, once.
    """
    try:
        x = torch.ones(7, device=device_type, requires_grad=True)
        with warnings.catch_warnings(action="ignore"):
            torch.compile(_trial)(x).backward()
        error = (x.grad - torch.ones(7, device=device_type).cos()).abs().max() if x.grad is not None else torch.inf
    except Exception as failure:  # whatever a compiler, a driver or a launch may raise
        torch.compiler.reset()
        return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    return None if error < 1e-5 else f"a compiled function is wrong by {error:g}"


def _trial(x: Tensor) -> Tensor:
    return x.sin().sum()


def compile_in_place(network: nn.Module) -> None:
    """Let the network compile when it is called; a graph that cannot be compiled runs as it is, with a warning."""
    torch._dynamo.config.suppress_errors = True
    network.compile()


def seconds_compiling() -> float:
    """Return how long this process has compiled for so far."""
    if "torch._dynamo" not in sys.modules:  # which takes two seconds to import
        return 0.0
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])
