"""The outlook operator against loops that follow the paper's words, and its gradients."""

import copy
import doctest
import importlib
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from volo.models import create_model, outlook_attention
from volo.models.kernels import cpu, cuda
from volo.models.outlook_attention import _KERNELS, _unavailable_reason

KERNELS = ["eager", "native"]


def windows_of(side, kernel, stride, padding):
    return (side + 2 * padding - kernel) // stride + 1


def by_loops(value, logits, num_heads, kernel, stride, padding):
    """Every window, query and key in turn; no unfold, no fold, no batched product."""
    B, H, W, C = value.shape
    d = C // num_heads
    area = kernel * kernel
    out = torch.zeros_like(value)
    for b in range(B):
        for r in range(logits.shape[1]):
            for c in range(logits.shape[2]):
                cells = [
                    (r * stride - padding + i, c * stride - padding + j) for i in range(kernel) for j in range(kernel)
                ]
                for head in range(num_heads):
                    chan = slice(head * d, (head + 1) * d)
                    for query, (row, col) in enumerate(cells):
                        if not (0 <= row < H and 0 <= col < W):
                            continue
                        start = (head * area + query) * area
                        scores = [x / math.sqrt(d) for x in logits[b, r, c, start : start + area].tolist()]
                        total = sum(math.exp(s) for s in scores)
                        for score, (key_row, key_col) in zip(scores, cells, strict=True):
                            if 0 <= key_row < H and 0 <= key_col < W:
                                weight = math.exp(score) / total
                                out[b, row, col, chan] += weight * value[b, key_row, key_col, chan]
    return out


def draw(B, H, W, heads, d, kernel, stride, padding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, w = windows_of(H, kernel, stride, padding), windows_of(W, kernel, stride, padding)
    value = torch.randn(B, H, W, heads * d, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(B, h, w, heads * kernel**4, generator=generator, dtype=torch.float64)
    return value, logits


@pytest.mark.parametrize("kernel_choice", KERNELS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    heads=st.integers(1, 2),
    d=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
)
def test_equals_loops_for_any_shape(kernel_choice, B, H, W, heads, d, kernel, stride, padding):
    assume(min(windows_of(H, kernel, stride, padding), windows_of(W, kernel, stride, padding)) >= 1)
    value, logits = draw(B, H, W, heads, d, kernel, stride, padding)
    ours = outlook_attention(
        value, logits, num_heads=heads, kernel_size=kernel, stride=stride, padding=padding, kernel=kernel_choice
    )
    torch.testing.assert_close(ours, by_loops(value, logits, heads, kernel, stride, padding))


@pytest.mark.parametrize("kernel_choice", KERNELS)
@pytest.mark.parametrize(
    ("H", "W", "kernel", "stride", "padding"),
    [(7, 5, 3, 2, 1), (4, 6, 3, 1, 1), (5, 4, 5, 2, 2), (3, 4, 5, 1, 2), (6, 7, 3, 3, 1), (4, 4, 2, 2, 0)],
)
def test_equals_loops_at_chosen_shapes(kernel_choice, H, W, kernel, stride, padding):
    value, logits = draw(2, H, W, 2, 2, kernel, stride, padding)
    ours = outlook_attention(
        value, logits, num_heads=2, kernel_size=kernel, stride=stride, padding=padding, kernel=kernel_choice
    )
    torch.testing.assert_close(ours, by_loops(value, logits, 2, kernel, stride, padding))


@pytest.mark.parametrize("kernel_choice", KERNELS)
@pytest.mark.parametrize(("H", "W", "kernel", "stride", "padding"), [(3, 4, 3, 2, 1), (3, 2, 3, 1, 1), (3, 3, 5, 2, 2)])
def test_gradients(kernel_choice, H, W, kernel, stride, padding):
    value, logits = draw(1, H, W, 2, 1, kernel, stride, padding)

    def run(value, logits):
        return outlook_attention(
            value, logits, num_heads=2, kernel_size=kernel, stride=stride, padding=padding, kernel=kernel_choice
        )

    assert torch.autograd.gradcheck(run, (value.requires_grad_(), logits.requires_grad_()), fast_mode=True)


def test_padding_keeps_its_share_of_the_softmax():
    """A constant image: the corner's window has 4 of 9 cells inside, so its mean over 9 is 4/9."""
    value = torch.ones(1, 4, 4, 1)
    y = outlook_attention(value, torch.zeros(1, 2, 2, 81), num_heads=1)
    assert y[0, 0, 0, 0].item() == pytest.approx(4 / 9)
    # Cell (1, 1) lies in all four windows, which have 4, 6, 6 and 9 cells inside: a sum, not a mean.
    assert y[0, 1, 1, 0].item() == pytest.approx((4 + 6 + 6 + 9) / 9)


def test_input_need_not_be_contiguous():
    value, logits = draw(2, 5, 4, 2, 2, 3, 2, 1)
    expected = outlook_attention(value, logits, num_heads=2)
    strided = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in (value, logits)]
    assert not strided[1].is_contiguous()
    torch.testing.assert_close(outlook_attention(*strided, num_heads=2), expected)


def test_dropout_drops_weights_and_keeps_the_mean():
    value, logits = torch.ones(1, 2, 2, 1), torch.zeros(1, 1, 1, 81)
    torch.manual_seed(0)
    drawn = torch.stack([outlook_attention(value, logits, num_heads=1, dropout_p=0.5)[0, 0, 0] for _ in range(2000)])
    assert drawn.std() > 0.1
    assert drawn.mean().item() == pytest.approx(4 / 9, abs=0.03)  # std error of the mean is 0.005


def test_bad_shapes_are_named():
    value = torch.zeros(1, 4, 4, 6)
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 243\].*kernel 3.*\[1, 2, 2, 162\]"):
        outlook_attention(value, torch.zeros(1, 2, 2, 243), num_heads=2)
    with pytest.raises(ValueError, match="6 channels, which 4 heads"):
        outlook_attention(value, torch.zeros(1, 2, 2, 324), num_heads=4)
    with pytest.raises(ValueError, match="window of 7 does not fit a 4x4 grid"):
        outlook_attention(value, torch.zeros(1, 1, 1, 1), num_heads=2, kernel_size=7, padding=1)


