"""Outlook attention, the operator of VOLO (arXiv 2106.13112, section 3.1): definition, and choice of kernel.

B images, H x W grid, C channels, h x w windows, K kernel side, n = h*w windows, d channels of one head.

Self-attention compares every cell with every other. Outlook attention compares nothing: each K x K window
has its K^2 x K^2 attention matrix predicted by a linear layer from the features at the window's centre, the
matrix mixes the K^2 values of the window into K^2 outputs, and every cell sums what the windows over it say.

The eager operator states it in plain PyTorch. The native kernels (volo/models/kernels: C++ on the CPU, Triton on
CUDA) are one operator of torch's library, ``volo::outlook_attention``, with shape functions and gradient, so
torch.compile and torch.export take it as it is, without a graph break.
"""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from volo.models.kernels import cpu, cuda

Kernel = Literal["auto", "eager", "native"]


def outlook_attention(
    value: Tensor,
    logits: Tensor,
    *,
    num_heads: int,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
    dropout_p: float = 0.0,
    kernel: Kernel = "auto",
) -> Tensor:
    """Mix each window of ``value`` with its own attention matrix and sum the windows where they overlap.

    Args:
        value: Values [B, H, W, C]; channels are heads-major, so head i has channels i*d to (i+1)*d.
        logits: Raw attention of every window [B, h, w, num_heads * K^4]; channel
            (head * K^2 + query) * K^2 + key. They are multiplied by d^-0.5 here, then softmax runs over the keys.
        num_heads: Heads; it divides C.
        kernel_size: Side K of a window.
        stride: Distance between neighbouring windows.
        padding: Zeros around the grid. A padded key keeps its share of the softmax but adds nothing.
        dropout_p: Probability of dropping an attention weight; give 0 outside training.
        kernel: "auto" takes the native kernel if there is one; "native" takes it or raises; "eager" never takes it.

    Returns:
        [B, H, W, C]. Overlapping windows are summed, not averaged; a cell without a window is 0.

    Raises:
        ValueError: C is no multiple of the heads, the logits do not fit the windows, or "native" is unavailable.

    The layout, on a 4 x 4 grid of one channel with K = 3, stride 2, padding 1. The cells are numbered from 1, so
    that 0 is padding. There are 2 x 2 windows, centred on the cells 1, 3, 9 and 11, and unfold makes each a
    column of its K^2 = 9 values, row by row:

    >>> import torch
    >>> cells = torch.arange(1.0, 17).view(1, 1, 4, 4)
    >>> windows = F.unfold(cells, 3, padding=1, stride=2)[0].T
    >>> for window in windows.int().tolist():
    ...     print(window)
    [0, 0, 0, 0, 1, 2, 0, 5, 6]
    [0, 0, 0, 2, 3, 4, 6, 7, 8]
    [0, 5, 6, 0, 9, 10, 0, 13, 14]
    [6, 7, 8, 10, 11, 12, 14, 15, 16]

    A window's matrix turns its nine values into nine outputs, one for each of its positions. Fold then takes
    the columns back to the grid and sums: cell 6 is position 8 of the first window, 6 of the second, 2 of the
    third and 0 of the fourth, so it is a sum of four outputs, while the corner cell 1 lies in one window only.
    Folding ones counts the windows of every cell:

    >>> F.fold(torch.ones(1, 9, 4), (4, 4), 3, padding=1, stride=2)[0, 0].int().tolist()
    [[1, 2, 1, 1], [2, 4, 2, 2], [1, 2, 1, 1], [1, 2, 1, 1]]

    With all logits 0 each output is the window's sum over 9, padding counted; cell 1 is (1 + 2 + 5 + 6) / 9:

    >>> y = outlook_attention(cells.view(1, 4, 4, 1), torch.zeros(1, 2, 2, 81), num_heads=1)
    >>> round(y[0, 0, 0, 0].item() * 9)
    14
    """
    B, H, W, C = value.shape
    h = (H + 2 * padding - kernel_size) // stride + 1
    w = (W + 2 * padding - kernel_size) // stride + 1
    if C % num_heads:
        raise ValueError(f"value has {C} channels, which {num_heads} heads do not divide")
    if min(h, w) < 1:
        raise ValueError(f"a window of {kernel_size} does not fit a {H}x{W} grid with padding {padding}")
    if logits.shape != (B, h, w, num_heads * kernel_size**4):
        raise ValueError(
            f"logits are {list(logits.shape)}; kernel {kernel_size}, stride {stride} and padding {padding} with "
            f"{num_heads} heads need {[B, h, w, num_heads * kernel_size**4]} for values {list(value.shape)}"
        )
    if kernel != "eager":
        window = (kernel_size, stride, padding)
        reason = unavailable_reason(value.device.type, window, C // num_heads, value.dtype, dropout_p)
        if reason is None:
            return _native(value, logits, num_heads, kernel_size, stride, padding)
        if kernel == "native":
            raise ValueError(f"the native kernel of outlook attention cannot be used: {reason}")
    return _eager(value, logits, num_heads, kernel_size, stride, padding, dropout_p)


def _eager(
    value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int, dropout_p: float
) -> Tensor:
    B, H, W, C = value.shape
    n = logits.shape[1] * logits.shape[2]
    area = kernel_size * kernel_size
    d = C // num_heads

    v = F.unfold(value.permute(0, 3, 1, 2), kernel_size, padding=padding, stride=stride)  # [B, C*K^2, n]
    v = v.view(B, num_heads, d, area, n).permute(0, 1, 4, 3, 2)  # [B, heads, n, key, d]
    a = logits.reshape(B, n, num_heads, area, area).transpose(1, 2)  # [B, heads, n, query, key]
    a = (a * d**-0.5).softmax(dim=-1)
    a = F.dropout(a, dropout_p) if dropout_p > 0 else a
    y = a @ v  # [B, heads, n, query, d]
    y = y.permute(0, 1, 4, 3, 2).reshape(B, C * area, n)  # [B, C*K^2, n]
    y = F.fold(y, (H, W), kernel_size, padding=padding, stride=stride)  # [B, C, H, W]
    return y.permute(0, 2, 3, 1)  # [B, H, W, C]


_KERNELS = {"cpu": cpu, "cuda": cuda}
# What a trial run may be off by, as a share of the largest value: rounding, with room, but no wrong element.
_TRIAL_ERRORS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def unavailable_reason(
    device_type: str, window: tuple[int, int, int], head_dim: int, dtype: torch.dtype, dropout_p: float
) -> str | None:
    """Return None if the native kernel can run, else a sentence that says why it cannot.

    Args:
        device_type: "cpu" (the first call on a machine builds the kernel), "cuda", or another.
        window: Kernel size, stride and padding.
        head_dim: Channels of one head.
        dtype: Of values and logits.
        dropout_p: Probability of dropping an attention weight.
    """
    return _unavailable_reason(device_type, window, head_dim, dtype, dropout_p > 0)


# A compiled graph asks while it is traced. torch.compiler.assume_constant_result sets this mark and no more, but
# imports the compiler to do so, which takes as long as importing the rest of PyTorch.
unavailable_reason._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _unavailable_reason(
    device_type: str, window: tuple[int, int, int], head_dim: int, dtype: torch.dtype, drops: bool
) -> str | None:
    if drops:
        return "It has no dropout of attention weights (model.attn_drop_rate)"
    if device_type not in _KERNELS:
        return f"There is none for devices of type {device_type}"
    reason = _KERNELS[device_type].unavailable_reason()
    if reason is None and device_type == "cuda" and not cuda.supports(*window, head_dim, dtype):
        return f"It does not take windows of kernel, stride, padding {window} with heads of {head_dim} {dtype} channels"
    return reason or _failed_trial(device_type, window, head_dim, dtype)


def _failed_trial(device_type: str, window: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> str | None:
    """Run the native kernel once on little data; return None if it agrees with the eager operator, else a reason.

    Nothing short of a run finds a compiler without the headers it needs, a driver that is too old for the code, or
    code that this compiler gets wrong.
    """
    limit = _TRIAL_ERRORS.get(dtype, 1e-6)
    try:
        # A model may be asked for the first time while it is traced, or in inference mode.
        with _disable_current_modes(), torch.inference_mode(False):  # which enables gradients, too
            error = _trial_error(torch.device(device_type), window, head_dim, dtype)
    except Exception as failure:  # whatever a compiler, a driver or a launch may raise
        message = " ".join(f"{type(failure).__name__}: {failure}".split())
        return f"Its trial run failed with {message[:300]}"
    if not error <= limit:  # nan, too
        return (
            f"Its trial run differs from the eager operator by {error:.2g} of the largest value; {limit:g} is allowed"
        )
    return None


def _trial_error(device: torch.device, window: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> float:
    """Return the largest error of the native kernel's output and gradients, relative to the largest expected value."""
    kernel_size, stride, padding = window
    heads, side = 2, kernel_size + 2 * stride
    windows = (side + 2 * padding - kernel_size) // stride + 1
    generator = torch.Generator().manual_seed(0)  # the global one is left alone
    grid = (2, side, side, heads * head_dim)
    shapes = (grid, grid, (2, windows, windows, heads * kernel_size**4))
    ours = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    theirs = [x.double().cpu() for x in ours]
    results = []
    for (grad, *inputs), operator, options in ((ours, _native, ()), (theirs, _eager, (0.0,))):
        value, logits = (x.requires_grad_() for x in inputs)
        output = operator(value, logits, heads, kernel_size, stride, padding, *options)
        (output * grad).sum().backward()
        results.append([output.detach(), value.grad, logits.grad])
    errors = [(a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(1e-3) for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


# The operators are not made with torch.library.custom_op because its first call imports the compiler.
_WINDOW = "int num_heads, int kernel_size, int stride, int padding"
torch.library.define("volo::outlook_attention", f"(Tensor value, Tensor logits, {_WINDOW}) -> Tensor")
torch.library.define(
    "volo::outlook_attention_backward", f"(Tensor grad, Tensor value, Tensor logits, {_WINDOW}) -> (Tensor, Tensor)"
)
_native = torch.ops.volo.outlook_attention.default
_native_backward = torch.ops.volo.outlook_attention_backward.default


@torch.library.impl("volo::outlook_attention", tuple(_KERNELS))
def _(value: Tensor, logits: Tensor, *window: int) -> Tensor:
    return _KERNELS[value.device.type].forward(value, logits, *window)


@torch.library.impl("volo::outlook_attention_backward", tuple(_KERNELS))
def _(grad: Tensor, value: Tensor, logits: Tensor, *window: int) -> tuple[Tensor, Tensor]:
    return _KERNELS[value.device.type].backward(grad, value, logits, *window)


@torch.library.register_fake("volo::outlook_attention")
def _(value: Tensor, logits: Tensor, *window: int) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.register_fake("volo::outlook_attention_backward")
def _(grad: Tensor, value: Tensor, logits: Tensor, *window: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, logits))


def _keep(ctx, inputs, output) -> None:
    # Values and logits alone: the attention weights are computed again, which costs less than reading them would.
    value, logits, *ctx.window = inputs
    ctx.save_for_backward(value, logits)


def _gradients(ctx, grad: Tensor):
    return *_native_backward(grad, *ctx.saved_tensors, *ctx.window), None, None, None, None


def _refuse(ctx, *grads: Tensor):
    raise RuntimeError("the native kernel of outlook attention has no second derivative. Use the eager operator")


torch.library.register_autograd("volo::outlook_attention", _gradients, setup_context=_keep)
torch.library.register_autograd("volo::outlook_attention_backward", _refuse)
