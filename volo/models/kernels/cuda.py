"""Outlook attention on CUDA: divides the work among the programs of cuda_kernels.py (Triton) and starts them.

B images, H x W grid, C channels, h x w windows, K kernel side, d channels of one head.

The operator does little arithmetic on much data, so the kernels are built around what they read and write.

**Division.** A program takes one head of one image, all columns, and walks down the rows of windows. Windows overlap by
K - stride cells; downwards a program keeps the shared cells and the unfinished sums in registers, and sideways it adds
up the overlap inside the row. So the forward reads every logit once, writes every cell once, and no program waits for
another or adds to what another wrote. That goes for the backward too: the gradient of the values is a sum over windows
like the output, and is made in the same way. There are no atomics, and results do not change from run to run.

**Softmax.** It is in registers: the K^2 logits of a query sit in one thread. The backward computes it again from
the logits, so values and logits are all that is kept between the two.

**What is read twice.** Each window asks for its own K columns, so a column that two windows share is asked for twice,
the second time from the L1 cache: with kernel 3 and stride 2 that is 1.5 requests a value. Taking it from the
neighbouring thread instead goes through shared memory, and the compiled kernels then have a fifth (forward) to two
fifths (backward) more instructions. Logits of padding are never read. For batches with fewer heads than a GPU has
multiprocessors, the rows are divided among several programs, each of which reads up to K rows of its neighbours again
(the backward: and a row of logits); grids too wide for one program are divided sideways in the same way. traffic.py
counts all of it: 1.2 times the least possible forward and backward if a batch fills the GPU, up to 1.4 otherwise.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARED_MEMORY = 96 * 1024  # bytes a program may use; 99 KiB is what consumer GPUs from Ampere on offer
_ENOUGH_PROGRAMS = 132  # multiprocessors of an H100; with fewer programs some of them would have nothing to do
_FEWEST_LANES = 8  # windows side by side that a program is made for at least; narrower grids leave some idle
_FEWEST_ROWS = 4  # rows of windows that a program takes at least, as every program reads rows of its neighbour


def forward(value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return the mixed windows [B, H, W, C] of value [B, H, W, C] and logits [B, h, w, heads * K^4]."""
    value, logits = value.contiguous(), logits.contiguous()
    out = torch.empty_like(value)
    _start("forward", [value, logits, out], num_heads, kernel_size, stride, padding)
    return out


