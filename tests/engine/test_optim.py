"""Optimizer, schedule and EMA against timm's scheduler and arithmetic by hand."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from torch import nn

from volo.config import EmaConfig, OptimConfig, ScheduleConfig
from volo.engine.optim import create_ema, create_optimizer, describe_groups, learning_rate, load_optimizer_state
from volo.models import create_model


class Net(nn.Module):
    """Weights of every kind: a matrix, vectors, an embedding without weight decay, BatchNorm buffers."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 2))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        return self.norm(self.linear(x).tanh()) * self.pos_embed.flatten()

    def no_weight_decay(self):
        return {"pos_embed"}


def train_a_step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, torch.Tensor]:
    """Take one step on random numbers; return the gradients."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    net(x).pow(2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    return gradients


# -------------------------------------------------------------------------------------------------- schedule


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_epoch_equals_timms(data):
    epochs = data.draw(st.integers(1, 60), "epochs")
    warmup = data.draw(st.sampled_from([0, 1, epochs // 2, epochs]), "warmup")
    rates = st.floats(1e-9, 1.0)
    lr, warmup_lr, min_lr = data.draw(rates, "lr"), data.draw(rates, "warmup_lr"), data.draw(rates, "min_lr")
    config = ScheduleConfig(epochs, min(warmup, epochs), 5, warmup_lr, min_lr)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=epochs,
        lr_min=min_lr,
        warmup_t=config.warmup_epochs,
        warmup_lr_init=warmup_lr,
        warmup_prefix=False,
        cycle_limit=1,
        t_in_epochs=True,
    )
    for epoch in range(config.total_epochs):
        theirs.step(epoch)
        assert learning_rate(config, lr, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize(
    ("config", "lr", "expected"),
    [
        # The published recipe: 20 epochs of warm-up from 1e-6, then a cosine of 300 epochs from its value there.
        (ScheduleConfig(), 1.6e-3, {0: 1e-6, 10: 8.005e-4, 19: 1.52005e-3, 20: 1.582627e-3, 150: 8.05e-4}),
        (ScheduleConfig(), 1.6e-3, {299: 1.00436e-5, 300: 1e-5, 309: 1e-5}),
        # Its fine-tuning: 30 epochs, 5 of them warm-up.
        (ScheduleConfig(30, 5, 10, 1e-6, 4e-6), 8e-6, {0: 1e-6, 4: 6.6e-6, 5: 7.732051e-6, 15: 6e-6, 30: 4e-6}),
        (ScheduleConfig(10, 0, 0, 1e-6, 0.0), 1.0, {0: 1.0, 5: 0.5, 10: 0.0}),
        (ScheduleConfig(1, 1, 0, 1e-6, 0.0), 1.0, {0: 1e-6}),
    ],
)
def test_values_by_hand(config, lr, expected):
    for epoch, value in expected.items():
        assert learning_rate(config, lr, epoch) == pytest.approx(value, rel=1e-5), epoch


def test_between_epochs_it_is_smooth():
    config = ScheduleConfig(4, 2, 1, 0.0, 0.0)
    assert learning_rate(config, 1.0, 0.5) == pytest.approx(0.25)
    assert learning_rate(config, 1.0, 1.5) == pytest.approx(0.75)
    assert learning_rate(config, 1.0, 3.5) == pytest.approx(0.5 * (1 + math.cos(3.5 / 4 * math.pi)))
    assert learning_rate(config, 1.0, 4.25) == 0.0


# ------------------------------------------------------------------------------------------------- optimizer


def test_d1_decays_what_the_published_code_decays():
    with torch.device("meta"):  # shapes alone
        model = create_model("volo_d1")
    optimizer = create_optimizer(model, OptimConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["weight_decay"]: [names[id(p)] for p in g["params"]] for g in optimizer.param_groups}
    assert sorted(groups) == [0.0, 0.05]
    count = {decay: sum(model.get_parameter(n).numel() for n in members) for decay, members in groups.items()}
    assert (len(groups[0.05]), count[0.05]) == (93, 26_488_512)
    assert (len(groups[0.0]), count[0.0]) == (158, 143_528)
    assert {"pos_embed", "cls_token"} <= set(groups[0.0])
    expected = "93 tensors (26,488,512 parameters) with weight decay, 158 tensors (143,528 parameters) without"
    assert expected in describe_groups(optimizer)


def test_adamw_by_hand():
    """Decoupled decay, then Adam's step with both bias corrections (arXiv 1711.05101), in float64."""
    lr, decay, beta1, beta2, eps = 0.05, 0.3, 0.8, 0.95, 1e-6
    net = Net()
    optimizer = create_optimizer(net, OptimConfig(lr=lr, weight_decay=decay, betas=[beta1, beta2], eps=eps))
    weights = {name: p.detach().double() for name, p in net.named_parameters()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, 6):
        gradients = train_a_step(net, optimizer, seed=step)
        for name, weight in weights.items():
            gradient = gradients[name].double()
            if name == "linear.weight":
                weight = weight * (1 - lr * decay)
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            corrected = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
            weights[name] = weight - lr * corrected[0] / (corrected[1].sqrt() + eps)
            # The next step starts from the float32 weights, so each step is compared on its own.
            torch.testing.assert_close(net.get_parameter(name).detach().double(), weights[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "lamb", "lion", "adafactor", "rmsprop", "lookahead_adamw"])