def test_the_worked_example_is_true():
    # By its module name: the package exports the function under the same name.
    module = importlib.import_module("volo.models.outlook_attention")
    result = doctest.testmod(module)
    assert result.attempted >= 7
    assert result.failed == 0


# --- choice of kernel, and the native one as an operator of torch -----------------------------------------------


@pytest.mark.parametrize(("B", "H", "W"), [(1, 4, 4), (2, 5, 3)])
def test_native_operator_is_well_formed(B, H, W):
    value, logits = (x.float().requires_grad_() for x in draw(B, H, W, 2, 3, 3, 2, 1))
    torch.library.opcheck(torch.ops.volo.outlook_attention.default, (value, logits, 2, 3, 2, 1))
    grad = torch.randn(B, H, W, 6)
    arguments = (grad, value.detach(), logits.detach(), 2, 3, 2, 1)
    torch.library.opcheck(torch.ops.volo.outlook_attention_backward.default, arguments)


def test_native_kernel_refuses_a_second_derivative():
    value, logits = (x.float().requires_grad_() for x in draw(1, 4, 4, 2, 2, 3, 2, 1))
    out = outlook_attention(value, logits, num_heads=2, kernel="native")
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.slow
def test_native_kernel_is_in_the_compiled_graph():
    value, logits = (x.float().requires_grad_() for x in draw(2, 5, 4, 2, 2, 3, 2, 1))

    def run(value, logits):
        return outlook_attention(value, logits, num_heads=2, kernel="native").square()

    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=keep_graph)
    torch.testing.assert_close(compiled(value, logits), run(value, logits))
    assert [str(node.target) for node in graphs[0].graph.nodes].count("volo.outlook_attention.default") == 1


@pytest.mark.slow
def test_export_keeps_the_operator(make_small):
    model, images = make_small().eval(), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,))
    assert "volo.outlook_attention.default" in {str(node.target) for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(images), model(images))


def test_half_precision_is_within_its_rounding():
    value, logits = (x.float() for x in draw(2, 8, 6, 3, 32, 3, 2, 1))
    exact = outlook_attention(value, logits, num_heads=3, kernel="eager")
    for dtype, digits in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        for choice in KERNELS:
            ours = outlook_attention(value.to(dtype), logits.to(dtype), num_heads=3, kernel=choice)
            assert ours.dtype == dtype
            assert (ours.float() - exact).abs().max() <= 16 * digits * exact.abs().max()


def test_dropout_takes_the_eager_operator():
    value, logits = draw(1, 4, 4, 2, 2, 3, 2, 1)
    dropped = outlook_attention(value, logits, num_heads=2, dropout_p=0.9)
    assert not torch.allclose(dropped, outlook_attention(value, logits, num_heads=2))
    with pytest.raises(ValueError, match="cannot be used: It has no dropout"):
        outlook_attention(value, logits, num_heads=2, dropout_p=0.9, kernel="native")


