"""What is kept for the backward pass, and that computing things again changes no number."""

import copy
import pickle
from typing import get_args

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from volo.models import create_model
from volo.models.checkpointing import Recompute

MODES = get_args(Recompute)


def kept_bytes(model, images, forward=None):
    """Bytes of the storages that autograd holds after a forward pass, parameters and images apart."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), images)}
    kept = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        outputs = (forward or model)(images)  # held, so that no storage is freed and counted twice
    assert outputs[0].requires_grad
    return sum(kept.values())


def step(model, images):
    """Outputs, gradients and buffers of one training step."""
    torch.manual_seed(0)  # of what is dropped
    cls, tokens = model.train()(images)
    (cls.square().mean() + tokens.square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"cls": cls, "tokens": tokens, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_path_rate": 0.5},
        {"drop_rate": 0.3},
        {"attn_drop_rate": 0.3},
        {"outlook_stages": (False, True, True), "drop_path_rate": 0.3, "qkv_bias": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_numbers_are_the_same(make_small, options, batch):
    images = torch.randn(batch, 3, 32, 48, dtype=torch.float64)
    results = {}
    for mode in MODES:
        model = make_small(img_size=(32, 48), **options).double()
        model.set_recompute(mode)
        results[mode] = step(model, images)
    for mode in MODES[1:]:
        assert results[mode].keys() == results[MODES[0]].keys()
        for name, value in results[mode].items():
            expected = results[MODES[0]][name]
            # Gradients that meet in a sum may come in another order.
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_and_autocast(make_small, precision):
    """Gradients are those that autograd finds, where some are not asked for, and in the dtypes that it has."""
    images = torch.randn(3, 3, 32, 48)
    results = {}
    for mode in MODES:
        model = make_small(img_size=(32, 48)).train()
        model.set_recompute(mode)
        for name, p in model.named_parameters():
            p.requires_grad_(
                not any(part in name for part in ("patch_embed.conv.4", "0.0.norm1", "attn.v.", "fc1.bias"))
            )
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            cls, tokens = model(images)
        (cls.float().square().mean() + tokens.float().square().mean()).backward()
        results[mode] = {name: p.grad for name, p in model.named_parameters()}
    expected = results.pop("none")
    assert sum(grad is None for grad in expected.values()) > 5
    for found in results.values():
        for name, grad in expected.items():
            assert (found[name] is None) == (grad is None)
            if grad is not None:
                # Parts of a sum in bf16 may come in another order.
                near = {"rtol": 1e-5, "atol": 1e-7} if precision == "fp32" else {"rtol": 0.05, "atol": 1e-3}
                torch.testing.assert_close(found[name], grad, **near, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", MODES)
def test_copies_keep_less_too_and_have_their_own_parameters(make_small, mode):
    """As of EMA, and of a worker that the network is sent to."""
    model, images = make_small(), torch.randn(2, 3, 32, 32)
    model.set_recompute(mode)
    keys = list(model.state_dict())
    kept = kept_bytes(model.train(), images)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = step(model, images)
    for other in copies:
        assert list(other.state_dict()) == keys
        assert all(p.grad is None for p in other.parameters())
        assert kept_bytes(copy.deepcopy(other), images) == kept
        for name, value in step(other, images).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(make_small, mode):
    images = torch.randn(2, 3, 32, 32)
    model = make_small()
    model.set_recompute(mode)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    expected, found = step(model, images), step(compiled, images)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-6)


def test_a_choice_can_be_taken_back(make_small):
    model, images = make_small().train(), torch.randn(2, 3, 32, 32)
    kept = {}
    for mode in (*MODES, *MODES):
        model.set_recompute(mode)
        assert kept.setdefault(mode, kept_bytes(model, images)) == kept_bytes(model, images)
    assert kept["none"] > kept["cheap"] > kept["blocks"]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_may_be_kept_elsewhere(make_small, mode):
    """torch.autograd.graph.save_on_cpu and its like give copies back."""
    model, images = make_small(), torch.randn(2, 3, 32, 32)
    model.set_recompute(mode)
    expected = step(model, images)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        found = step(model, images)
    for name, value in expected.items():
        if name.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_a_parameter_that_changes_between_the_passes_is_found(make_small):
    model = make_small().train()
    total = sum(x.sum() for x in model(torch.randn(2, 3, 32, 32)))
    with torch.no_grad():
        model.network[0][0].mlp.fc2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class Adapted(nn.Module):
    """A layer with something learned beside it, as fine-tuning puts in place of it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.beside(x)


