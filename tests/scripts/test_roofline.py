"""scripts/benchmark/roofline.py: what it counts, against closed forms; the estimate itself is compared in the docs."""

import importlib
import json

import pytest
import torch
from programs import ROOT, USAGE, run
from torch import nn

from volo.models import create_model
from volo.models.blocks import Block

FOLDER = ROOT / "scripts" / "benchmark"
SMALL = {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [2, 2, 2, 2], "stem_hidden_dim": 8}
SIDE, BATCH = 64, 2


@pytest.fixture(scope="module")
def counting():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(FOLDER)
        yield importlib.import_module("counted_step")


@pytest.fixture(scope="module")
def steps(counting):
    """The operators of a small network's step, by variant."""
    return {
        name: counting.counted_step(counting.Network("volo_nano", SIDE, BATCH), variant, **SMALL)
        for name, variant in counting.VARIANTS.items()
    }


@pytest.fixture(scope="module")
def products():
    """Operations of every linear layer's forward pass, and whether it is in a block: from a real network's inputs."""
    network = create_model("volo_nano", img_size=SIDE, **SMALL)
    network.set_recompute("none")
    found = []

    def note(inside: bool):
        return lambda layer, inputs, output: found.append((2 * inputs[0].numel() * layer.out_features, inside))

    in_blocks = {m for b in network.modules() if isinstance(b, Block) for m in b.modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note(module in in_blocks))
    network.train()(torch.randn(BATCH, 3, SIDE, SIDE))
    return found


def flops(operators, kind) -> int:
    return sum(operator.flops for operator in operators if operator.kind == kind)


def moved(operators, kind) -> int:
    return sum(operator.bytes for operator in operators if operator.kind == kind)


def test_linear_layers_have_three_products(steps, products):
    assert flops(steps["none"], "linear layers") == 3 * sum(once for once, _ in products)


def test_blocks_cost_one_more_forward_pass_and_cheap_less(steps, products):
    none, cheap, blocks = (flops(steps[name], "linear layers") for name in ("none", "cheap", "blocks"))
    in_blocks = sum(once for once, inside in products if inside)
    # The last product of a block is not needed again.
    assert 0.7 * in_blocks < blocks - none <= in_blocks
    assert none < cheap < blocks  # cheap has the first product of the Outlookers' MLP again


def test_self_attention_has_seven_products(steps):
    tokens, dim = (SIDE // 8) ** 2, 32
    grid = 3 * tokens * tokens * dim  # in three Transformers
    of_class = (tokens + 1) * dim  # in one class block
    assert flops(steps["none"], "self-attention") == 7 * 2 * BATCH * (grid + of_class)


def test_the_eager_operator_moves_what_the_native_one_does_not(steps):
    eager, native = (moved(steps[name], "outlook attention") for name in ("none, eager kernel", "none"))
    assert eager > 3 * native > 0
    names = {o.name for o in steps["none, eager kernel"] if o.kind == "outlook attention"}
    assert {"im2col", "_softmax", "_softmax_backward_data", "col2im"} <= names, "its backward pass, too"
    assert {"outlook_attention", "outlook_attention_backward"} == {
        o.name for o in steps["none"] if o.kind == "outlook attention"
    }


def test_optimizer_and_average_read_and_write_every_parameter(steps):
    parameters = sum(p.numel() for p in create_model("volo_nano", img_size=SIDE, **SMALL).parameters())
    adam = sum(o.bytes for o in steps["none"] if o.name == "_fused_adamw_")
    # Weight and two averages are read and written, the gradient is read; 4 bytes each.
    assert adam == pytest.approx(28 * parameters, 0.01)
    assert moved(steps["none"], "EMA") == pytest.approx(12 * parameters, 0.02)


def test_gradients_of_the_loss_are_the_loss(steps):
    assert {"_log_softmax", "_log_softmax_backward_data"} <= {o.name for o in steps["none"] if o.kind == "loss"}


def test_tokens_in_bf16_move_less(steps):
    narrow, wide = (moved(steps[name], "sums, products, zeros") for name in ("none, bf16 tokens", "none"))
    assert narrow < wide


@pytest.mark.parametrize(
    ("run_operator", "expected"),
    [
        (lambda x, y: x + y, 24 + 24 + 24),
        (lambda x, y: x + y.bfloat16(), (24 + 12) + (24 + 12 + 24)),
        (lambda x, y: x.add_(y), 24 + 24 + 24),
        (lambda x, y: x.copy_(y), 24 + 24),
        (lambda x, y: x.zero_(), 24),
        (lambda x, y: x + y[:1].expand(2, 3), 24 + 12 + 24),
        (lambda x, y: x.view(3, 2).t()[:1], 0),
        (lambda x, y: torch._foreach_add_([x, x], [y, y]), 6 * 24),
    ],
)
def test_bytes_of_one_operator(counting, run_operator, expected):
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    with counting.OperatorCounter() as counter:
        run_operator(x, y)
    assert sum(operator.bytes for operator in counter.operators) == expected


def test_an_operator_takes_the_longer_of_its_two_times(counting):
    card = counting.Card(flops=100.0, bytes=10.0)
    assert counting.Operator("mm", "linear layers", flops=300, bytes=20).seconds(card) == 3
    assert counting.Operator("mm", "linear layers", flops=300, bytes=50).seconds(card) == 5


def test_the_program_prints_and_saves_its_estimate(tmp_path):
    words = ("--networks", f"volo_nano:{SIDE}:{BATCH}", "--variants", "0,2", "--card", "H200", "--json", "out.json")
    ended = run(FOLDER / "roofline.py", *words, cwd=tmp_path).assert_done()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["title"] in ended.out and "ESTIMATE" in result["title"] and "4.8 TB/s" in result["title"]
    none = [row for row in result["rows"] if row["variant"] == "none"]
    assert none[0]["kind"] == "all"
    assert none[0]["operators"] == sum(row["operators"] for row in none[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--card H300", "H300"),
        ("--tflops 0", "--tflops is 0"),
        ("--batch_size 2", "batch_size"),
        ("--variants 9", "--variants has '9'"),
        ("--variants -1", "--variants has '-1'"),
        ("--networks volo_d1", "--networks has 'volo_d1'"),
        ("--networks volo_d1:224:0", "numbers above 0"),
        ("--networks volo_d9:224:8", "volo_d9"),
        ("--networks volo_d1:225:8", "225"),
    ],
)
def test_wrong_usage(tmp_path, words, message):
    run(FOLDER / "roofline.py", *words.split(), cwd=tmp_path).assert_failed(USAGE, message)
