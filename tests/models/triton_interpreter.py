"""The CUDA kernels under Triton's interpreter, on CPU tensors: results against the reference, and every access counted.

Not collected by itself: TRITON_INTERPRET must be set before Triton is imported, so test_kernel_cuda.py runs pytest on
this file in processes of their own. The interpreter executes each program of the grid in NumPy, slowly; so shapes are
small, and the constants that decide how work is divided are lowered where many programs shall meet.
"""

import functools
import os

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from volo.models import outlook_attention
from volo.models.kernels import cuda, traffic

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernel_cuda.py"

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from volo.models.kernels import cuda_kernels  # noqa: E402

TINY = {"B": 1, "H": 5, "W": 5, "heads": 1, "d": 2, "kernel": 3, "stride": 2, "padding": 1}


@pytest.fixture(autouse=True, scope="module")
def products_of_bfloat16():
    """Let the interpreter multiply bfloat16: it keeps such numbers as bit patterns and forgets it in tl.dot."""
    dot = InterpreterBuilder.create_dot

    def widened(x):
        bits = x.dtype.scalar == tl.bfloat16
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if bits else x

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    yield
    InterpreterBuilder.create_dot = dot


@pytest.fixture
def divide(monkeypatch):
    """Return a function that makes programs as small as it is told: rows of windows at least, and lanes at most."""

    def set_constants(rows, lanes=None):
        monkeypatch.setattr(cuda, "_FEWEST_ROWS", rows)
        if lanes:
            monkeypatch.setattr(cuda, "_room", lambda *_: lanes)

    return set_constants


def draw(shape, dtype=torch.float32, spread=3.0):
    """Return random value, logits, gradient of the output, and the kernels' last arguments."""
    B, H, W, heads, d, *window = (shape[key] for key in TINY)
    h, w = (traffic._windows(side, tuple(window)) for side in (H, W))
    generator = torch.Generator().manual_seed(0)
    value, grad = torch.randn(2, B, H, W, heads * d, generator=generator, dtype=torch.float64)
    logits = spread * torch.randn(B, h, w, heads * window[0] ** 4, generator=generator, dtype=torch.float64)
    return value.to(dtype), logits.to(dtype), grad.to(dtype), (heads, *window)


def errors(value, logits, grad, window):
    """Return the greatest error of output and gradients against float64, as a share of the greatest number, or of 1."""
    out = cuda.forward(value, logits, *window)
    grads = cuda.backward(grad, value, logits, *window)
    assert all(x.dtype == value.dtype for x in (out, *grads))
    value, logits = value.double().requires_grad_(), logits.double().requires_grad_()
    names = ("num_heads", "kernel_size", "stride", "padding")
    expected = outlook_attention(value, logits, **dict(zip(names, window, strict=True)), kernel="eager")
    expected_grads = torch.autograd.grad(expected, (value, logits), grad.double())
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return [((x.double() - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in pairs]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    heads=st.integers(1, 2),
    d=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
)
def test_any_shape(**drawn):
    assume(min(drawn["H"], drawn["W"]) + 2 * drawn["padding"] >= drawn["kernel"])
    assert max(errors(*draw(TINY | drawn))) < 2e-6


@pytest.mark.parametrize(
    "shape",
    [
        {"B": 2, "H": 3, "W": 4, "heads": 2},
        {"H": 1, "W": 9, "d": 17},
        {"H": 4, "W": 3, "stride": 1},
        {"H": 6, "W": 7, "kernel": 2, "stride": 3, "padding": 0},  # cells under no window, also at the ends
        {"H": 2, "W": 2, "kernel": 1, "stride": 1, "padding": 2},  # windows without a cell
    ],
    ids=str,
)
def test_chosen_shapes(shape):
    assert max(errors(*draw(TINY | shape))) < 2e-6


@pytest.mark.parametrize(
    ("shape", "rows", "lanes"),
    [
        ({"H": 9, "W": 4, "d": 3}, 1, None),
        ({"H": 7, "W": 3, "stride": 1}, 2, None),
        ({"H": 4, "W": 33}, 2, 8),
        ({"H": 3, "W": 13, "stride": 1}, 1, 8),
        ({"H": 3, "W": 12, "stride": 1, "padding": 2}, 3, 8),
        ({"H": 5, "W": 40, "kernel": 2, "stride": 3, "padding": 2}, 2, 8),
    ],
    ids=str,
)
def test_work_divided_among_many_programs(shape, rows, lanes, divide):
    divide(rows, lanes)
    assert max(errors(*draw(TINY | shape))) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types_are_as_exact_as_they_can_be(dtype):
    """Summed in fp32: only weights and results are rounded, which the sum of several windows would not survive."""
    assert max(errors(*draw(TINY | {"H": 4, "d": 8}, dtype))) < 1.5 * torch.finfo(dtype).eps


def test_large_logits_do_not_overflow():
    value, logits, grad, window = draw(TINY | {"H": 2, "W": 3}, spread=1e4)
    assert max(errors(value, logits, grad, window)) < 2e-6


def test_inputs_need_not_be_contiguous():
    value, logits, grad, window = draw(TINY | {"B": 2, "H": 2, "W": 3, "heads": 2})
    strided = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in (value, logits)]
    assert not strided[0].is_contiguous()
    assert max(errors(*strided, torch.ones(()).expand_as(value), window)) < 2e-6


