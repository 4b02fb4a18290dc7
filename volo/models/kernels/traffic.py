"""Bytes that one layer of outlook attention moves on CUDA: counted, not measured. ``python -m`` this prints a table.

B images, H x W grid, C channels, h x w windows, K kernel side, d channels of one head.

For our kernels (cuda_kernels.py) every element counts that a program asks for in a load or a store: all the programs
of the grid, nothing taken off for what a cache answers. The tests check these sums against the masks of the kernels'
own loads and stores. The least possible is every input read once and every output written once. The unfold path is
the eager operator, in which every operation that is not a view reads its tensors and writes its results.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from volo.models.kernels import cuda
from volo.models.outlook_attention import outlook_attention

Window = tuple[int, int, int]  # kernel size, stride, padding


def kernel_bytes(
    direction: str, grid: tuple[int, int, int], num_heads: int, head_dim: int, window: Window, size: int
) -> dict[str, int]:
    """Return the bytes that a kernel asks for, by tensor; the arguments are those of ``cuda.tile``."""
    B, H, W = grid
    K, S, P = window
    h, w = (_windows(side, window) for side in (H, W))
    tiling = cuda.tile(direction, grid, num_heads, head_dim, window, size)
    steps = max(h, -(-(H + P) // S))
    # A program reads a product of rows and columns, so each axis is counted alone: how often a cell is asked for, and
    # how many queries (row of a window, row in it; likewise columns) have their logits read.
    cells_down = cells_across = own_down = own_across = queries_down = queries_across = 0
    for first in range(0, steps, tiling.rows):
        last = first + tiling.rows
        start = max(first - (K - 1) // S, 0)
        above = max(S * first - P, 0)
        rows = range(S * start - P, S * start - P + max(K - S, 0))  # read ahead of the walk
        rows = [*rows, *(S * r - P + i for r in range(start, last) for i in range(max(K - S, 0), K))]
        rows = [y for y in rows if 0 <= y < H]
        cells_down += len(rows)
        own_down += sum(y >= above for y in rows)
        queries = [S * r - P + i for r in range(start, min(last, h)) for i in range(K)]
        low, high = (above, min(S * last - P, H)) if direction == "forward" else (0, H)
        queries_down += sum(low <= y < high for y in queries)
    for tile in range(tiling.tiles):
        left, right = tile * tiling.owned, (tile + 1) * tiling.owned
        lanes = range(max(left - tiling.before, 0), min(right + tiling.after, w))
        columns = [(c, S * c - P + j) for c in lanes for j in range(K)]
        columns = [(c, x) for c, x in columns if 0 <= x < W]
        cells_across += len(columns)
        own_across += sum(left <= c < right for c, _ in columns)
        low, high = (S * left, min(S * right, W)) if direction == "forward" else (0, W)
        queries_across += sum(low <= x < high for _, x in columns)

    each = B * num_heads * size
    grid_bytes, logit_bytes = each * H * W * head_dim, each * h * w * K**4
    cells, queries = each * head_dim * cells_down * cells_across, each * K**2 * queries_down * queries_across
    if direction == "forward":
        return {"value": cells, "logits": queries, "out": grid_bytes}
    own = each * head_dim * own_down * own_across
    return {"grad": cells, "value": own, "logits": queries, "grad_value": grid_bytes, "grad_logits": logit_bytes}


def least_bytes(
    direction: str, grid: tuple[int, int, int], num_heads: int, head_dim: int, window: Window, size: int
) -> int:
    """Return the bytes of all inputs and outputs."""
    B, H, W = grid
    cells = B * H * W * num_heads * head_dim
    logits = B * _windows(H, window) * _windows(W, window) * num_heads * window[0] ** 4
    return size * (2 * cells + logits if direction == "forward" else 3 * cells + 2 * logits)


def unfold_bytes(
    direction: str, grid: tuple[int, int, int], num_heads: int, head_dim: int, window: Window, dtype: torch.dtype
) -> int:
    """Return the bytes that the eager operator moves, an operation at a time, on tensors without storage."""
    B, H, W = grid
    K, S, P = window
    options = {"device": "meta", "dtype": dtype, "requires_grad": direction == "backward"}
    value = torch.empty(B, H, W, num_heads * head_dim, **options)
    logits = torch.empty(B, _windows(H, window), _windows(W, window), num_heads * K**4, **options)
    with _Counter() as forward:
        out = outlook_attention(value, logits, num_heads=num_heads, kernel_size=K, stride=S, padding=P)
    if direction == "forward":
        return forward.bytes
    grad = torch.empty_like(out, requires_grad=False)
    with _Counter() as backward:
        torch.autograd.backward(out, grad)
    return backward.bytes


class _Counter(TorchDispatchMode):
    """Adds up what operations read and write while it is entered."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not (func.is_view or func is torch.ops.aten._unsafe_view.default):
            tensors = [x for x in tree_leaves((args, kwargs, results)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return results


def _windows(side: int, window: Window) -> int:
    return (side + 2 * window[2] - window[0]) // window[1] + 1


def table(batch: int = 128) -> str:
    """Return the bytes of the layers of VOLO-D1 and D5, as a table in Markdown."""
    lines = [
        f"| layer, batch {batch} | dtype | pass | least, MB/image | kernel, MB/image | kernel/least | unfold/least |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, side, heads in (("D1, 224", 28, 6), ("D1, 384", 48, 6), ("D5, 224", 28, 12), ("D5, 512", 64, 12)):
        for dtype in (torch.bfloat16, torch.float32):
            for direction in ("forward", "backward"):
                layer = (direction, (batch, side, side), heads, 32, (3, 2, 1))
                least = least_bytes(*layer, dtype.itemsize)
                ours = sum(kernel_bytes(*layer, dtype.itemsize).values())
                unfold = unfold_bytes(*layer, dtype)
                megabytes = [f"{count / batch / 1e6:.2f}" for count in (least, ours)]
                ratios = [f"{count / least:.2f}" for count in (ours, unfold)]
                cells = [name, str(dtype).removeprefix("torch."), direction, *megabytes, *ratios]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