def test_devices_without_a_kernel_take_the_eager_operator():
    value, logits = (x.to("meta") for x in draw(1, 4, 4, 2, 2, 3, 2, 1))
    assert outlook_attention(value, logits, num_heads=2).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="There is none for devices of type meta"):
        outlook_attention(value, logits, num_heads=2, kernel="native")


def test_network_says_what_it_took(make_small):
    model, images = make_small().double().eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    logits = {}
    for choice, said in (("auto", "native, for cpu"), ("native", "native, for cpu"), ("eager", "eager, as")):
        assert model.set_kernel(choice).startswith(said)
        logits[choice] = model(images)
    assert torch.equal(logits["auto"], logits["native"])
    torch.testing.assert_close(logits["native"], logits["eager"])
    with pytest.raises(ValueError, match="kernel is 'fast'; it is one of auto, eager, native"):
        model.set_kernel("fast")
    model.set_kernel("auto")
    assert {block.attn.kernel for block in model.network[0]} == {"native"}
    dropping = create_model("volo_nano", img_size=32, attn_drop_rate=0.1)
    assert dropping.set_kernel("auto").startswith("eager. It has no dropout")
    with pytest.raises(ValueError, match="no dropout"):
        dropping.set_kernel("native")


@pytest.fixture
def fresh_choice():
    """Let the next question about the native kernel be the first, and forget what it was answered."""
    _unavailable_reason.cache_clear()
    yield
    _unavailable_reason.cache_clear()


def failing(*arguments):
    raise subprocess.CalledProcessError(1, ["gcc", "main.c"])  # Triton's, where Python.h is missing


def wrong_in_one_cell(*arguments):
    out = cpu.forward(*arguments)
    out[-1, -1, -1, -1] += 0.1
    return out


def without_logits(grad, value, logits, *window):
    return cpu.backward(grad, value, logits, *window)[0], torch.full_like(logits, torch.nan)


@pytest.mark.parametrize(
    ("name", "stand_in", "reason"),
    [
        ("forward", failing, "Its trial run failed with CalledProcessError: Command '['gcc', 'main.c']'"),
        ("forward", wrong_in_one_cell, "Its trial run differs from the eager operator by 0.0"),
        ("backward", without_logits, "Its trial run differs from the eager operator by nan"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_not_chosen(make_small, monkeypatch, fresh_choice, name, stand_in, reason):
    kernel = SimpleNamespace(forward=cpu.forward, backward=cpu.backward, unavailable_reason=lambda: None)
    setattr(kernel, name, stand_in)
    monkeypatch.setitem(_KERNELS, "cpu", kernel)
    model, images = make_small(), torch.randn(1, 3, 32, 32)
    assert model.set_kernel("auto").startswith(f"eager. {reason}")
    assert model(images).cls.isfinite().all()
    with pytest.raises(ValueError, match="cannot be used: Its trial run"):
        model.set_kernel("native")
    model.eval()
    for block in model.network[0]:
        block.attn.kernel = "auto"  # of a model whose kernel nobody chose
    torch.testing.assert_close(model(images), create_like(model)(images))


def create_like(model):
    """Return the same network with the eager operator."""
    other = copy.deepcopy(model)
    other.set_kernel("eager")
    return other


@pytest.mark.parametrize("how", ["compile", "export", "inference mode", "autocast", "no_grad"])
def test_the_trial_is_independent_of_what_surrounds_it(make_small, fresh_choice, how):
    model, images = make_small().eval(), torch.randn(1, 3, 32, 32)
    state = torch.get_rng_state()
    if how == "compile":
        torch.compile(model, fullgraph=True, backend="eager")(images)
    elif how == "export":
        torch.export.export(model, (images,))
    else:
        autocast = torch.autocast("cpu", torch.bfloat16)
        with {"inference mode": torch.inference_mode(), "autocast": autocast, "no_grad": torch.no_grad()}[how]:
            model(images)
    assert torch.equal(torch.get_rng_state(), state)
    asked = _unavailable_reason.cache_info().misses
    assert asked > 0
    assert all(layer.unavailable_reason("cpu", torch.float32) is None for layer in (b.attn for b in model.network[0]))
    assert _unavailable_reason.cache_info().misses == asked + (how == "autocast")


def test_shapes_that_the_cuda_kernel_does_not_take_are_told_at_once(make_small, monkeypatch, fresh_choice):
    model = make_small(img_size=64, embed_dims=(512, 24, 24))  # heads of 256
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    del model.pos_embed
    model.pos_embed = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    said = model.set_kernel("auto", torch.bfloat16)
    assert said.startswith("eager. It does not take windows") and "256 torch.bfloat16" in said
    assert {block.attn.kernel for block in model.network[0]} == {"eager"}
    with pytest.raises(ValueError, match="It does not take windows"):
        model.set_kernel("native")