def test_empty_batch():
    value, logits, grad, window = draw(TINY | {"B": 0})
    assert cuda.forward(value, logits, *window).shape == value.shape
    assert [x.shape for x in cuda.backward(grad, value, logits, *window)] == [value.shape, logits.shape]


# ------------------------------------------------------------------------------------------------- bytes


class Accesses:
    """How often a kernel loads and stores each element of its tensors, by name. Raises for any other address."""

    def __init__(self, monkeypatch, kernel):
        self.names, self.loads, self.stores = kernel.arg_names, {}, {}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, pointers, mask, *rest):
            self.note(self.loads, pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            self.note(self.stores, pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        monkeypatch.setattr(kernel, "pre_run_hooks", [self.begin])

    def begin(self, *arguments, **constants):
        """Take note of the tensors where the interpreter has put them."""
        named = zip(self.names, arguments, strict=False)
        self.tensors = {name: x for name, x in named if isinstance(x, torch.Tensor)}
        for counts in (self.loads, self.stores):
            counts.update({name: np.zeros(x.numel(), int) for name, x in self.tensors.items()})

    def note(self, counts, pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        found = 0
        for name, x in self.tensors.items():
            index = (addresses - x.data_ptr()) // x.element_size()
            index = index[(index >= 0) & (index < x.numel())]
            np.add.at(counts[name], index, 1)
            found += len(index)
        assert found == len(addresses), "an access outside the tensors"

    def bytes(self):
        counts = {name: self.loads[name].sum() + self.stores[name].sum() for name in self.tensors}
        return {name: int(count) * self.tensors[name].element_size() for name, count in counts.items()}


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "lanes"),
    [
        # One head of one image of D1 at 224, walked by one program, as in a batch that fills the GPU.
        ({"H": 28, "W": 28, "d": 32}, torch.bfloat16, 14, None),
        ({"B": 2, "H": 9, "W": 7, "heads": 2}, torch.float32, 2, None),
        ({"H": 5, "W": 37, "d": 17}, torch.float16, 3, 8),
        ({"H": 4, "W": 11, "kernel": 2, "stride": 3, "padding": 2}, torch.float32, 1, 8),
        ({"H": 5, "W": 9, "stride": 1}, torch.float32, 2, 8),
        # 8 windows across, and a 25th column under none of them: it takes a ninth lane to write its zeros.
        ({"H": 2, "W": 25, "kernel": 2, "stride": 3, "padding": 0}, torch.float32, 4, None),
    ],
    ids=str,
)
def test_bytes_moved(shape, dtype, rows, lanes, divide, monkeypatch):
    """traffic.py's sums are what the kernels load and store, and each result is written exactly once."""
    shape = TINY | shape
    divide(rows, lanes)
    value, logits, grad, window = draw(shape, dtype)
    layer = ((shape["B"], shape["H"], shape["W"]), shape["heads"], shape["d"], window[1:], dtype.itemsize)

    accesses = {}
    for direction, run in (("forward", cuda.forward), ("backward", functools.partial(cuda.backward, grad))):
        with monkeypatch.context() as patch:
            accesses[direction] = Accesses(patch, getattr(cuda_kernels, direction))
            run(value, logits, *window)
        assert accesses[direction].bytes() == traffic.kernel_bytes(direction, *layer)
    assert (accesses["forward"].stores["out"] == 1).all()
    assert (accesses["backward"].stores["grad_value"] == 1).all()
    assert (accesses["backward"].stores["grad_logits"] == 1).all()
    assert accesses["forward"].loads["logits"].max() == 1
    if (shape["H"], shape["W"]) == (28, 28):
        for direction, limit in (("forward", 1.2), ("backward", 1.5)):
            moved = sum(accesses[direction].bytes().values())
            assert moved <= limit * traffic.least_bytes(direction, *layer)
