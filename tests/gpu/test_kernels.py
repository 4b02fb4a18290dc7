"""The Triton kernels of outlook attention on a real device, against the eager operator in float64."""

import pytest
import torch

from volo.models.kernels import cuda
from volo.models.outlook_attention import outlook_attention

pytestmark = pytest.mark.cuda

WINDOW = {"kernel_size": 3, "stride": 2, "padding": 1}
# Images, rows, columns, heads, channels of a head; window. D1 at 224 and 384 px, D5 at 512 px, awkward sizes.
CASES = [
    (2, 28, 28, 6, 32, WINDOW),
    (1, 28, 28, 6, 32, WINDOW),
    (22, 28, 28, 6, 32, WINDOW),
    (2, 48, 48, 6, 32, WINDOW),
    (2, 64, 64, 12, 32, WINDOW),
    (1, 27, 33, 3, 32, WINDOW),
    (2, 8, 8, 2, 32, WINDOW),
    (3, 14, 70, 2, 48, WINDOW),
    (2, 15, 13, 2, 16, {"kernel_size": 3, "stride": 1, "padding": 1}),
    (2, 9, 10, 2, 17, {"kernel_size": 3, "stride": 3, "padding": 1}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest error allowed, relative to the largest entry of the exact result.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def draw(device, B, H, W, heads, head_dim, window, dtype):
    """Return values, logits and an output gradient."""
    K = window["kernel_size"]
    h, w = ((side + 2 * window["padding"] - K) // window["stride"] + 1 for side in (H, W))
    rng = torch.Generator(device).manual_seed(0)
    value = torch.randn(B, H, W, heads * head_dim, generator=rng, device=device)
    logits = 3 * torch.randn(B, h, w, heads * K**4, generator=rng, device=device)
    grad = torch.randn(B, H, W, heads * head_dim, generator=rng, device=device)
    return value.to(dtype), logits.to(dtype), grad.to(dtype)


def run(value, logits, grad, heads, window, kernel="native"):
    """Return output, gradient of the values and gradient of the logits."""
    value, logits = value.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention(value, logits, num_heads=heads, kernel=kernel, **window)
    return out.detach(), *torch.autograd.grad(out, (value, logits), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (*case[:5], case[5]["kernel_size"]))))
def test_equal_to_float64_and_to_itself(device, case, dtype):
    *_, heads, head_dim, window = case
    if not cuda.supports(*window.values(), head_dim, dtype):
        pytest.skip("supports() refuses this window in this type")
    tensors = draw(device, *case, dtype)
    first, second = (run(*tensors, heads, window) for _ in range(2))
    exact = run(*(x.double() for x in tensors), heads, window, kernel="eager")
    for name, found, again, truth in zip(("output", "value", "logits"), first, second, exact, strict=True):
        error = (found.double() - truth).abs().max() / truth.abs().max().clamp(min=1)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
        assert torch.equal(found, again), f"{name} differs between two runs"


def test_unaligned_storage(device):
    value, logits, grad = draw(device, *CASES[0], torch.bfloat16)
    storage = torch.empty(value.numel() + 1, device=device, dtype=value.dtype)
    shifted = storage[1:].view_as(value).copy_(value)
    expected, found = (run(x, logits, grad, 6, WINDOW) for x in (value, shifted))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_side_stream(device):
    if device.type == "cpu":
        pytest.skip("streams are CUDA's")
    tensors = draw(device, *CASES[0], torch.bfloat16)
    expected = run(*tensors, 6, WINDOW)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(*tensors, 6, WINDOW)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_offsets_beyond_31_bits(device):
    """With D5 at 512 px the logits of 128 images are 1.3 GB; of 512 images, more elements than an int32 counts."""
    if device.type == "cpu":
        pytest.skip("needs 40 GB")
    if torch.cuda.get_device_properties(device).total_memory < 60e9:
        pytest.skip("needs 60 GB of device memory")
    value, logits, grad = draw(device, 1, 64, 64, 12, 32, WINDOW, torch.bfloat16)
    expected = run(value, logits, grad, 12, WINDOW)
    images = 2**31 // logits[0].numel() + 2
    found = run(*(x.expand(images, *x.shape[1:]).contiguous() for x in (value, logits, grad)), 12, WINDOW)
    # The division of rows among programs depends on the batch, and with it the order of some sums.
    for name, many, one in zip(("output", "value", "logits"), found, expected, strict=True):
        assert (many[-1].float() - one[0].float()).abs().max() < 0.05, name
