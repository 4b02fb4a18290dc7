"""The optimizer step: accumulation, processes, clipping, mixing, resuming. Every equality is of weights after steps.

A global batch of 8 images is given to one or two processes, in one or more passes.
"""

import copy
from dataclasses import replace

import pytest
import torch
from processes import run_group
from torch import nn

from volo.build import make_network
from volo.config import Config
from volo.data.dataset import Batch
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.runtime.distributed import World, broadcast_buffers
from volo.training import check_options

# SGD's steps differ by as little as the gradients do; Adam's do not if a gradient is almost zero.
SGD = {"name": "momentum", "weight_decay": 0.05}
EVERYTHING_DRAWN = {
    "model": {"drop_path_rate": 0.3, "drop_rate": 0.2, "attn_drop_rate": 0.1},
    "mix": {"mixup": 0.8, "cutmix": 1.0, "mode": "elem", "mix_token": True},
    "ema": {"enabled": True, "decay": 0.9},
    "optim": SGD | {"clip_grad": 1.0},
}


def make_learner(config: Config, rank: int = 0, size: int = 1, state: dict | None = None) -> Learner:
    world = World(rank, size, rank, torch.device("cpu"))
    learner = Learner(config, world, BatchLayout.of(config, size), make_network(config, world, state), state)
    learner.wrapped.train()
    return learner


def chunk(batch: Batch, index: int, size: int) -> Batch:
    part = slice(index * size, (index + 1) * size)
    return replace(batch, **{name: v[part] for name, v in vars(batch).items() if isinstance(v, torch.Tensor)})


def train(learner: Learner, batches: list[Batch], lr: float = 0.1, first: int = 0) -> dict:
    """Take one step on each of the global ``batches``; return weights, EMA, losses and gradient norms."""
    plan, rank = learner.layout, learner.world.rank
    losses, norms = [], []
    for step, batch in enumerate(batches, start=first):
        for micro in range(plan.micro_batches):
            mine = chunk(batch, micro * plan.world_size + rank, plan.micro_size)
            losses.append(learner.forward_backward(mine, 0, step, micro).total.item())
        norms.append(learner.optimizer_step(lr, step).item())
    average = None if learner.ema is None else copy.deepcopy(learner.ema.module.state_dict())
    return {"weights": copy.deepcopy(learner.model.state_dict()), "ema": average, "losses": losses, "norms": norms}