def test_other_optimizers_of_timm_take_a_step(name):
    net = Net()
    before = net.linear.weight.detach().clone()
    optimizer = create_optimizer(net, OptimConfig(name=name))
    for seed in range(2):
        train_a_step(net, optimizer, seed)
    assert not torch.equal(net.linear.weight, before) and net.linear.weight.isfinite().all()


def test_three_betas_for_an_optimizer_that_takes_three():
    net = Net()
    train_a_step(net, create_optimizer(net, OptimConfig(name="adan", betas=[0.98, 0.92, 0.99])), seed=0)
    with pytest.raises(ValueError, match="'adan' takes 3 betas.*optim.betas is"):
        create_optimizer(net, OptimConfig(name="adan"))
    with pytest.raises(ValueError, match="'adamw' takes 2 betas"):
        create_optimizer(net, OptimConfig(betas=[0.9, 0.9, 0.9]))


def test_unknown_optimizer_names():
    with pytest.raises(ValueError, match=r"optim.name 'adamv' is not one of timm's \d+ .*adam"):
        create_optimizer(Net(), OptimConfig(name="adamv"))
    with pytest.raises(ValueError, match="'lookahead_xyz'.*adamw"):
        create_optimizer(Net(), OptimConfig(name="lookahead_xyz"))
    with pytest.raises(ValueError, match="second derivatives"):
        create_optimizer(Net(), OptimConfig(name="adahessian"))


def test_state_is_loaded_and_options_are_the_configs():
    net = Net()
    old = create_optimizer(net, OptimConfig(weight_decay=0.1, betas=[0.5, 0.6], eps=1e-3))
    train_a_step(net, old, seed=0)
    new = create_optimizer(net, OptimConfig(weight_decay=0.2, betas=[0.7, 0.8], eps=1e-4))
    load_optimizer_state(new, old.state_dict())
    assert [(g["weight_decay"], g["betas"], g["eps"]) for g in new.param_groups] == [
        (0.0, (0.7, 0.8), 1e-4),
        (0.2, (0.7, 0.8), 1e-4),
    ]
    for parameter in net.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
        assert new.state[parameter]["step"] == 1


# ------------------------------------------------------------------------------------------------------ apex

FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=None, weight_decay=0.0):
        assert adam_w_mode is True
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""


def test_apex_does_the_same_arithmetic(install_apex):
    install_apex(optimizers=FUSED_ADAM)
    options = {"lr": 0.1, "weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 0.1}
    nets = {"torch": Net(), "apex": Net()}
    for implementation, net in nets.items():
        optimizer = create_optimizer(net, OptimConfig(implementation=implementation, **options))
        assert type(optimizer).__name__ == {"torch": "AdamW", "apex": "FusedAdam"}[implementation]
        for seed in range(3):
            train_a_step(net, optimizer, seed)
    for ours, theirs in zip(nets["torch"].parameters(), nets["apex"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_nvidias_apex_the_message_says_what_to_do(install_apex, monkeypatch):
    with monkeypatch.context() as absent, pytest.raises(ValueError, match="optim.implementation torch: torch's fused"):
        absent.setitem(sys.modules, "apex", None)
        create_optimizer(Net(), OptimConfig(implementation="apex"))
    install_apex(session="")  # what PyPI has under that name
    with pytest.raises(ValueError, match="No module named 'apex.optimizers'.*the PyPI package of that name"):
        create_optimizer(Net(), OptimConfig(implementation="apex"))
    with pytest.raises(ValueError, match="optim.name is 'lamb'. Use optim.name adamw"):
        create_optimizer(Net(), OptimConfig(implementation="apex", name="lamb"))


# ------------------------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize("warmup", [False, True])
def test_the_ema_by_hand(warmup):
    """Parameters and float buffers are averaged, counters copied; with warmup the decay is 1 - step^(-2/3)."""
    net = Net()
    ema = create_ema(net, EmaConfig(enabled=True, decay=0.75, warmup=warmup))
    optimizer = create_optimizer(net, OptimConfig(lr=0.1))
    expected = {name: value.double() for name, value in net.state_dict().items()}
    for step in range(12):
        train_a_step(net, optimizer, seed=step)
        ema.update(net, step=step if warmup else None)
        decay = 0.75 if not warmup else 0.0 if step < 2 else min(0.75, 1 - step ** (-2 / 3))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert name == "norm.num_batches_tracked" or not torch.equal(value, net.state_dict()[name])
    assert not ema.module.training


def test_no_ema_if_it_is_off():
    assert create_ema(Net(), EmaConfig()) is None