def backward(
    grad: Tensor, value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and logits, from that of the output [B, H, W, C]."""
    grad, value, logits = grad.contiguous(), value.contiguous(), logits.contiguous()
    grad_value, grad_logits = torch.empty_like(value), torch.empty_like(logits)
    _start("backward", [grad, value, logits, grad_value, grad_logits], num_heads, kernel_size, stride, padding)
    return grad_value, grad_logits


def unavailable_reason() -> str | None:
    """Return None if the kernels can run, else the reason why they cannot. Imports no Triton."""
    if not torch.cuda.is_available():
        return "No CUDA device was found"
    if torch.version.hip:
        return "The Triton kernels of outlook attention are made for CUDA, and this PyTorch is built for ROCm"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with the CUDA builds of PyTorch for Linux)"
    if (version := _triton_version()) < (3, 3):
        return f"Triton {'.'.join(map(str, version))} is too old: 3.3 or later is needed, which PyTorch 2.7 brings"
    if torch.cuda.get_device_capability() < (8, 0):
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f"{name} has compute capability {major}.{minor}, and the Triton kernels need 8.0 or more"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start kernels, and neither gcc nor clang was found, nor one named in CC"
    return None


def supports(kernel_size: int, stride: int, padding: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether there is a kernel for these windows; any grid, batch and number of heads is fine then.

    Heads of up to 64 channels in fp32 and 128 in 16-bit types fit the shared memory of every GPU. Windows larger than
    3 x 3 are refused: compiled for them, a thread spills up to 3.7 KB of registers, and they have not been timed
    against the eager operator. VOLO has kernel 3 and 32 channels.
    """
    if dtype not in _DTYPES or kernel_size > 3:
        return False
    room = min(_room(kernel_size, head_dim, dtype.itemsize, direction) for direction in ("forward", "backward"))
    return room >= _FEWEST_LANES and room > sum(_reach(kernel_size, stride, padding))


@dataclass(frozen=True)
class Tiling:
    """Who does what. A program has ``lanes`` neighbouring windows of each of its rows, some for overlap only."""

    lanes: int
    before: int  # lanes of the neighbour on the left
    after: int
    tiles: int  # programs side by side
    rows: int  # rows of windows of one program
    chunks: int  # programs one below the other
    num_warps: int

    @property
    def owned(self) -> int:
        """Lanes whose windows no other program has."""
        return self.lanes - self.before - self.after


def tile(
    direction: str, grid: tuple[int, int, int], num_heads: int, head_dim: int, window: tuple[int, int, int], size: int
) -> Tiling:
    """Divide the work.

    Args:
        direction: "forward" or "backward".
        grid: Images, rows and columns of the values.
        num_heads: Heads.
        head_dim: Channels of one head.
        window: Kernel size, stride and padding.
        size: Bytes of an element.
    """
    B, H, W = grid
    K, stride, padding = window
    # Lanes and steps reach the last cell even if the last cells have no window: these are written too, as 0.
    h, w = (max((side + 2 * padding - K) // stride + 1, _ceil(side, stride)) for side in (H, W))
    steps = max(h, _ceil(H + padding, stride))
    room = _room(K, head_dim, size, direction)
    lanes, (before, after) = min(_power_of_two(w, _FEWEST_LANES), room), _reach(K, stride, padding)
    if w <= lanes:
        before = after = 0
    owned = lanes - before - after
    assert owned > 0, "supports() says no to these windows"
    tiles = _ceil(w, owned)
    chunks = min(_ceil(_ENOUGH_PROGRAMS, max(B * num_heads * tiles, 1)), max(steps // _FEWEST_ROWS, 1))
    rows = _ceil(steps, chunks)
    # Elements of a tile for each thread: as many as its registers hold without spilling, for kernel 3.
    each = 4 if direction == "forward" and size == 2 else 2
    num_warps = min(max(lanes * _channels(head_dim) // (32 * each), 1), 16)
    return Tiling(lanes, before, after, tiles, rows, _ceil(steps, rows), num_warps)


def constants(tiling: Tiling, num_heads: int, head_dim: int, window: tuple[int, int, int]) -> dict[str, int]:
    """Return what the kernels of cuda_kernels.py are compiled for."""
    K, stride, padding = window
    lanes = {"LANES": tiling.lanes, "BEFORE": tiling.before, "AFTER": tiling.after}
    shape = {"HEADS": num_heads, "HEAD_DIM": head_dim, "D": _channels(head_dim), "LOG": _keys(K).bit_length() - 1}
    return {"K": K, "S": stride, "P": padding, **lanes, **shape}


def _start(direction: str, tensors: list[Tensor], num_heads: int, kernel_size: int, stride: int, padding: int) -> None:
    """Run a kernel on tensors of one dtype: values first or, in the backward, second, then logits."""
    from volo.models.kernels import cuda_kernels

    window = (kernel_size, stride, padding)
    value, logits = tensors[:2] if direction == "forward" else tensors[1:3]
    assert all(x.dtype == value.dtype and x.is_contiguous() for x in tensors), [(x.dtype, x.stride()) for x in tensors]
    B, H, W, C = value.shape
    if value.numel() == 0:
        return
    head_dim = C // num_heads
    assert supports(*window, head_dim, value.dtype), (window, head_dim, value.dtype)
    tiling = tile(direction, (B, H, W), num_heads, head_dim, window, value.itemsize)
    programs = B * tiling.chunks * tiling.tiles * num_heads
    h, w = logits.shape[1:3]
    with torch.cuda.device_of(value):  # Triton starts kernels on the current device
        getattr(cuda_kernels, direction)[(programs,)](
            *tensors, H, W, h, w, tiling.rows, tiling.tiles,
            **constants(tiling, num_heads, head_dim, window), num_warps=tiling.num_warps,
        )  # fmt: skip


def _triton_version() -> tuple[int, ...]:
    """Return major and minor version, (3, 3) if a build under another name does not say."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return 3, 3


def _reach(kernel_size: int, stride: int, padding: int) -> tuple[int, int]:
    """Return how many lanes before and after its own a program needs: windows that reach into its cells.

    Column j of window c belongs to lane c + (j - padding) // stride, as the kernels number the cells.
    """
    return max((kernel_size - 1 - padding) // stride, 0), max(-(-padding // stride), 0)


def _room(kernel_size: int, head_dim: int, size: int, direction: str) -> int:
    """Return how many lanes fit into the shared memory that the operands of the matrix products need."""
    keys, channels = _keys(kernel_size), _channels(head_dim)
    lane = keys * (channels + keys) * size if direction == "forward" else 3 * keys * max(channels, keys) * size
    return 1 << (_SHARED_MEMORY // lane).bit_length() - 1 if lane <= _SHARED_MEMORY else 0


def _keys(kernel_size: int) -> int:
    return _power_of_two(kernel_size**2, 16)  # 16: what a matrix product takes at least


def _channels(head_dim: int) -> int:
    return _power_of_two(head_dim, 16)


def _power_of_two(number: int, least: int) -> int:
    return max(1 << (number - 1).bit_length(), least)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