def test_layers_that_were_replaced_get_their_gradients(make_small):
    results = {}
    for mode in MODES:
        torch.manual_seed(1)
        model = make_small().double()
        model.set_recompute(mode)
        for block in model.network[0]:
            block.attn.v, block.mlp.fc2 = Adapted(block.attn.v).double(), Adapted(block.mlp.fc2).double()
        results[mode] = step(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    for mode in MODES[1:]:
        for name, value in results["none"].items():
            torch.testing.assert_close(results[mode][name], value, rtol=1e-10, atol=1e-12)


def test_parameters_that_are_swapped_back_before_the_backward_pass_are_refused(make_small):
    model, images = make_small().train(), torch.randn(2, 3, 32, 32)
    others = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    total = sum(x.sum() for x in torch.func.functional_call(model, others, (images,)))
    with pytest.raises(RuntimeError, match=r"set_recompute\('none'\)"):
        total.backward()
    model.set_recompute("none")
    sum(x.sum() for x in torch.func.functional_call(model, others, (images,))).backward()
    assert all(p.grad is not None for p in others.values())


def test_running_statistics_are_updated_once(make_small):
    model = make_small()
    before = {name: b.clone() for name, b in model.named_buffers()}
    after = step(model, torch.randn(2, 3, 32, 32))
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert len(counts) == 3
    assert all(after[name] == before[name] + 1 for name in counts)


def test_a_buffer_stays_the_same_tensor(make_small):
    """A state_dict taken before, or DistributedDataParallel's list of buffers, must not go stale."""
    model = make_small()
    before = [b.data_ptr() for b in model.buffers()]
    step(model, torch.randn(2, 3, 32, 32))
    assert [b.data_ptr() for b in model.buffers()] == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_d1_keeps_at_most_half_of_what_timm_keeps(precision):
    ours, theirs = create_model("volo_d1").train(), timm.create_model("volo_d1_224").train()
    images = torch.randn(4, 3, 224, 224)
    # Without the cache a weight cast to bf16 is kept, not looked up: both would count it.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        mine = kept_bytes(ours, images)
        assert mine <= 0.5 * kept_bytes(theirs, images, theirs.forward_train)
        ours.set_recompute("blocks")
        assert kept_bytes(ours, images) <= 0.6 * mine


@pytest.mark.slow
def test_d1_computes_few_products_twice():
    images = torch.randn(1, 3, 224, 224)
    flops = {}
    for mode in ("none", "cheap"):
        model = create_model("volo_d1").train()
        model.set_recompute(mode)
        with FlopCounterMode(display=False) as counter:
            sum(x.sum() for x in model(images)).backward()
        flops[mode] = counter.get_total_flops()
    # Once more: the first convolution of the stem; in 4 Outlookers the first of the MLP's two products. Multiply-adds
    # count twice.
    again = 112 * 112 * 64 * 3 * 49 + 4 * 784 * 192 * 576
    outlook = 4 * 196 * 6 * 81 * 32  # counted where it is PyTorch's product and not a kernel of its own
    assert flops["cheap"] - flops["none"] in (2 * again, 2 * (again + outlook))
    assert 2 * again < 0.03 * flops["none"]


def test_unknown_choice_is_named(make_small):
    with pytest.raises(ValueError, match=r"recompute is 'all'; it is one of none, cheap, blocks"):
        make_small().set_recompute("all")


def test_synchronised_norms_are_not_computed_twice(make_small):
    """They talk to the other processes. On one process they are plain BatchNorms, which is enough to see it."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_small())
    calls = []
    for norm in (m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)):
        norm.forward = lambda x, norm=norm: (
            calls.append(norm)
            or nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True)
        )
    cls, _ = model.train()(torch.randn(2, 3, 32, 32))
    cls.sum().backward()
    assert len(calls) == 3
