"""Outlook attention on the CPU: cpu.cpp, compiled on first use (volo/runtime/native.py), and the calls into it.

B images, H x W grid, C channels, h x w windows, K kernel side.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from volo.runtime import native

_SOURCE = Path(__file__).with_suffix(".cpp")
# Two switches of -O3, to unroll the loops over a 3 x 3 window and to vectorise copies; the others double the build.
_FLAGS = ("-O2", "-fpeel-loops", "-ftree-vectorize", "-fopenmp")
_library = native.NativeLibrary(
    "The CPU kernel of outlook attention", lambda: native.library(_SOURCE, _FLAGS, "outlook_attention")
)


def forward(value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return the mixed windows [B, H, W, C] of value [B, H, W, C] and logits [B, h, w, heads * K^4]."""
    out = _call("forward", [value, logits], [value.shape], value.shape, num_heads, kernel_size, stride, padding)
    return out[0]


def backward(
    grad: Tensor, value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and logits, from that of the output [B, H, W, C]."""
    inputs, outputs = [grad, value, logits], [value.shape, logits.shape]
    grad_value, grad_logits = _call("backward", inputs, outputs, value.shape, num_heads, kernel_size, stride, padding)
    return grad_value, grad_logits


def unavailable_reason() -> str | None:
    """Return None if this kernel can run, else why it cannot. The first call in a process may build it."""
    return _library.unavailable_reason()


def _call(name: str, inputs: list[Tensor], outputs: list[torch.Size], shape: torch.Size, num_heads: int, *window: int):
    """Run a function of cpu.cpp on tensors of one dtype; return new tensors of the shapes in ``outputs``."""
    dtype = inputs[0].dtype
    assert all(x.dtype == dtype and x.device.type == "cpu" for x in inputs), [(x.dtype, x.device) for x in inputs]
    if dtype == torch.float16:  # rare on CPUs, so not worth code of its own
        results = _call(name, [x.float() for x in inputs], outputs, shape, num_heads, *window)
        return [result.half() for result in results]
    function = getattr(_library.get(), f"{name}_{str(dtype).removeprefix('torch.')}")
    results = [torch.empty(size, dtype=dtype) for size in outputs]
    tensors = [x.contiguous() for x in inputs] + results
    B, H, W, C = shape
    numbers = (ctypes.c_int64 * 8)(B, H, W, num_heads, C // num_heads, *window)  # Shape in cpu.cpp
    function(*(ctypes.c_void_p(x.data_ptr()) for x in tensors), numbers, ctypes.c_int(torch.get_num_threads()))
    return results