def assert_close(ours: dict, theirs: dict, atol: float = 1e-6, statistics: bool = True) -> None:
    """Compare two state_dicts, BatchNorm's statistics included or not."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        if statistics or name.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def differ(ours: dict, theirs: dict) -> bool:
    return any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(8, seed) for seed in range(3)]


# ------------------------------------------------------------------------------------------------ one process


def freeze_batch_norm(learner: Learner) -> Learner:
    """Normalise by running statistics, so that the images of a pass do not affect one another."""
    for module in learner.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return learner


def test_passes_add_up_to_the_whole_batch(tiny_config, batches):
    results = {}
    for most in (8, 4, 3, 1):
        config = tiny_config(
            train={"batch_size": 8, "device_batch_size": most},
            mix={"mix_token": False},
            optim=SGD | {"clip_grad": 0.5},
            ema={"enabled": True, "decay": 0.9},
        )
        results[most] = train(freeze_batch_norm(make_learner(config)), batches)
    for most, passes in ((4, 2), (3, 4), (1, 8)):
        assert len(results[most]["losses"]) == 3 * passes
        assert_close(results[most]["weights"], results[8]["weights"])
        assert_close(results[most]["ema"], results[8]["ema"])
        assert results[most]["norms"] == pytest.approx(results[8]["norms"], rel=1e-5)
        means = torch.tensor(results[most]["losses"]).unflatten(0, (3, passes)).mean(1)
        assert means.tolist() == pytest.approx(results[8]["losses"], rel=1e-5)


def test_a_step_is_a_function_of_seed_and_position(tiny_config, batches):
    config = tiny_config(train={"batch_size": 8}, **EVERYTHING_DRAWN)
    torch.manual_seed(1)
    first = train(make_learner(config), batches[:2])
    torch.manual_seed(2)
    second = train(make_learner(config), batches[:2])
    assert not differ(first["weights"], second["weights"]) and first["losses"] == second["losses"]

    # Dropout alone, mixing alone: each draws other numbers at another step.
    for section in ("model", "mix"):
        learner = make_learner(
            tiny_config(train={"batch_size": 8}, **{"mix": {"mix_token": False}, section: EVERYTHING_DRAWN[section]})
        )
        places = ((0, 0), (0, 1), (1, 0))
        losses = [learner.forward_backward(batches[0], epoch, step, 0).total.item() for epoch, step in places]
        assert len(set(losses)) == 3, section


def test_a_resumed_learner_continues_to_the_same_bits(tiny_config, batches, tmp_path):
    changes = EVERYTHING_DRAWN | {"optim": {"clip_grad": 1.0}, "ema": {"enabled": True, "decay": 0.9, "warmup": True}}
    for precision in ("fp32", "fp16"):
        config = tiny_config(train={"batch_size": 8, "precision": precision}, **changes)
        through = train(make_learner(config), batches)
        stopped = make_learner(config)
        train(stopped, batches[:1])
        torch.save(stopped.state_dict(), tmp_path / "state.pt")
        resumed = make_learner(config, state=torch.load(tmp_path / "state.pt", weights_only=True))
        rest = train(resumed, batches[1:], first=1)
        assert not differ(rest["weights"], through["weights"]) and not differ(rest["ema"], through["ema"])
        assert rest["losses"] == through["losses"][1:] and rest["norms"] == through["norms"][1:]


@pytest.mark.parametrize("before", [False, True])
def test_a_run_may_be_resumed_in_another_memory_order(tiny_config, batches, before):
    learner = {c: make_learner(tiny_config(train={"batch_size": 8, "channels_last": c})) for c in (False, True)}
    for each in learner.values():
        train(each, batches[:1], lr=1e-3)
    through, state = learner[before], copy.deepcopy(learner[before].state_dict())
    resumed = make_learner(tiny_config(train={"batch_size": 8, "channels_last": not before}), state=state)
    for parameter, values in resumed.optimizer.state.items():
        for value in values.values():
            assert value.shape != parameter.shape or value.stride() == parameter.stride()
    rest = [train(each, batches[1:], lr=1e-3, first=1)["weights"] for each in (resumed, through)]
    assert_close(*rest, atol=1e-5)


def test_channels_last_is_for_convolutions_alone(tiny_config):
    model = make_learner(tiny_config(train={"channels_last": True})).model
    orders = {
        name: parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 4 and parameter[0, 0].numel() > 1
    }
    assert orders.pop("pos_embed") is False
    assert orders and all(orders.values()), orders


def test_a_run_may_be_resumed_in_another_precision_and_with_other_options(tiny_config, batches):
    state = make_learner(tiny_config(train={"batch_size": 8})).state_dict()
    for precision in ("fp16", "bf16"):
        config = tiny_config(train={"batch_size": 8, "precision": precision}, optim={"weight_decay": 0.3})
        learner = make_learner(config, state=copy.deepcopy(state))
        assert {g["weight_decay"] for g in learner.optimizer.param_groups} == {0.0, 0.3}
        train(learner, batches[:1])
    assert make_learner(tiny_config(), state=learner.state_dict()).scaler.state_dict() == {}


def test_without_token_loss_the_token_head_is_unchanged(tiny_config, batches, caplog):
    config = tiny_config(train={"batch_size": 8}, loss={"dense_weight": 0.0})
    learner = make_learner(config)
    assert "loss.dense_weight is 0" in caplog.text
    before = copy.deepcopy(learner.model.state_dict())
    after = train(learner, batches[:1])["weights"]
    same = [name for name in before if torch.equal(after[name], before[name])]
    assert [name for name in same if "head" in name] == ["aux_head.weight", "aux_head.bias"]
    assert not torch.equal(after["network.0.0.attn.v.weight"], before["network.0.0.attn.v.weight"])


def test_options_that_do_not_change_the_weights(tiny_config, batches):
    config = tiny_config(train={"batch_size": 8}, optim=SGD, ema={"enabled": True})
    expected = train(make_learner(config), batches)
    channels_last = replace(config, train=replace(config.train, channels_last=True))
    assert_close(train(make_learner(channels_last), batches)["weights"], expected["weights"], atol=1e-5)
    with torch.compiler.set_stance("force_eager"):  # everything about compiling but the compiler
        compiled = train(make_learner(replace(config, train=replace(config.train, compile=True))), batches)
    assert not differ(compiled["weights"], expected["weights"]) and not differ(compiled["ema"], expected["ema"])


# --------------------------------------------------------------------------------------------- clipping, mixing


def gradients_of_a_step(config: Config, batch: Batch) -> dict[str, torch.Tensor]:
    learner = make_learner(config)
    learner.forward_backward(batch, 0, 0, 0)
    return {name: p.grad.clone() for name, p in learner.model.named_parameters()}


def clip_adaptively(weight: torch.Tensor, gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """Clip the norm of each unit's gradient to ``factor`` times that of its weights (arXiv 2102.06171), by loops."""
    units = [...] if weight.ndim <= 1 else range(len(weight))
    clipped = gradient.clone()
    for unit in units:
        longest = factor * max(weight[unit].norm().item(), 1e-3)
        length = gradient[unit].norm().item()
        if length > longest:
            clipped[unit] = gradient[unit] * longest / length
    return clipped


