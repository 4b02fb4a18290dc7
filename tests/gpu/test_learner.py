"""One optimizer step on a real device: every way to run it gives the same gradients, and none waits for the device."""

import contextlib
import functools
import os

import pytest
import torch
from conftest import make_batch, make_label_maps, tiny_config

from volo.build import make_network
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.models import create_model
from volo.models.memory import kept_bytes, summed
from volo.runtime import distributed
from volo.runtime.distributed import World
from volo.token_labels.published import PublishedMaps

pytestmark = pytest.mark.cuda


def make_learner(device, size=8, **sections) -> Learner:
    sections["train"] = {"device": device.type, "batch_size": size} | sections.get("train", {})
    config = tiny_config(**sections)
    world = World(0, 1, 0, device)
    learner = Learner(config, world, BatchLayout.of(config, 1), make_network(config, world))
    learner.wrapped.train()
    return learner


def gradients(device, drop_path_rate, **train):
    learner = make_learner(
        device,
        train={"precision": "fp32"} | train,
        model={"drop_path_rate": drop_path_rate},
        optim={"name": "momentum"},
    )
    loss = learner.forward_backward(make_batch(8), 0, 0, 0).total.item()
    return loss, {name: p.grad.clone() for name, p in learner.model.named_parameters()}


@pytest.mark.parametrize(
    "train",
    [
        {"recompute": "none"},
        {"recompute": "cheap"},
        {"recompute": "blocks"},
        {"recompute": "cheap", "channels_last": True},
        {"recompute": "none", "compile": True},
        {"recompute": "none", "compile": True, "channels_last": True},
    ],
    ids=str,
)
def test_same_gradients_however_computed(device, train):
    drop = 0.0 if train.get("compile") else 0.2  # compiled code may draw other numbers
    loss, expected = gradients(device, drop, recompute="none", kernel="eager")
    other_loss, found = gradients(device, drop, **train)
    assert abs(other_loss - loss) < 1e-3
    for name, grad in expected.items():
        error = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert error < 2e-2, f"{name}: {error:.1e}"


STEPS = {
    "bf16": {"train": {"precision": "bf16"}},
    "fp16, clipped": {"train": {"precision": "fp16"}, "optim": {"clip_grad": 1.0}},
    "accumulated, blocks": {"train": {"precision": "bf16", "device_batch_size": 4, "recompute": "blocks"}},
    "EMA, agc": {"ema": {"enabled": True}, "optim": {"clip_grad": 0.1, "clip_mode": "agc"}},
    "mixup and cutmix per element": {"mix": {"mixup": 0.8, "cutmix": 1.0, "mode": "elem"}},
    "labels": {"token_label": {"root": "x", "ground_truth": "published"}},
    "labels and mixup": {"token_label": {"root": "x"}, "mix": {"mixup": 0.8}},
    "published labels": {
        "token_label": {"root": "x", "geometry": "published"},
        "augment": {"order": "published"},
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_no_hidden_wait(device, name):
    """torch.cuda.set_sync_debug_mode("error") raises where the host waits for the device or copies blockingly."""
    learner = make_learner(device, **STEPS[name])
    size, labels = learner.layout.micro_size, learner.config.token_label
    batch = make_batch(size)
    if labels.geometry == "published":
        ops = torch.tensor([[0.5, 1.0, 3.0, 2.0]]).expand(size, 4).contiguous()
        batch.sidecar = PublishedMaps(torch.rand(size, 2, 4, 5), torch.zeros(size, 2, 4, 5).long(), ops)
    elif labels.root:
        batch.sidecar = make_label_maps(size, learner.grid[0] * learner.grid[1])
    if device.type == "cuda":
        batch = batch.pin_memory()
    try:
        for step in range(3):
            if step and device.type == "cuda":  # the first step allocates, and may wait
                torch.cuda.set_sync_debug_mode("error")
            for micro in range(learner.layout.micro_batches):
                learner.forward_backward(batch, 0, step, micro)
            learner.optimizer_step(1e-3, step)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def process_group(device, monkeypatch):
    """Process groups of one rank: NCCL on CUDA, with gloo beside it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(29500 + os.getpid() % 400))
    distributed.initialise(device.type)
    yield
    distributed.shutdown()


@pytest.mark.parametrize(("micro_size", "compiled"), [(8, False), (4, False), (8, True)])
def test_ddp_of_one_rank_trains_alike(device, process_group, micro_size, compiled):
    train = {"device_batch_size": micro_size, "precision": "fp32"}
    plain = make_learner(device, train=train | {"recompute": "none"}, optim={"name": "momentum"})
    ddp = make_learner(device, train=train | {"compile": compiled}, optim={"name": "momentum"})
    ddp.world = World(0, 2, 0, device)  # of two, so that the network is wrapped; the group has one
    ddp.wrapped = ddp._distribute(ddp.model)
    ddp.world = World(0, 1, 0, device)
    ddp.wrapped.train()
    for step in range(3):
        for learner in (plain, ddp):
            for micro in range(learner.layout.micro_batches):
                last = micro == learner.layout.micro_batches - 1
                with contextlib.nullcontext() if learner is plain or last else learner.wrapped.no_sync():
                    learner.forward_backward(make_batch(micro_size, step), 0, step, micro)
            learner.optimizer_step(0.1, step)
    for (name, p), q in zip(plain.model.named_parameters(), ddp.model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-3, name


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_counted_memory_is_enough_and_not_much_too_much(device, recompute):
    shape = (16, 3, 224, 224)
    network = create_model("volo_d1").to(device)
    network.set_kernel("native", torch.bfloat16)
    network.set_recompute(recompute)
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
    counted = kept_bytes(network, shape, device, autocast)
    images = torch.randn(shape, device=device)
    before = torch.cuda.memory_allocated(device)
    with autocast():
        output = summed(network.train()(images))
    kept = torch.cuda.memory_allocated(device) - before
    output.backward()
    assert 0.9 * counted < kept < 1.1 * counted
