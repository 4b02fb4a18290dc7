"""Numeric precision: what is computed in which type, gradient scaling, and the wiring of NVIDIA's apex.amp."""

import sys

import pytest
import torch

from volo.build import make_network
from volo.config import Config
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.runtime.distributed import World
from volo.runtime.precision import Precision

CPU = torch.device("cpu")


def make_learner(config: Config) -> Learner:
    learner = Learner(config, World(0, 1, 0, CPU), BatchLayout.of(config, 1), make_network(config, World(0, 1, 0, CPU)))
    learner.wrapped.train()
    return learner


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


@pytest.mark.parametrize(
    ("choice", "name", "computed_in"),
    [
        ("auto", "fp32", torch.float32),
        ("fp32", "fp32", torch.float32),
        ("bf16", "bf16", torch.bfloat16),
        ("fp16", "fp16", torch.float16),
    ],
)
def test_one_step_in_every_precision(tiny_config, make_batch, choice, name, computed_in):
    optim = {"name": "momentum"}
    full = make_learner(tiny_config(optim=optim))
    learner = make_learner(tiny_config(optim=optim, train={"precision": choice}))
    assert learner.precision == Precision(name, "cpu")
    assert learner.scaler.is_enabled() == (name == "fp16")
    seen = []
    learner.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    before = weights_of(learner)
    losses = [one.forward_backward(make_batch(4), 0, 0, 0).total.item() for one in (learner, full)]
    norms = [one.optimizer_step(0.1, 0).item() for one in (learner, full)]
    assert seen == [computed_in]
    rel = 1e-6 if name == "fp32" else 0.02
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    assert norms[0] == pytest.approx(norms[1], rel=5 * rel), "the norm is that of the unscaled gradients"
    for key, weight in weights_of(learner).items():
        assert weight.dtype == torch.float32
        moved, expected = weight - before[key], weights_of(full)[key] - before[key]
        assert (moved - expected).norm() <= 10 * rel * expected.norm() + 1e-7, key


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])  # with and without torch's fused implementation
def test_gradients_that_overflow_cost_a_step_and_nothing_else(tiny_config, make_batch, optimizer):
    config = tiny_config(
        train={"precision": "fp16"},
        optim={"name": optimizer, "clip_grad": 1.0},
        ema={"enabled": True, "decay": 0.5},
        schedule={"warmup_epochs": 0},
    )
    learner = make_learner(config)
    scaler = learner.scaler.state_dict() | {"scale": 2.0**120}
    learner.scaler.load_state_dict(scaler)
    before = weights_of(learner)
    terms = learner.forward_backward(make_batch(4), 0, 0, 0)
    norm = learner.optimizer_step(0.1, 0)
    assert terms.total.isfinite() and not norm.isfinite()
    assert learner.scaler.get_scale() == 2.0**119
    for name, weight in weights_of(learner).items():
        assert torch.equal(weight, before[name]), name
        assert torch.equal(learner.ema.module.get_parameter(name), before[name]), name
    state = learner.optimizer.state_dict()["state"]
    assert all(torch.as_tensor(entry.get("step", 0)) == 0 for entry in state.values()), "Adam's count did not move"

    learner.scaler.load_state_dict(scaler | {"scale": 2.0**10})
    learner.forward_backward(make_batch(4), 0, 0, 0)
    assert learner.optimizer_step(0.1, 0).isfinite()
    assert not torch.equal(learner.model.head.weight, before["head.weight"])


def test_without_fp16_a_broken_gradient_is_not_hidden(tiny_config, make_batch):
    learner = make_learner(tiny_config())
    learner.forward_backward(make_batch(4), 0, 0, 0)
    learner.model.head.bias.grad[0] = torch.inf
    assert not learner.optimizer_step(0.1, 0).isfinite()
    assert not learner.model.head.bias.isfinite().all()


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("native", "emulated", "auto"), [(True, True, "bf16"), (False, True, "fp16"), (False, False, "fp16")]
)
def test_auto_takes_what_the_card_computes_in_hardware(monkeypatch, native, emulated, auto):
    def supported(including_emulation=True):
        return emulated if including_emulation else native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert Precision.resolve("auto", CUDA) == Precision(auto, "cuda")
    assert Precision.resolve("fp16", CUDA) == Precision("fp16", "cuda")
    if emulated:
        assert Precision.resolve("bf16", CUDA) == Precision("bf16", "cuda")
    else:
        with pytest.raises(ValueError, match="bf16.*fp16 or fp32"):
            Precision.resolve("bf16", CUDA)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16", "apex_o1"])
def test_tf32_is_used_if_it_is_asked_for(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    try:
        Precision(name, "cuda").set_up()
        used = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        assert used == (name == "tf32",) * 2
    finally:
        torch.set_float32_matmul_precision("highest")
    assert Precision(name, "cuda").dtype == getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(name, "float32"))
    with pytest.raises(ValueError, match="only CUDA devices have"):
        Precision.resolve("tf32", CPU)


def test_a_learner_sets_it_up(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make_learner(tiny_config())
    assert not torch.backends.cudnn.allow_tf32


# -------------------------------------------------------------------------------------------------------- apex

# What NVIDIA's apex.amp does at O1, less its casts: a scaled loss, and gradients unscaled before they are added.
AMP = """
import contextlib

def initialize(model, optimizer, opt_level):
    assert opt_level == "O1"
    model.is_patched = True
    return model, optimizer

@contextlib.contextmanager
def scale_loss(loss, optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    yield loss * 1024
    for p, old in zip(parameters, before):
        p.grad = p.grad / 1024 if old is None else old + p.grad / 1024
"""
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode, **options):
        assert adam_w_mode is True
        super().__init__(params, **options)
"""


def test_a_step_with_apex_is_a_step(tiny_config, make_batch, install_apex):
    install_apex(amp=AMP, optimizers=FUSED_ADAM)
    batch = make_batch(4)
    results = []
    for precision, implementation in (("fp32", "torch"), ("apex_o1", "apex")):
        config = tiny_config(
            train={"precision": precision, "device_batch_size": 2, "batch_size": 4},
            optim={"implementation": implementation, "clip_grad": 0.1, "eps": 1e-3},
            ema={"enabled": True, "decay": 0.5},
        )
        learner = make_learner(config)
        halves = [make_batch(2, seed) for seed in (1, 2)]
        for micro, half in enumerate(halves):
            learner.forward_backward(half, 0, 0, micro)
        learner.optimizer_step(0.01, 0)
        results.append((weights_of(learner), dict(learner.ema.module.named_parameters())))
    assert learner.model.is_patched and type(learner.optimizer).__name__ == "FusedAdam"
    assert not learner.scaler.is_enabled() and len(batch) == 4
    for ours, theirs in zip(*results, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_without_apex_amp_the_message_says_what_does_the_same(install_apex, monkeypatch):
    with monkeypatch.context() as absent, pytest.raises(ValueError, match="train.precision fp16 does the same"):
        absent.setitem(sys.modules, "apex", None)
        Precision.resolve("apex_o1", CPU)
    install_apex(session="")  # PyPI's package of that name, or an Apex from which amp was removed
    with pytest.raises(ValueError, match="cannot import name 'amp'.*absent, or too new"):
        Precision.resolve("apex_o1", CPU)


def test_an_amp_that_is_not_nvidias(install_apex):
    install_apex(amp="")
    with pytest.raises(ValueError, match="has no amp.initialize: it is not NVIDIA's"):
        Precision.resolve("apex_o1", CPU)