@pytest.mark.parametrize(("mode", "threshold"), [("norm", 0.1), ("norm", 1e6), ("value", 0.003), ("agc", 0.02)])
def test_clipping_by_hand(tiny_config, batches, mode, threshold):
    plain = {"name": "momentum", "weight_decay": 0.0}
    config = tiny_config(train={"batch_size": 8}, optim=plain)
    gradients = gradients_of_a_step(config, batches[0])
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()

    clipping = tiny_config(train={"batch_size": 8}, optim=plain | {"clip_mode": mode, "clip_grad": threshold})
    learner = make_learner(clipping)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    result = train(learner, batches[:1], lr=0.5)
    assert result["norms"] == [pytest.approx(norm, rel=1e-5)], "the norm before clipping is reported"
    for name, gradient in gradients.items():
        if mode == "norm":
            gradient = gradient * min(1.0, threshold / norm)
        elif mode == "value":
            gradient = gradient.clamp(-threshold, threshold)
        else:
            gradient = clip_adaptively(before[name], gradient, threshold)
        torch.testing.assert_close(result["weights"][name], before[name] - 0.5 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "mix",
    [
        {"mix_token": True},
        {"mix_token": False, "mixup": 0.8},
        {"mix_token": False, "cutmix": 1.0},
        {"mix_token": False, "cutmix": 1.0, "mode": "pair"},
        {"mix_token": True, "mixup": 0.8, "cutmix": 1.0, "mode": "elem", "prob": 0.9},
    ],
    ids=str,
)
def test_every_way_of_mixing_changes_the_step(tiny_config, batches, mix):
    def after(**options) -> dict:
        return train(make_learner(tiny_config(train={"batch_size": 8}, mix=options)), batches[:1])

    plain, mixed = after(mix_token=False), after(**mix)
    assert mixed["losses"] != plain["losses"] and torch.tensor(mixed["losses"]).isfinite()


def test_mixing_with_probability_0_mixes_nothing(tiny_config, batches):
    configs = [tiny_config(train={"batch_size": 8}, mix=m) for m in ({"mixup": 0.8, "cutmix": 1.0, "prob": 0.0}, {})]
    never, plain = (train(make_learner(replace(c, mix=replace(c.mix, mix_token=False))), batches[:1]) for c in configs)
    assert never["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_mixing_of_images_ends_with_its_epoch(tiny_config, batches):
    config = tiny_config(train={"batch_size": 8}, mix={"mixup": 0.8, "off_epoch": 2})
    plain = tiny_config(train={"batch_size": 8})
    losses = [
        [make_learner(c).forward_backward(batches[0], epoch, 0, 0).total.item() for epoch in (0, 1, 2, 3)]
        for c in (config, plain)
    ]
    assert [ours == theirs for ours, theirs in zip(*losses, strict=True)] == [False, False, True, True]


# ----------------------------------------------------------------------------------------------- two processes


def steps_of_two_processes(rank: int, size: int, config: Config, batches: list[Batch]) -> dict:
    """All results that need two processes, from one process group."""
    results = {"one pass": train(make_learner(config, rank, size), batches)}

    # Two passes: gradients are reduced in the last one only, and buffers become rank 0's when asked for.
    passes = replace(config, train=replace(config.train, device_batch_size=2))
    learner = make_learner(passes, rank, size)
    results["gradients"] = []
    for micro in range(learner.layout.micro_batches):
        mine = chunk(batches[0], micro * size + rank, learner.layout.micro_size)
        learner.forward_backward(mine, 0, 0, micro)
        results["gradients"].append({name: p.grad.clone() for name, p in learner.model.named_parameters()})
    learner.optimizer_step(0.1, 0)
    results["two passes"] = train(learner, batches[1:], first=1)
    broadcast_buffers(learner.model)
    results["agreed"] = copy.deepcopy(learner.model.state_dict())

    # Ranks with other initial weights all get rank 0's, for the EMA as well.
    other = replace(config, train=replace(config.train, seed=100 + rank))
    learner = make_learner(other, rank, size)
    results["begin"] = copy.deepcopy(learner.model.state_dict()), copy.deepcopy(learner.ema.module.state_dict())

    without_tokens = replace(config, loss=replace(config.loss, dense_weight=0.0))
    results["without token loss"] = train(make_learner(without_tokens, rank, size), batches)
    return results


@pytest.fixture(scope="module")
def pair(tiny_config, batches):
    config = tiny_config(train={"batch_size": 8}, **EVERYTHING_DRAWN)
    return config, run_group(steps_of_two_processes, config, batches, sizes=(2,))[2]


@pytest.mark.slow
def test_two_processes_equal_one_with_two_passes(pair, batches):
    """All that is drawn, gradients and weights agree; BatchNorm's running statistics need not.

    Each pass normalises by its own images either way. One process sees both halves and updates its statistics
    twice a step; of two processes only rank 0's first half is kept.
    """
    config, (main, other) = pair
    one = train(make_learner(replace(config, train=replace(config.train, device_batch_size=4))), batches)
    assert_close(main["one pass"]["weights"], one["weights"], statistics=False)
    assert_close(main["one pass"]["ema"], one["ema"], statistics=False)
    assert main["one pass"]["norms"] == other["one pass"]["norms"] == pytest.approx(one["norms"], rel=1e-5)
    both = [list(losses) for losses in zip(main["one pass"]["losses"], other["one pass"]["losses"], strict=True)]
    assert sum(both, []) == pytest.approx(one["losses"], rel=1e-5)
    counters = [r["weights"]["patch_embed.conv.1.num_batches_tracked"].item() for r in (main["one pass"], one)]
    assert counters == [3, 6]


@pytest.mark.slow
def test_two_processes_with_two_passes_equal_one_with_four(pair, batches):
    config, (main, _) = pair
    four = train(make_learner(replace(config, train=replace(config.train, device_batch_size=2))), batches)
    assert_close(main["two passes"]["weights"], four["weights"], statistics=False)


@pytest.mark.slow
def test_the_ranks_hold_the_same_weights_to_the_bit(pair):
    _, (main, other) = pair
    for name in ("one pass", "two passes", "without token loss"):
        assert_close(main[name]["weights"], other[name]["weights"], atol=0, statistics=False)
        assert_close(main[name]["ema"], other[name]["ema"], atol=0, statistics=False)


@pytest.mark.slow
def test_gradients_are_reduced_in_the_last_pass_only(pair):
    _, (main, other) = pair
    (before, after), (others_before, others_after) = main["gradients"], other["gradients"]
    assert all(not torch.equal(before[name], others_before[name]) for name in before)
    assert not differ(after, others_after)


@pytest.mark.slow
def test_statistics_become_rank_0s_when_asked_for(pair):
    _, (main, other) = pair
    assert differ(main["two passes"]["weights"], other["two passes"]["weights"])
    assert not differ(main["agreed"], other["agreed"])
    assert not differ(main["agreed"], main["two passes"]["weights"])


@pytest.mark.slow
def test_ranks_start_with_rank_0s_weights_and_ema(pair, tiny_config):
    config, (main, other) = pair
    assert not differ(main["begin"][0], other["begin"][0])
    assert not differ(main["begin"][1], other["begin"][1])
    assert not differ(main["begin"][0], main["begin"][1])
    alone = make_learner(replace(config, train=replace(config.train, seed=101)))
    assert differ(alone.model.state_dict(), other["begin"][0]), "rank 1 would have started with others"


def test_sync_bn_is_refused_on_devices_without_it(tiny_config):
    config = tiny_config(train={"batch_size": 8, "sync_bn": True})
    with pytest.raises(ValueError, match="train.sync_bn needs CUDA"):
        check_options(config, World(0, 2, 0, torch.device("cpu")))
    check_options(config, World(0, 1, 0, torch.device("cpu")))  # on one process there is nothing to synchronise
